"""The operators of compiled graphs, called by hand: handles, their life, and who takes what is saved."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from conftest import MakeOffload, gauges, same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

import ssdtrain
from ssdtrain.devices.simulated import SimulatedDevice
from ssdtrain.integrations.compiler import operators
from ssdtrain.integrations.compiler.operators import OFFLOAD, RELOAD, WAIT_TENSOR


class Operators:
    """What compiled graphs call. The simulated accelerator would take an operator for a kernel: it gets functions."""

    def __init__(self, device: SimulatedDevice | None) -> None:
        self.offload: Any = OFFLOAD if device is None else operators.offload
        self.reload: Any = RELOAD if device is None else operators.reload
        self._wait: Any = WAIT_TENSOR if device is None else operators.wait_tensor

    def wait(self, handle: torch.Tensor, like: torch.Tensor, **options: bool) -> Any:
        return self._wait(handle, like.size(), like.stride(), dtype=like.dtype, device=like.device, **options)


@pytest.fixture
def ops(device: SimulatedDevice | None) -> Operators:
    return Operators(device)


def make(*size: int) -> torch.Tensor:
    """More than a slab, which waits for no company."""
    return torch.randn(*(size or (64, 128)))


def settle(offload: ssdtrain.ActivationOffload) -> Any:
    """What it did when everything that was begun is over, on an accelerator too."""
    torch.ones(()).item()
    gauges(offload)
    return offload.stats


def test_a_trip_begins_at_once(offload: ssdtrain.ActivationOffload, ops: Operators) -> None:
    """No operator of autograd's follows that would tell that the saving one is over."""
    tensor = make()
    expected = tensor.clone()
    with offload:
        handle = ops.offload(tensor)
        del tensor
        assert settle(offload).offloaded_nbytes == expected.nbytes
        assert handle.numel() == 0 and handle.dtype is torch.int64 and handle.device.type == "cpu"
    assert gauges(offload) == (0, 0, expected.nbytes)
    assert same_bits(ops.wait(handle, expected), expected)
    assert settle(offload).read_nbytes == expected.nbytes


@pytest.mark.parametrize("shape", ["transposed", "part", "strided", "float64"])
def test_what_comes_back_is_as_it_was(offload: ssdtrain.ActivationOffload, shape: str, ops: Operators) -> None:
    tensor = {
        "transposed": lambda: make().t(),
        "part": lambda: make()[3:61],
        "strided": lambda: make()[:, ::2],
        "float64": lambda: make().double(),
    }[shape]()
    expected = tensor.clone()
    stride = tensor.stride()
    with offload:
        handle = ops.offload(tensor)
    del tensor
    settle(offload)
    back = ops.wait(handle, expected)
    assert same_bits(back, expected) and back.stride() == stride
    assert settle(offload).read_nbytes > 0


def test_a_reload_begins_before_it_is_waited_for(offload: ssdtrain.ActivationOffload, ops: Operators) -> None:
    tensor = make()
    expected = tensor.clone()
    with offload:
        handle = ops.offload(tensor)
    del tensor
    settle(offload)
    handle = ops.reload(handle)
    assert offload.stats.num_prefetched == 1
    assert same_bits(ops.wait(handle, expected), expected)
    assert offload.stats.num_demand_reloads == 0


def test_bytes_are_kept_as_long_as_a_handle(offload: ssdtrain.ActivationOffload, ops: Operators) -> None:
    """Or an alias of it, as a checkpoint makes of what it saves when it computes again."""
    tensor = make()
    with offload:
        handle = ops.offload(tensor)
    settle(offload)
    alias, again = handle.detach(), ops.reload(handle)
    del handle
    assert offload.stats.num_live_records == 1
    del again
    assert offload.stats.num_live_records == 1
    assert same_bits(ops.wait(alias, tensor), tensor)
    del alias
    assert offload.stats.num_live_records == 0


def test_it_comes_back_as_often_as_it_is_asked_for(offload: ssdtrain.ActivationOffload, ops: Operators) -> None:
    tensor = make()
    expected = tensor.clone()
    with offload:
        handle = ops.offload(tensor)
    del tensor
    settle(offload)
    assert all(same_bits(ops.wait(handle, expected), expected) for _ in range(3))


@pytest.mark.parametrize("is_sent", [False, True])
def test_memory_that_a_graph_writes_to(make_offload: MakeOffload, ops: Operators, is_sent: bool) -> None:
    """Outside of a backward that drops its graph it is a copy, with the same strides."""
    tensor = torch.randn(128, 64).t()
    offload = make_offload() if is_sent else make_offload(min_nbytes="1MiB")
    expected = tensor.clone()
    with offload:
        handles = [ops.offload(tensor), ops.offload(tensor)]
    del tensor
    for handle in (*handles, *handles):
        back = ops.wait(handle, expected, may_change=True)
        assert same_bits(back, expected) and back.stride() == expected.stride()
        back.zero_()


class Others:
    """Hooks of somebody else, entered inside the offload context; they keep the very object."""

    def __enter__(self) -> None:
        torch._C._autograd._push_saved_tensors_default_hooks(lambda tensor: tensor, lambda tensor: tensor)

    def __exit__(self, *_: object) -> None:
        torch._C._autograd._pop_saved_tensors_default_hooks()


@pytest.mark.parametrize("inner", [ssdtrain.keep_resident, Others])
def test_under_hooks_of_others_a_tensor_stays(offload: ssdtrain.ActivationOffload, inner: Any, ops: Operators) -> None:
    tensor = make()
    with offload, inner():
        handle = ops.reload(ops.offload(tensor))
    assert ops.wait(handle, tensor).data_ptr() == tensor.data_ptr()
    assert offload.stats.num_saved == 0


def test_without_a_context_a_tensor_stays(ops: Operators) -> None:
    tensor = make()
    assert ops.wait(ops.reload(ops.offload(tensor)), tensor) is tensor


def test_what_is_small_stays(make_offload: MakeOffload, ops: Operators) -> None:
    tensor, offload = make(), make_offload(min_nbytes="1MiB")
    with offload:
        handle = ops.reload(ops.offload(tensor))
    assert same_bits(ops.wait(handle, tensor), tensor)
    assert offload.stats.offloaded_nbytes == 0 and offload.stats.skipped["smaller than min_nbytes"].count == 1
    del handle


def test_only_what_is_marked(make_offload: MakeOffload, ops: Operators) -> None:
    tensors, offload = (make(), make()), make_offload(only="marked")
    with offload:
        offload.mark(tensors[1])
        handles = [ops.offload(tensor) for tensor in tensors]
    assert settle(offload).offloaded_nbytes == tensors[1].nbytes
    assert all(same_bits(ops.wait(handle, tensor), tensor) for handle, tensor in zip(handles, tensors, strict=True))


def test_handles_are_not_offloaded(offload: ssdtrain.ActivationOffload, ops: Operators) -> None:
    """Autograd saves them with the hooks of the same context, whatever `min_nbytes` is."""

    class Save(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(ops.offload(x * 2))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            return grad * ops.wait(*ctx.saved_tensors, grad)

    x = make().requires_grad_()
    with offload:
        loss = Save.apply(x)
        settle(offload)
    loss.sum().backward()
    assert same_bits(x.grad, x.detach() * 2)
    assert offload.stats.offloaded_nbytes == x.nbytes == settle(offload).read_nbytes
    del loss


@pytest.mark.cpu_only  # an accelerator's copy out is under way meanwhile
def test_a_change_in_place_is_seen(offload: ssdtrain.ActivationOffload, ops: Operators) -> None:
    tensor = make()
    with offload:
        handle = ops.offload(tensor)
    tensor.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ops.wait(handle, tensor)
    del handle


def test_a_copy_of_a_handle_is_none(offload: ssdtrain.ActivationOffload, ops: Operators) -> None:
    tensor = make()
    with offload:
        handle = ops.offload(tensor)
    for other in (handle.clone(), torch.zeros(1, dtype=torch.int64), torch.zeros(3)):
        for call in (ops.reload, lambda other: ops.wait(other, tensor)):
            with pytest.raises(RuntimeError, match="got a copy of one"):
                call(other)
    del handle


@pytest.mark.parametrize("has_context", [False, True])
def test_hooks_that_copy_are_refused_in_forward(
    offload: ssdtrain.ActivationOffload, ops: Operators, has_context: bool
) -> None:
    """The error came in the first backward, far from what was to be left out."""
    tensor = make()
    with offload if has_context else contextlib.nullcontext(), torch.autograd.graph.save_on_cpu():
        with pytest.raises(RuntimeError, match=r"got a copy of one.*save_on_cpu"):
            ops.offload(tensor)


def test_after_close(make_offload: MakeOffload, ops: Operators) -> None:
    tensor, offload = make(), make_offload()
    with offload:
        handle = ops.offload(tensor)
    expected = tensor.clone()
    del tensor
    settle(offload)
    offload.close()
    with pytest.raises(RuntimeError, match="Expected an open offload for backward"):
        ops.wait(ops.reload(handle), expected)
    del handle


@pytest.mark.cpu_only
def test_shapes_without_memory(ops: Operators) -> None:
    """What the compiler asks."""
    with FakeTensorMode():
        tensor = torch.empty(4, 8).t()
        handle = ops.reload(ops.offload(tensor))
        back = ops.wait(handle, tensor)
    assert (handle.shape, handle.dtype) == ((0,), torch.int64)
    assert (back.shape, back.stride(), back.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)


def test_an_error_leaves_nothing(offload: ssdtrain.ActivationOffload, ops: Operators) -> None:
    with offload, contextlib.suppress(ZeroDivisionError):
        handle = ops.offload(make())
        raise ZeroDivisionError
    del handle
    assert offload.stats.num_live_records == 0
