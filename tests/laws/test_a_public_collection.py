"""Every optimizer of a public collection pages equal to the bit, or is refused before anything changes."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from state_tools import EAGER_STATE
from torch import nn

import ssdtrain
from ssdtrain.optimizer.shared_values import same_bits

SMALL = EAGER_STATE | {"min_nbytes": 512, "chunk_nbytes": 12_000}
OPTIONS: dict[str, dict[str, Any]] = {"ranger21": {"num_iterations": 100, "lr": 1e-3}, "bsam": {"num_data": 100}}
BY_USE = {"muon", "adamuon", "adago", "normuon", "muonclip"}
WANT_A_MODEL = {"adammini"}
NEED_MORE = {"alig", "bsam", "lbfgs", "lomo", "adalomo", "demo", "distributedmuon"}  # a closure, a model, several ranks


class Small(nn.Module):
    """Parameters of one, two and four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(32, 48)
        self.norm, self.down = nn.LayerNorm(48), nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x.view(-1, 3, 4, 4)).flatten(1)[:, :32]
        found: torch.Tensor = self.down(self.norm(torch.tanh(self.up(x)))).square().mean()
        return found


def seed(number: int) -> None:
    """Of all generators that they draw from: kron balances its factors now and then, by numpy's."""
    torch.manual_seed(number)
    numpy.random.seed(number)


def make(name: str, model: nn.Module) -> Any:
    from pytorch_optimizer import load_optimizer

    parameters: list[Any] = list(model.parameters())
    if name == "spectralsphere":
        parameters = [p for p in parameters if p.dim() == 2]
    elif name in BY_USE:
        matrices = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() < 2]
        parameters = [{"params": p, "use_muon": use} for p, use in zip(matrices, (True, False), strict=True)]
    seed(1)
    wanted = model if name in WANT_A_MODEL else parameters
    optimizer = load_optimizer(name)(wanted, **OPTIONS.get(name, {}))
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def train(model: nn.Module, optimizer: Any, *, has_graph: bool) -> list[torch.Tensor]:
    losses = []
    for step in range(5):
        seed(step)
        loss = model(torch.randn(8, 48))
        loss.backward(create_graph=has_graph)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def outcome(name: str, folder: Path) -> str:
    """What became of one of them."""
    has_graph = name in ("adahessian", "sophiah")
    plain = Small()
    expected = make(name, plain)
    losses = train(plain, expected, has_graph=has_graph)
    for chunk_nbytes in (12_000, 1 << 24):
        model = Small()
        inner, before = make(name, model), [p.clone() for p in model.parameters()]
        try:
            optimizer: Any = ssdtrain.offload_optimizer(inner, folder, SMALL | {"chunk_nbytes": chunk_nbytes})
        except ValueError as error:
            refusal = str(error)
        else:
            refusal = ""
        if refusal:
            assert same_bits([p.detach() for p in model.parameters()], before), name
            if "chunk_nbytes" in refusal:
                continue
            return "refused"
        found = train(model, optimizer, has_graph=has_graph)
        assert same_bits(found, losses), name
        assert same_bits([*model.state_dict().values()], [*plain.state_dict().values()]), name
        states = optimizer.state_dict(), expected.state_dict()
        assert same_bits(states[0]["state"], states[1]["state"]), name
        assert same_bits(states[0]["param_groups"], states[1]["param_groups"]), name
        optimizer.close()
        return "in chunks" if chunk_nbytes < 1 << 24 else "in one chunk"
    raise AssertionError(f"{name} was refused for every chunk_nbytes")


@pytest.mark.slow
@pytest.mark.needs_package("pytorch_optimizer")
def test_all_of_them(tmp_path: Path) -> None:
    """105 of 128 were refused, after the first weights had changed."""
    from pytorch_optimizer import get_supported_optimizers

    found: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [name for name in get_supported_optimizers() if name not in NEED_MORE]
        for name in names:
            found[outcome(name, tmp_path)] += 1
    assert found["in chunks"] >= 100 and found["in one chunk"] >= 12 and found["refused"] <= 2, found
