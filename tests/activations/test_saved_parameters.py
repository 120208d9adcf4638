"""A saved parameter is kept as itself; contexts that are entered often keep their engine: what integrations need."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from conftest import EAGER, MakeOffload, assert_same
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.multiprocessing.reductions import StorageWeakRef

import ssdtrain

WIDTH = 64


class Saves(torch.autograd.Function):
    """Saves what it is given and tells backward what came back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        weight = gathered(weight)
        return grad @ weight.t(), x.t() @ grad if ctx.needs_input_grad[1] else None


def gathered(weight: torch.Tensor) -> torch.Tensor:
    """As ZeRO-3's linear does: a parameter that is seen to be empty is gathered first."""
    whole = getattr(weight, "whole", None)
    return weight if weight.numel() or whole is None else whole


@pytest.mark.parametrize("min_nbytes", [0, 1 << 30], ids=["large", "small"])
def test_a_parameter_given_other_data_frees_the_old(make_offload: MakeOffload, min_nbytes: int) -> None:
    """ZeRO-3 frees a parameter between forward and backward by giving it empty data.

    An alias of the saved parameter would keep the old memory, which several parameters share, until backward.
    """
    offload = make_offload(min_nbytes=min_nbytes)
    weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    expected = weight.detach().clone()
    x = torch.randn(4, WIDTH)
    with offload:
        loss = Saves.apply(x, weight).sum()
    old = StorageWeakRef(weight.untyped_storage())
    weight.data = torch.empty(0)
    assert old.expired()
    weight.data = expected
    loss.backward()
    assert weight.grad is not None and torch.equal(weight.grad, x.t() @ torch.ones(4, WIDTH))


def test_a_frozen_parameter_comes_back_itself(offload: ssdtrain.ActivationOffload) -> None:
    """Its attributes say that it has to be gathered; PyTorch hands on what unpack returns where no gradient is due."""

    def run(send: Any) -> torch.Tensor | None:
        torch.manual_seed(3)
        weight = nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False)
        x = torch.randn(4, WIDTH, requires_grad=True)
        loss = Saves.apply(x, weight).square().sum()
        weight.whole = 2 * weight.data  # type: ignore[attr-defined]  not what was saved, to tell them apart
        weight.data = torch.empty(0)
        send()
        loss.backward()
        return x.grad

    assert_same(run, offload, is_offloaded=None)


def test_marked_weights_stay(make_offload: MakeOffload) -> None:
    """A detached alias of a weight is known by its storage alone."""
    for is_marked in (False, True):
        offload = make_offload(min_nbytes=4 * WIDTH * WIDTH)
        weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        if is_marked:
            offload.mark_weights([weight])
        with offload:
            loss = (torch.randn(4, WIDTH, requires_grad=True) @ weight.detach()).exp().sum()
            stats = offload.stats
        assert ("weight" in stats.skipped) == is_marked
        del loss


def test_innermost(make_offload: MakeOffload) -> None:
    outer, inner = make_offload(), make_offload()
    assert not outer.is_innermost
    with outer:
        assert outer.is_innermost
        with inner:
            assert inner.is_innermost and not outer.is_innermost
        with save_on_cpu():
            assert not outer.is_innermost
        assert outer.is_innermost
    assert not outer.is_innermost


def test_an_offload_kept_open_has_its_spill_file_between_contexts(tmp_path: Path) -> None:
    """Else the file is there for the next context, and empty."""

    def sizes() -> list[int]:
        links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
        ours = [link for link in links if os.path.islink(link) and os.readlink(link).startswith(str(tmp_path))]
        return [os.stat(link).st_size for link in ours]

    for is_kept in (False, True):
        offload = ssdtrain.offload_activations(tmp_path, policy=EAGER)
        if is_kept:
            offload.keep_open()
        with offload:
            torch.zeros(8, requires_grad=True).exp().sum().backward()
        inside.source(offload).settle()
        assert len(sizes()) == 1 and (sizes()[0] > 0) == is_kept
        offload.close()
        assert sizes() == []


def test_notes_are_fallbacks(make_offload: MakeOffload, caplog: pytest.LogCaptureFixture) -> None:
    offload = make_offload()
    offload.note("something to know")
    offload.note("something to know")
    assert offload.stats.fallbacks == ("something to know",)
    assert caplog.text.count("something to know") == 1
    assert not offload.is_busy
