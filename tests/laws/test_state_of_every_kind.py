"""Optimizer state leaves whatever it is made of; what cannot leave is said, never left in memory without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import JOBS
from forks import Forks, ranks
from state_tools import EAGER_STATE, check_same, model_of, train, values

import ssdtrain

WORKER = JOBS / "sharded_worker.py"


def offloaded(optimizer: torch.optim.Optimizer, folder: Path, **policy: Any) -> Any:
    return ssdtrain.offload_optimizer(optimizer, folder, EAGER_STATE | {"chunk_nbytes": 40_000} | policy)


class Quantised(torch.Tensor):
    """Codes of a byte and a scale, as quantised optimizer state is made of elsewhere."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Quantised:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[return-value]

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], str]:
        return ["codes", "scale"], "context"

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], context: str, size: Any, stride: Any) -> Quantised:
        assert context == "context"
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def of(cls, values: torch.Tensor) -> Quantised:
        scale = values.abs().amax().clamp(min=1e-12) / 127
        return cls((values / scale).round().to(torch.int8), scale)

    def values(self) -> torch.Tensor:
        return self.codes.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            return cls(args[0].codes.clone(), args[0].scale.clone())
        raise NotImplementedError(str(func))


class Momentum(torch.optim.Optimizer):
    """Momentum that is kept as `keep` says."""

    def __init__(self, params: Any, kind: str) -> None:
        super().__init__(params, {"lr": 1e-2, "kind": kind})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, kind = self.state[p], group["kind"]
                m = p.grad.clone()
                if "m" in state:
                    m = state["m"].values() if kind == "quantised" else self._first(state["m"], kind)
                    m = m.mul(0.9).add_(p.grad)
                state["m"] = {
                    "quantised": lambda m=m: Quantised.of(m),
                    "list": lambda m=m: [m, m.abs(), 1],
                    "nested": lambda m=m: {"values": (m, [m.neg()]), "name": "m"},
                    "graph": lambda m=m: m.requires_grad_(),
                    "sparse": lambda m=m: m.to_sparse(),
                }[kind]()
                p.sub_(m.detach(), alpha=group["lr"])

    @staticmethod
    def _first(value: Any, kind: str) -> torch.Tensor:
        if kind == "sparse":
            return value.to_dense()  # type: ignore[no-any-return]
        return {"list": lambda: value[0], "nested": lambda: value["values"][0], "graph": lambda: value.detach()}[kind]()


@pytest.mark.parametrize("kind", ["quantised", "list", "nested", "graph", "sparse"])
def test_state_of_any_kind_leaves_or_is_said_to_stay(kind: str, tmp_path: Path) -> None:
    """Quantised state in a tensor subclass, and tensors in lists and dictionaries, used to stay: 0 bytes, no word."""
    plain, model = model_of("mlp"), model_of("mlp")
    expected, inner = Momentum(plain.parameters(), kind), Momentum(model.parameters(), kind)
    optimizer = offloaded(inner, tmp_path)
    check_same(train(model, optimizer, 5), train(plain, expected, 5))
    check_same(values(model), values(plain))
    num_elements = sum(p.numel() for p in model.parameters() if p.numel() >= 1024)
    nbytes = {"quantised": 1, "list": 8, "nested": 8}.get(kind, 0) * num_elements
    assert optimizer.stats.away_nbytes == nbytes
    words = {"graph": "part of a graph", "sparse": "not strided"}.get(kind)
    assert any(words in text for text in optimizer.stats.fallbacks) if words else not optimizer.stats.fallbacks
    state = optimizer.state_dict()["state"]
    optimizer.close()
    for i, p in enumerate(expected.state):
        if kind == "quantised":
            check_same(state[i]["m"].values(), expected.state[p]["m"].values())
            check_same(inner.state_dict()["state"][i]["m"].codes, expected.state[p]["m"].codes)
        elif kind != "sparse":
            check_same(state[i], expected.state[p])
    check_same(train(model, inner, 2, first=5), train(plain, expected, 2, first=5))


def test_quantised_state_is_loaded(tmp_path: Path) -> None:
    """A state dict has tensors of the class they were, and goes on from there."""
    plain, model = model_of("mlp"), model_of("mlp")
    expected = Momentum(plain.parameters(), "quantised")
    optimizer = offloaded(Momentum(model.parameters(), "quantised"), tmp_path)
    train(plain, expected, 3)
    train(model, optimizer, 3)
    saved = optimizer.state_dict()
    optimizer.close()
    resumed = offloaded(Momentum(model.parameters(), "quantised"), tmp_path)
    resumed.load_state_dict(saved)
    assert resumed.stats.away_nbytes > 0
    check_same(train(model, resumed, 3, first=3), train(plain, expected, 3, first=3))
    check_same(values(model), values(plain))


def test_sharded_parameters(forks: Forks, tmp_path: Path) -> None:
    """After `fully_shard` state is made of DTensors: each rank's part leaves, equal to the bit, saved and loaded."""
    for rank in forks.run([WORKER, tmp_path], ranks(2)):
        assert rank.returncode == 0, rank.stderr
        for name, found in json.loads(rank.stdout.splitlines()[-1]).items():
            num_moments = 2 if name == "AdamW" else 1
            # Of four weights of 48 x 48 each rank has half; biases are smaller than min_nbytes.
            assert found == {"is_equal": True, "away_nbytes": num_moments * 4 * 48 * 48 * 4 // 2}
