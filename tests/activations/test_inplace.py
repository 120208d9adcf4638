"""In-place changes of saved tensors: refused where autograd refuses them, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import MakeOffload, Send, assert_same, assert_same_error, gauges
from torch import nn
from torch.autograd.function import once_differentiable

import ssdtrain

Offload = ssdtrain.ActivationOffload

MODIFIED = "one of the variables needed for gradient computation has been modified by an inplace operation"


def change_saved(leaf: torch.Tensor, base: torch.Tensor, view: torch.Tensor, output: torch.Tensor) -> None:
    view.mul_(2)


def change_base(leaf: torch.Tensor, base: torch.Tensor, view: torch.Tensor, output: torch.Tensor) -> None:
    base.mul_(2)


def change_sibling(leaf: torch.Tensor, base: torch.Tensor, view: torch.Tensor, output: torch.Tensor) -> None:
    """Touches no saved byte; autograd counts versions per storage and refuses all the same."""
    base[:1].add_(1)


def change_detached(leaf: torch.Tensor, base: torch.Tensor, view: torch.Tensor, output: torch.Tensor) -> None:
    view.detach().mul_(2)


def change_without_grad(leaf: torch.Tensor, base: torch.Tensor, view: torch.Tensor, output: torch.Tensor) -> None:
    with torch.no_grad():
        leaf.mul_(2)


def change_leaf_view(leaf: torch.Tensor, base: torch.Tensor, view: torch.Tensor, output: torch.Tensor) -> None:
    with torch.no_grad():
        leaf[2:].mul_(2)


def change_output(leaf: torch.Tensor, base: torch.Tensor, view: torch.Tensor, output: torch.Tensor) -> None:
    output.mul_(2)


def change_through_out(leaf: torch.Tensor, base: torch.Tensor, view: torch.Tensor, output: torch.Tensor) -> None:
    torch.mul(view.detach(), 2, out=view.detach())


def change_untracked(leaf: torch.Tensor, base: torch.Tensor, view: torch.Tensor, output: torch.Tensor) -> None:
    """`.data` has a version of its own: autograd sees nothing and uses the changed bytes, and so do we."""
    view.data.mul_(2)


def change_nothing_saved(leaf: torch.Tensor, base: torch.Tensor, view: torch.Tensor, output: torch.Tensor) -> None:
    view.clone().mul_(2)


CHANGES = [
    change_saved,
    change_base,
    change_sibling,
    change_detached,
    change_without_grad,
    change_leaf_view,
    change_output,
    change_through_out,
    change_untracked,
    change_nothing_saved,
]


@pytest.mark.parametrize("when", ["at once", "on the drive"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_inplace_change_after_save(offload: Offload, change: Callable[..., None], when: str) -> None:
    """PyTorch stops checking versions of saved tensors that went through hooks: gradients are then silently wrong."""

    def run(send: Send) -> Any:
        leaf = torch.randn(8, requires_grad=True)
        base = leaf * leaf
        view = base[2:]
        output = view.sin().exp()
        if when == "at once":
            change(leaf, base, view, output)
            send()
        else:
            send()
            change(leaf, base, view, output)
        output.sum().backward()
        return leaf.grad

    if change in (change_untracked, change_nothing_saved):
        assert_same(run, offload, is_offloaded=None)
    else:
        assert_same_error(run, offload, MODIFIED)


def test_inplace_change_after_the_memory_is_gone(offload: Offload) -> None:
    """The source died long ago, but an alias with other memory still counts versions with it: still an error."""

    def run(send: Send) -> Any:
        leaf = torch.randn(8, requires_grad=True)
        saved = leaf * 2
        output = saved.sin() * 3
        alias = saved.detach()
        alias.data = torch.zeros(8)
        del saved
        send()
        alias.add_(1)
        output.sum().backward()
        return leaf.grad

    assert_same_error(run, offload, MODIFIED)
    assert offload.stats.written_nbytes > 0


def test_inplace_change_before_the_save_that_is_used(offload: Offload) -> None:
    """Legal: the graph of the old version is never walked, and the new version is another record of one storage."""

    def run(send: Send) -> Any:
        leaf = torch.randn(8, requires_grad=True)
        hidden = leaf * 1
        unused = hidden.sin()
        send()
        with torch.no_grad():
            hidden.mul_(3)
        output = hidden.cos().sum()
        del hidden
        send()
        output.backward()
        del unused
        return leaf.grad

    assert_same(run, offload)


class ScaleInBackward(torch.autograd.Function):
    """Writes into what it saved, in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.mul_(2)


@pytest.mark.parametrize("is_held", [False, True], ids=["dropped", "held"])
def test_inplace_change_in_backward_and_again(offload: Offload, is_held: bool) -> None:
    """A backward that writes into its saved tensor works once; autograd refuses the second time. Wrong would be to
    hand out the overwritten bytes, from memory that is still shared, as if they were the saved ones."""

    def run(send: Send) -> Any:
        leaf = torch.randn(8, requires_grad=True)
        hidden = leaf * 1
        output = ScaleInBackward.apply(hidden).sum()
        held = hidden if is_held else None
        del hidden
        send()
        output.backward(retain_graph=True)
        output.backward()
        del held
        return leaf.grad

    assert_same_error(run, offload, MODIFIED)
    gauges(offload)  # with an accelerator a read counts when its copy is over
    assert (offload.stats.read_nbytes > 0) != is_held, str(offload.stats)


def test_inplace_change_in_backward_of_a_shared_storage(offload: Offload) -> None:
    """Two nodes saved one storage and share it again after the reload: what one writes, the other must refuse."""

    def run(send: Send) -> Any:
        leaf = torch.randn(8, requires_grad=True)
        hidden = leaf * 1
        early = hidden.sin()
        output = (ScaleInBackward.apply(hidden) + early).sum()
        del hidden, early
        send()
        output.backward()
        return leaf.grad

    assert_same_error(run, offload, MODIFIED)


@pytest.mark.parametrize("staging_nbytes", [64 * 1024, 16 << 20], ids=["in many slabs", "at once"])
def test_an_operator_that_saves_before_it_fills(make_offload: MakeOffload, staging_nbytes: int) -> None:
    """`rrelu` saves its noise, then draws it, and never bumps a version: a store that starts in the pack hook writes
    what was in the memory before."""

    def run(send: Send) -> Any:
        leaf = torch.randn(1 << 20, requires_grad=True)
        output = nn.functional.rrelu(leaf * 1, training=True) * 2
        send()
        output.sum().backward()
        return leaf.grad

    offload = make_offload(staging_nbytes=staging_nbytes)
    assert_same(run, offload, is_offloaded=None)  # from a slab is as good
    assert offload.stats.offloaded_nbytes >= 8 << 20
