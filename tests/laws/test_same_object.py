"""What autograd hands back is the object that was saved, wherever it is so without us.

Hooks let PyTorch make a new object of what requires grad, whatever they return; of all else it hands on what the unpack
hook gives. Quantised weights, caches and masks carry attributes that a custom backward reads or writes.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import inside
import pytest
import torch
from conftest import MakeOffload, Send, assert_same_error, send
from torch import nn

import ssdtrain

pytestmark = pytest.mark.cpu_only

Offload = ssdtrain.ActivationOffload


class Frozen(nn.Parameter):
    """A weight with more than its numbers, as quantisation libraries have them."""


class Tagged(torch.Tensor):
    """A subclass with nothing of its own."""


class Show(torch.autograd.Function):
    """Saves what it is given and shows in backward what came back."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, seen: list[Any], *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        ctx.seen = seen
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.seen.append(ctx.saved_tensors)
        return grad, None, *[None] * len(ctx.saved_tensors)


def buffer() -> torch.Tensor:
    module = nn.Module()
    module.register_buffer("table", torch.ones(64, 64))
    return module.table


KINDS: dict[str, Callable[[], torch.Tensor]] = {
    "frozen subclass of Parameter": lambda: Frozen(torch.ones(64, 64), requires_grad=False),
    "frozen Parameter": lambda: nn.Parameter(torch.ones(64, 64), requires_grad=False),
    "Buffer": lambda: nn.Buffer(torch.ones(64, 64)),
    "buffer": buffer,
    "integers": lambda: torch.ones(64, 64, dtype=torch.int8),
    "plain": lambda: torch.ones(64, 64),
    "view": lambda: torch.ones(64, 128)[:, 3:67],
    "subclass": lambda: torch.ones(64, 64).as_subclass(Tagged),
    "empty": lambda: torch.ones(0, 64),
    "sparse": lambda: torch.eye(64).to_sparse(),
    "meta": lambda: torch.ones(64, 64, device="meta"),
}
POLICIES = {"all leave": {}, "small stay": {"min_nbytes": 1 << 20}, "auto": {"mode": "auto"}}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_is_alive_comes_back_itself(make_offload: MakeOffload, kind: str, policy: str) -> None:
    """Also when its bytes are on the drive: nobody needs a second copy of them. Twice, for graphs that are kept."""
    offload, seen, tensor = make_offload(**POLICIES[policy]), [], KINDS[kind]()
    with offload:
        output = Show.apply(torch.zeros(1, requires_grad=True), seen, tensor)
        tensor.quant_state = state = object()
        send()
        output.backward(retain_graph=True)
        output.backward()
    assert [back is tensor for (back,) in seen] == [True, True]
    assert tensor.quant_state is state
    assert offload.stats.read_nbytes <= 5 * 4096, "what `send` saves"


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_survive_although_nobody_holds_the_tensor(offload: Offload, kind: str) -> None:
    """Only the graph holds it, as with a mask made on the way: what hangs on it is a part of what was saved."""
    seen: list[Any] = []
    with offload:
        tensor = KINDS[kind]()
        tensor.scale = 2.0
        output = Show.apply(torch.zeros(1, requires_grad=True), seen, tensor)
        del tensor
        send()
        output.backward()
    assert seen[0][0].scale == 2.0


class QuantisedLinear(torch.autograd.Function):
    """Reads and writes attributes of the weight in backward, as `bitsandbytes` and kin do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ (weight * weight.scale).t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        _, weight = ctx.saved_tensors
        weight.num_backwards = getattr(weight, "num_backwards", 0) + 1
        return grad @ (weight * weight.scale), None


@pytest.mark.parametrize("make", [Frozen, nn.Parameter, lambda data, requires_grad: data])
@pytest.mark.parametrize("min_nbytes", [0, 1 << 20])
def test_attributes_of_a_weight_are_read_and_written_in_backward(
    make_offload: MakeOffload, make: Callable[..., torch.Tensor], min_nbytes: int
) -> None:
    offload = make_offload(min_nbytes=min_nbytes)
    weight = make(torch.ones(64, 64), requires_grad=False)
    weight.scale = 2.0
    x = torch.randn(8, 64, requires_grad=True)
    with offload:
        for _ in range(3):
            loss = QuantisedLinear.apply(x * 1, weight).sum()
            send()
            loss.backward()
    assert weight.num_backwards == 3 and torch.equal(x.grad, torch.full_like(x, 3 * 128.0))


def test_keep_resident_hands_back_the_object(offload: Offload) -> None:
    seen, tensor = [], torch.ones(64, 64)
    with offload, ssdtrain.keep_resident():
        output = Show.apply(torch.zeros(1, requires_grad=True), seen, tensor)
        output.backward()
    assert seen[0][0] is tensor


def test_a_tensor_given_other_memory_is_not_what_was_saved(offload: Offload) -> None:
    """`.data = ...` is no change to autograd: what was offloaded comes back with the bytes that were saved."""
    seen, tensor = [], torch.ones(64, 64)
    with offload:
        output = Show.apply(torch.zeros(1, requires_grad=True), seen, tensor)
        send()
        tensor.data = torch.zeros(64, 64)
        output.backward()
    assert torch.equal(seen[0][0], torch.ones(64, 64))


def test_a_tensor_that_has_become_another_view_is_not_what_was_saved(offload: Offload) -> None:
    seen, tensor = [], torch.arange(4096.0)
    with offload:
        output = Show.apply(torch.zeros(1, requires_grad=True), seen, tensor)
        send()
        tensor.data = tensor.data[:64]
        output.backward()
    assert torch.equal(seen[0][0], torch.arange(4096.0))


def test_an_alive_tensor_that_was_changed_is_refused(offload: Offload) -> None:
    seen, tensor = [], torch.ones(64, 64)
    with offload:
        output = Show.apply(torch.zeros(1, requires_grad=True), seen, tensor)
        send()
        tensor.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()


def test_the_handle_keeps_nothing_alive(offload: Offload) -> None:
    """A tensor that is offloaded leaves memory although it would come back itself if somebody held it."""
    seen, tensor = [], torch.ones(64, 64)
    gone = weakref.ref(tensor)
    with offload:
        output = Show.apply(torch.zeros(1, requires_grad=True), seen, tensor)
        del tensor
        send()
        assert gone() is None
        output.backward()
    assert torch.equal(seen[0][0], torch.ones(64, 64))


@pytest.mark.parametrize("min_nbytes", [0, 1 << 20])
def test_no_cycles(make_offload: MakeOffload, min_nbytes: int) -> None:
    """An operator's own output, held by its node, would keep the graph until the next collection; so would a leaf
    only if it had a node."""
    offload = make_offload(min_nbytes=min_nbytes)
    gc.collect()
    gc.disable()
    try:
        with offload:
            leaf = torch.randn(64, 64, requires_grad=True)
            output = leaf.exp().sigmoid() * nn.Parameter(torch.ones(64), requires_grad=False)
            send()
            assert inside.counters(offload).held_nbytes > 0 or offload.stats.num_live_records > 0
            del output
            assert inside.counters(offload).held_nbytes == 0 and offload.stats.num_live_records == 0
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_change_of_a_saved_nested_tensor_is_named(offload: Offload) -> None:
    """A strided nested tensor has no sizes to print: the error about the change must not end in one about that."""

    def run(send: Send) -> None:
        nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], requires_grad=True) * 1
        product = nested * nested
        nested.mul_(2)
        torch.nested.to_padded_tensor(product, 0.0).sum().backward()

    assert_same_error(run, offload, "modified by an inplace operation")
