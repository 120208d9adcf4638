"""With `step_in_backward`, what PyTorch's `step()` would have seen is never passed over without a word."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from state_tools import EAGER_STATE, adamw, check_same, model_of, train, values
from torch import nn

import ssdtrain

POLICY = EAGER_STATE | {"step_in_backward": True, "chunk_nbytes": 40_000}


def load_state(_: nn.Module, optimizer: Any, saved: dict[str, Any]) -> None:
    optimizer.load_state_dict(saved["optimizer"])


def load_weights(model: nn.Module, _: Any, saved: dict[str, Any]) -> None:
    model.load_state_dict(saved["model"])


def set_rate(_: nn.Module, optimizer: Any, __: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.5


def schedule(_: nn.Module, optimizer: Any, __: Any) -> None:
    optimizer.param_groups[0]["betas"] = (0.5, 0.5)


@torch.no_grad()
def clamp(model: nn.Module, _: Any, __: Any) -> None:
    for p in model.parameters():
        p.clamp_(-0.05, 0.05)


def edit_state(_: nn.Module, optimizer: Any, __: Any) -> None:
    for state in optimizer.state.values():
        state["exp_avg"].zero_()


def replace_gradients(model: nn.Module, _: Any, __: Any) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)


def drop_gradient(model: nn.Module, _: Any, __: Any) -> None:
    next(iter(model.parameters())).grad = None


def drop_gradients(model: nn.Module, _: Any, __: Any) -> None:
    model.zero_grad()


def step_before(_: nn.Module, optimizer: Any, __: Any) -> None:
    optimizer.step()


CHANGES: list[tuple[Callable[..., None], str]] = [
    (load_state, "Expected a backward before step"),
    (load_weights, "to stay as it is until step"),
    (set_rate, "got lr=0.5 instead of"),
    (schedule, "got betas="),
    (clamp, "to stay as it is until step"),
    (edit_state, "Expected step.. before optimizer.state"),
    (replace_gradients, "got another one in its place"),
    (drop_gradient, "to stay until step.., got none"),
    (drop_gradients, "to stay until step.., got none"),
    (step_before, "Expected a backward before step"),
]


@pytest.mark.parametrize("change, message", CHANGES, ids=[change.__name__ for change, _ in CHANGES])
def test_a_change_between_backward_and_step_is_refused(
    change: Callable[..., None], message: str, tmp_path: Path
) -> None:
    """The update had been made of what was there before; `step()` went on, and results were others than PyTorch's."""
    model = model_of("mlp")
    optimizer: Any = ssdtrain.offload_optimizer(adamw(model.parameters()), tmp_path, POLICY)
    train(model, optimizer, 2)
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    loss(model).backward()
    with pytest.raises(RuntimeError, match=message):  # noqa: PT012  # some raise at once
        change(model, optimizer, saved)
        optimizer.step()
    optimizer.close()


def test_a_checkpoint_and_zero_grad_make_a_new_beginning(tmp_path: Path) -> None:
    """Whoever gives up a step goes back to a checkpoint, and on from there as without offload."""
    plain, model = model_of("mlp"), model_of("mlp")
    expected, optimizer = adamw(plain.parameters()), adamw(model.parameters())
    optimizer = ssdtrain.offload_optimizer(optimizer, tmp_path, POLICY)
    train(plain, expected, 2)
    train(model, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    loss(model).backward()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    optimizer.zero_grad()
    check_same(train(model, optimizer, 2, first=2), train(plain, expected, 2, first=2))
    check_same(values(model), values(plain))
    optimizer.close()  # type: ignore[attr-defined]


def test_options_may_change_after_the_step(tmp_path: Path) -> None:
    plain, model = model_of("mlp"), model_of("mlp")
    expected, optimizer = adamw(plain.parameters()), adamw(model.parameters())
    optimizer = ssdtrain.offload_optimizer(optimizer, tmp_path, POLICY)
    schedulers = [torch.optim.lr_scheduler.StepLR(each, 1, 0.5) for each in (expected, optimizer)]
    for first in range(3):
        check_same(train(model, optimizer, 1, first=first), train(plain, expected, 1, first=first))
        for scheduler in schedulers:
            scheduler.step()
    check_same(values(model), values(plain))
    optimizer.close()  # type: ignore[attr-defined]


def loss(model: nn.Module) -> torch.Tensor:
    inputs = torch.randn(4, next(iter(model.parameters())).shape[1], generator=torch.Generator().manual_seed(9))
    found = model(inputs)
    assert isinstance(found, torch.Tensor)
    return found.square().mean()
