"""`step(closure)` is what the optimizer makes of it, or an error before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from state_tools import EAGER_STATE, adamw, batch, check_same, check_same_state, model_of, values
from torch import nn
from torch.nn.utils import clip_grad_norm_

import ssdtrain

POLICY = EAGER_STATE | {"chunk_nbytes": 40_000}


class OwnSGD(torch.optim.SGD):
    """Somebody's own, which does with a closure what everybody does."""

    num_evaluated = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    p.sub_(momentum.mul_(0.9).add_(p.grad), alpha=group["lr"])
        return loss


class Sharp(torch.optim.SGD):
    """Looks for sharp directions with a closure; without one it is plain: nothing tells when it is made."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if closure is None:
            return super().step()
        with torch.enable_grad():
            closure()
        ascents = [(p, 0.05 * p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, ascent in ascents:
            p.add_(ascent)
        with torch.enable_grad():
            loss = closure()
        for p, ascent in ascents:
            p.sub_(ascent)
        super().step()
        return loss


class Late(torch.optim.SGD):
    """Evaluates the closure after the update."""

    def step(self, closure: Any = None) -> Any:
        super().step()
        return closure() if closure is not None else None


class Deaf(torch.optim.SGD):
    """Does without the closure."""

    def step(self, closure: Any = None) -> Any:
        return super().step()


class Wants(torch.optim.SGD):
    """Says in its step only that it wants one, as SAM does."""

    def step(self, closure: Any = None) -> Any:
        assert closure is not None, "Sharpness needs a closure"
        closure()
        super().step(closure)


def closure_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int, num_calls: list[int]
) -> Callable[[], Any]:
    def closure() -> torch.Tensor:
        num_calls.append(step)
        optimizer.zero_grad()
        loss: torch.Tensor = model(batch(step))
        loss.backward()
        clip_grad_norm_(model.parameters(), 0.05)
        return loss.detach()

    return closure


@pytest.mark.parametrize("kind", [OwnSGD, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("policy", [{}, {"offload_gradients": True}], ids=str)
def test_a_closure_that_is_evaluated_once(kind: Any, policy: dict[str, bool], tmp_path: Path) -> None:
    """Evaluated as often as plain, with what it does to gradients."""

    def go(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
        num_calls: list[int] = []
        losses = [optimizer.step(closure_of(model, optimizer, step, num_calls)) for step in range(3)]
        return [losses, num_calls, values(model)]

    plain, model = model_of("mlp"), model_of("mlp")
    expected = kind(plain.parameters(), lr=0.1)
    optimizer = ssdtrain.offload_optimizer(kind(model.parameters(), lr=0.1), tmp_path, POLICY | policy)
    check_same(go(model, optimizer), go(plain, expected))
    check_same_state(optimizer.state_dict(), expected.state_dict())


@pytest.mark.parametrize("kind", [Sharp, Late, Deaf])
def test_a_closure_that_is_used_otherwise_is_refused(kind: Any, tmp_path: Path) -> None:
    """Evaluated once by us, a step of SAM was one of SGD. Without a closure it is a step like any other."""
    plain, model = model_of("mlp"), model_of("mlp")
    optimizer = ssdtrain.offload_optimizer(kind(model.parameters(), lr=0.1), tmp_path, POLICY)
    num_calls: list[int] = []
    with pytest.raises(ValueError, match=f"evaluates a closure once, before it updates, got {kind.__name__}"):
        optimizer.step(closure_of(model, optimizer, 0, num_calls))
    assert not num_calls and all(p.grad is None for p in model.parameters())
    check_same(values(model), values(plain))
    for module, steps in ((model, optimizer), (plain, kind(plain.parameters(), lr=0.1))):
        module(batch(0)).backward()
        steps.step()
    check_same(values(model), values(plain))


def test_an_optimizer_that_wants_a_closure_is_refused_by_name(tmp_path: Path) -> None:
    model = model_of("mlp")
    before = values(model)

    def train() -> None:
        optimizer = ssdtrain.offload_optimizer(Wants(model.parameters(), lr=0.1), tmp_path, POLICY)
        optimizer.step(closure_of(model, optimizer, 0, []))

    with pytest.raises(ValueError, match=r"got Wants.*Sharpness needs a closure"):
        train()
    check_same(values(model), before)


@pytest.mark.parametrize("policy", [{}, {"offload_gradients": True}], ids=str)
def test_sharpness_around_an_offloaded_optimizer(policy: dict[str, bool], tmp_path: Path) -> None:
    """Two backward passes per step, the first for a move up that is taken back: by hand, round any optimizer."""

    def go(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        for step in range(3):
            model(batch(step)).backward()
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()  # type: ignore[union-attr]
            moves = [p.grad * (0.05 / norm) for p in model.parameters()]  # type: ignore[operator]
            with torch.no_grad():
                for p, move in zip(model.parameters(), moves, strict=True):
                    p.add_(move)
            model.zero_grad()
            model(batch(step)).backward()
            with torch.no_grad():
                for p, move in zip(model.parameters(), moves, strict=True):
                    p.sub_(move)
            optimizer.step()
            optimizer.zero_grad()
        return values(model)

    plain, model = model_of("mlp"), model_of("mlp")
    optimizer = ssdtrain.offload_optimizer(adamw(model.parameters()), tmp_path, POLICY | policy)
    check_same(go(model, optimizer), go(plain, adamw(plain.parameters())))
