"""What an integration may ask of an offload: stay open between micro-batches, know weights, leave storages alone."""

from __future__ import annotations

from typing import Any

import inside
import pytest
import torch
from conftest import MakeOffload, same_bits, send


class Refill(torch.autograd.Function):
    """Makes a tensor whose storage its maker will empty and fill again, as output-discarding checkpoints do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * 2


class PassThrough(torch.autograd.Function):
    """Returns its input, as tensor-parallel regions do: autograd makes a view of it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def refilled(x: torch.Tensor, *, is_sent: bool) -> torch.Tensor:
    """A gradient through a tensor that is emptied after forward and refilled before it is used in backward."""
    made = Refill.apply(x)
    bytes_ = made.detach().clone().untyped_storage()
    out = (PassThrough.apply(made).square() + made.t().square().t()).sin()
    if is_sent:
        send()
    made.untyped_storage().resize_(0)

    def refill(_: torch.Tensor) -> None:
        made.untyped_storage().resize_(bytes_.nbytes())
        made.untyped_storage().copy_(bytes_)

    out.register_hook(refill)
    (grad,) = torch.autograd.grad(out.sum(), x)
    return grad


@pytest.mark.cpu_only  # simulated memory cannot be resized
def test_what_its_owner_refills_is_left_alone(make_offload: MakeOffload) -> None:
    """The owner frees the memory right after forward: a copy under way then would read freed memory."""
    offload = make_offload()
    offload.leave_alone({"RefillBackward"})
    x = torch.randn(64, 64, requires_grad=True)
    expected = refilled(x, is_sent=False)
    with offload:
        assert same_bits(refilled(x, is_sent=True), expected)
    assert offload.stats.skipped["refilled by its owner"].count == 2, "through a function, and transposed"


@pytest.mark.cpu_only  # simulated memory cannot be resized
def test_emptied_before_it_was_sent(make_offload: MakeOffload) -> None:
    """A storage freed behind autograd's back while its record waited is not offloaded: there is nothing to copy."""
    offload = make_offload()
    x = torch.randn(64, 64, requires_grad=True)
    with offload:
        made = x.exp()
        bytes_ = made.detach().clone().untyped_storage()
        made.untyped_storage().resize_(0)
        send()
        made.untyped_storage().resize_(bytes_.nbytes()).copy_(bytes_)
        made.sum().backward()
    assert same_bits(x.grad, x.detach().exp())


def test_stays_open_between_contexts(make_offload: MakeOffload) -> None:
    """Entering once per micro-batch opens one engine, not one each time."""
    offload = make_offload()
    offload.keep_open()
    engines = set()
    for _ in range(3):
        with offload:
            out = torch.randn(64, 64, requires_grad=True).exp()
            send()
        out.sum().backward()
        del out
        assert inside.transport(offload) is not None, "open although nothing is left"
        engines.add(id(inside.transport(offload)))
    assert len(engines) == 1


def test_marked_tensors_stay(make_offload: MakeOffload) -> None:
    """Buffers that are no parameters of any module, such as one that holds all gradients, are known once marked."""
    buffer = torch.randn(2, 64, 64)
    for is_marked in (False, True):
        offload = make_offload()
        if is_marked:
            offload.mark_weights([buffer[0]])
        x = torch.randn((), requires_grad=True)
        with offload:
            out = x * buffer[1]
            send()
        assert ("weight" in offload.stats.skipped) == is_marked
        out.sum().backward()
        assert same_bits(x.grad, buffer[1].sum())
