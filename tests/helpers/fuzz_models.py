"""Modules and optimizers of every kind in miniature, for random programs: each block is a few hundred numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WIDTH = 12
LENGTH = 5


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.conv(x.transpose(1, 2)).transpose(1, 2))


class Norms(nn.Module):
    """With buffers that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.batch, self.mix = nn.LayerNorm(WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(self.batch(self.layer(x).transpose(1, 2)).transpose(1, 2))


class Lora(nn.Module):
    """A frozen layer with two small trainable ones beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.a, self.b = nn.Linear(WIDTH, 3, bias=False), nn.Linear(3, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.base(x) + self.b(self.a(x)))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale = nn.Embedding(16, WIDTH), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = (x.detach().float().mean(-1).nan_to_num().abs() * 40).long() % 16
        return x * self.scale + self.table(tokens)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, 0.1, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Twice(nn.Module):
    """Uses one layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer(torch.tanh(self.layer(x)))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": Mlp,
    "conv": Conv,
    "norms": Norms,
    "lora": Lora,
    "tokens": Tokens,
    "attention": Attention,
    "twice": Twice,
}


class Toy(nn.Module):
    """Blocks of random kinds and dtypes between an inlet and an outlet, whose weights may be those of a block."""

    def __init__(self, kinds: Iterable[str], dtypes: Iterable[torch.dtype], *, is_tied: bool) -> None:
        super().__init__()
        self.inlet, self.outlet = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.body = nn.ModuleList(BLOCKS[kind]().to(dtype) for kind, dtype in zip(kinds, dtypes, strict=True))
        if is_tied:
            self.outlet.weight = self.inlet.weight
            twins = [block for block in self.body if isinstance(block, Mlp)]
            for first, second in itertools.pairwise(twins):
                second.up.weight = first.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inlet(x.to(self.inlet.weight.dtype))
        for block in self.body:
            x = block(x.to(next(block.parameters()).dtype))
        return self.outlet(x.to(self.outlet.weight.dtype)).float().square().mean()


def batch_of(number: int, rank: int = 0) -> torch.Tensor:
    return torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1000 * rank + number))


# -- optimizers that others could have written -------------------------------------------------------------------------


class OopsError(Exception):
    """A user's code that fails."""


class Written(torch.optim.Optimizer):
    """What those below share."""

    num_before_failure = -1
    """Of the next updates so many are done, and then one raises; negative: none."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "beta": 0.9})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.begin_group(group)
            for p in group["params"]:
                if p.grad is not None:
                    if Written.num_before_failure == 0:
                        raise OopsError
                    Written.num_before_failure -= 1
                    self.update(p, self.state[p], group)
        return loss

    def begin_group(self, group: dict[str, Any]) -> None:
        pass

    def update(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


class Lion(Written):
    """Its state begins with the first gradient, and one part of it is a plain number."""

    def update(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["average"], state["count"] = torch.zeros_like(p), 0
        state["count"] += 1
        p.add_((state["average"] * group["beta"] + p.grad * (1 - group["beta"])).sign(), alpha=-group["lr"])
        state["average"].lerp_(p.grad, 1 - group["beta"])


class CountsInGroups(Written):
    """As Apex' and TransformerEngine's FusedAdam: the steps are counted in the group."""

    def begin_group(self, group: dict[str, Any]) -> None:
        group["step"] = group.get("step", 0) + 1

    def update(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        average = state.setdefault("average", torch.zeros_like(p))
        average.lerp_(p.grad, 1 - group["beta"])
        p.add_(average, alpha=-group["lr"] / (1 - group["beta"] ** group["step"]))


class CountsItself(Written):
    """The number of steps is an attribute of the optimizer."""

    num_steps = 0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.num_steps += 1
        return super().step(closure)

    def update(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        average = state.setdefault("average", torch.zeros_like(p))
        average.add_(p.grad)
        p.add_(average, alpha=-group["lr"] / self.num_steps)


class TwoPhases(Written):
    """As schedule-free ones: `eval()` and `train()` exchange the parameters for averages in the state."""

    def update(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        average = state.setdefault("average", p.clone())
        p.add_(p.grad, alpha=-group["lr"])
        average.lerp_(p, 0.1)

    @torch.no_grad()
    def swap(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "average" in self.state[p]:
                    kept = p.clone()
                    p.copy_(self.state[p]["average"])
                    self.state[p]["average"].copy_(kept)


class LooksAtAll(Written):
    """Each update depends on the norm of all gradients."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        grads = [p.grad.float().norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.norm = float(torch.stack(grads).norm()) if grads else 1.0
        return super().step(closure)

    def update(self, p: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        average = state.setdefault("average", torch.zeros_like(p))
        average.lerp_(p.grad, 0.5)
        p.add_(average, alpha=-group["lr"] / (1 + self.norm))


def _of(kind: Any, **options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: kind(parameters, **options)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": _of(torch.optim.AdamW, lr=1e-2),
    "adamw foreach": _of(torch.optim.AdamW, lr=1e-2, foreach=True),
    "adamw fused": _of(torch.optim.AdamW, lr=1e-2, fused=True),
    "adam amsgrad": _of(torch.optim.Adam, lr=1e-2, amsgrad=True, weight_decay=0.1),
    "sgd": _of(torch.optim.SGD, lr=1e-2),
    "sgd momentum": _of(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": _of(torch.optim.RMSprop, lr=1e-3, momentum=0.5, centered=True),
    "adagrad": _of(torch.optim.Adagrad, lr=1e-2),
    "adadelta": _of(torch.optim.Adadelta),
    "adamax": _of(torch.optim.Adamax),
    "nadam": _of(torch.optim.NAdam),
    "radam": _of(torch.optim.RAdam),
    "rprop": _of(torch.optim.Rprop, lr=1e-3),
    "asgd": _of(torch.optim.ASGD),
    "adafactor": _of(torch.optim.Adafactor),
    "lion": _of(Lion, lr=1e-3),
    "counts in groups": _of(CountsInGroups),
    "counts itself": _of(CountsItself),
    "two phases": _of(TwoPhases),
    "looks at all": _of(LooksAtAll),
}
