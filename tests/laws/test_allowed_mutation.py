"""Inside `allow_mutation_on_saved_tensors` a saved tensor may be changed: as plain, whoever else has hooks on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from conftest import MakeOffload, grads_of, same_bits
from torch import nn
from torch.autograd.graph import allow_mutation_on_saved_tensors

import ssdtrain

pytestmark = pytest.mark.cpu_only

MODIFIED = "modified by an inplace operation"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.after = nn.Sequential(nn.GELU(), nn.Linear(32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(x)
        squares = hidden * hidden
        hidden.mul_(2)  # saved by the product
        return self.after(squares + hidden)


def train(model: nn.Module, inner: AbstractContextManager[Any]) -> list[Any]:
    torch.manual_seed(1)
    x = torch.randn(4, 32, requires_grad=True)
    with allow_mutation_on_saved_tensors():
        with inner:
            loss = model(x * 1).square().sum()
        loss.backward()
    return [loss, x.grad, *grads_of(model)]


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


@pytest.mark.parametrize("recompute", ["never", "all"])
def test_a_change_trains_as_plain(make_offload: MakeOffload, recompute: str) -> None:
    """Their hooks copy what they have packed before it changes; with ours in front they would see nothing of it."""
    expected = train(make(), nullcontext())
    model = make()
    offload = make_offload(model, recompute=recompute)
    assert same_bits(train(model, offload), expected)
    assert any("allow_mutation_on_saved_tensors" in text for text in offload.stats.fallbacks)
    with offload:  # outside of it changes are refused again, and things are offloaded
        assert offload.is_innermost
        loss = make()(torch.randn(4, 32)).sum()
        with pytest.raises(RuntimeError, match=MODIFIED):
            loss.backward()
    del loss


def test_keep_resident_allows_it_too() -> None:
    expected = train(make(), nullcontext())
    assert same_bits(train(make(), ssdtrain.keep_resident()), expected)


@pytest.mark.parametrize("enter", [lambda offload: offload, lambda offload: ssdtrain.keep_resident()])
def test_contexts_are_left_as_they_were_entered(make_offload: MakeOffload, enter: Callable[..., Any]) -> None:
    """Entered inside, left inside, and entered again where nothing is allowed."""
    offload = make_offload()
    context = enter(offload)
    with allow_mutation_on_saved_tensors():
        theirs = torch._C._autograd._top_saved_tensors_default_hooks(True)
        with context:
            x = torch.ones(64, requires_grad=True) * 1
            loss = (x * x).sum()
            x.zero_()
            loss.backward()
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) == theirs
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    with context:
        x = torch.ones(64, requires_grad=True) * 1
        loss = (x * x).sum()
        x.zero_()
        with pytest.raises(RuntimeError, match=MODIFIED):
            loss.backward()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_allowed_inside_the_context(make_offload: MakeOffload) -> None:
    """The other way round their hooks are in front, and what they keep stays in memory."""
    expected = train(make(), nullcontext())
    with make_offload():
        assert same_bits(train(make(), nullcontext()), expected)
