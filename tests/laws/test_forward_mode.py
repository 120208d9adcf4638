"""Forward-mode AD inside the context, and tensors that have a size and no memory: left alone, results as plain."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from conftest import same_bits, send
from torch import nn
from torch.autograd import forward_ad

import ssdtrain

pytestmark = [
    pytest.mark.cpu_only,  # what they are made of does not depend on the device
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # PyTorch's own forward-mode formulas
]

Offload = ssdtrain.ActivationOffload


def by_jvp(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    return y.square().sum() + tangent.square().sum()


def by_jvp_of_a_graph(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return by_jvp(model, x.requires_grad_() * 2)


def by_jacfwd(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.func.jacfwd(model)(x[0]).square().sum()


def by_dual_numbers(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.requires_grad_() * 1, torch.ones_like(x))
        y, tangent = forward_ad.unpack_dual(model(dual) * dual.exp())
        return y.square().sum() + tangent.square().sum()


@pytest.mark.parametrize("loss_of", [by_jvp, by_jvp_of_a_graph, by_jacfwd, by_dual_numbers])
def test_forward_mode_trains_as_plain(offload: Offload, loss_of: Callable[..., torch.Tensor]) -> None:
    """The tangent of what does not depend on the input is a zero tensor: autograd saves it, and it has no storage."""

    def run(context: AbstractContextManager[Any]) -> list[Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32), nn.Linear(32, 32))
        x = torch.randn(4, 32)
        with context:
            loss = loss_of(model, x)
            if context is offload:
                send()
            loss.backward()
        return [loss, x.grad, *[p.grad for p in model.parameters()]]

    expected = run(nullcontext())
    assert same_bits(run(offload), expected)
    stats = offload.stats
    assert stats.skipped["no memory of its own"].count > 0 and stats.num_offloaded > 0
    assert not stats.fallbacks, stats.fallbacks


def freed() -> torch.Tensor:
    tensor = torch.ones(64, 64)
    tensor.untyped_storage().resize_(0)
    return tensor


def cut_short() -> torch.Tensor:
    tensor = torch.ones(64, 64)
    tensor.untyped_storage().resize_(64)
    return tensor


def behind_a_null_pointer() -> torch.Tensor:
    device = torch.device("cpu")
    storage = torch._C._construct_storage_from_data_pointer(0, device, 64 * 64 * 4)
    return torch.empty(0).set_(storage, 0, (64, 64), (64, 1))


HOLLOW = {
    "zero": lambda: torch._efficientzerotensor((64, 64)),
    "a view of zeros": lambda: torch._efficientzerotensor((64, 64)).t()[3:],
    "functional": lambda: torch._to_functional_tensor(torch.ones(64, 64)),
    "freed": freed,
    "cut short": cut_short,
    "null": behind_a_null_pointer,
}


class Keep(torch.autograd.Function):
    """Saves a tensor and shows what came back."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, seen: list[Any], tensor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tensor)
        ctx.seen = seen
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.seen += ctx.saved_tensors
        return grad, None, None


@pytest.mark.parametrize("kind", HOLLOW)
@pytest.mark.parametrize("is_held", [True, False])
def test_a_size_without_memory_is_left_alone(offload: Offload, kind: str, is_held: bool) -> None:
    """A copy from there is a segmentation fault, or an error in the middle of the bookkeeping."""
    tensor, seen = HOLLOW[kind](), []
    expected = (tensor.size(), tensor.stride(), tensor._is_zerotensor(), torch._is_functional_tensor(tensor))
    with offload:
        output = Keep.apply(torch.zeros(1, requires_grad=True), seen, tensor)
        if not is_held:
            del tensor
        send()
        output.backward()
    (back,) = seen
    assert (back.size(), back.stride(), back._is_zerotensor(), torch._is_functional_tensor(back)) == expected
    assert offload.stats.skipped["no memory of its own"].count == 1
    assert not offload.stats.fallbacks


def test_a_gradient_through_zeros(offload: Offload) -> None:
    """Made by hand, without forward mode: `w * zeros` saves the zeros, and backward reads them."""

    def run() -> list[torch.Tensor | None]:
        w = torch.linspace(0, 1, 64).requires_grad_()
        loss = (w.exp() * torch._efficientzerotensor((64,))).sum() + (w * 2).square().sum()
        send()
        loss.backward()
        return [w.grad]

    expected = run()
    with offload:
        assert same_bits(run(), expected)
