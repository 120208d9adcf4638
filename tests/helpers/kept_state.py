"""An optimizer whose state is of any kind: a tensor subclass, lists and dictionaries of tensors, a part of a graph."""

from __future__ import annotations

from typing import Any

import torch


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
