"""A saved tensor comes back as well aligned as it was: a library may choose its kernel by that, and round otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import MakeOffload, send

_NBYTES = 64  # what PyTorch aligns host memory to, and more than any vector instruction asks for


class Aligned(torch.autograd.Function):
    """Saves a tensor and notes where it lies in forward and in backward."""

    seen: list[int] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        Aligned.seen.append(x.data_ptr() % _NBYTES)
        return weight * x.sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        Aligned.seen.append(x.data_ptr() % _NBYTES)
        return grad * x.sum(), None


@pytest.mark.parametrize("offset", [0, 4, 8, 1000, 1012])
@pytest.mark.parametrize("is_view", [True, False])
def test_a_view_that_is_offloaded_alone_keeps_its_alignment(
    make_offload: MakeOffload, offset: int, is_view: bool
) -> None:
    """Its record began at a multiple of 16 bytes, and came back at a multiple of 512."""
    offload = make_offload()
    Aligned.seen.clear()
    base = torch.linspace(0, 1, 4096)
    part = base[offset : offset + 40]
    if not is_view:
        part = part.data  # no version counter in common with its base
    weight = torch.ones((), requires_grad=True)
    expected = part.sum().item()
    with offload:
        loss = Aligned.apply(weight, part)
        del part, base
        send()
    loss.backward()
    assert weight.grad is not None and weight.grad.item() == expected
    assert offload.stats.num_offloaded > 0
    assert Aligned.seen[0] == Aligned.seen[1] == offset * 4 % _NBYTES
