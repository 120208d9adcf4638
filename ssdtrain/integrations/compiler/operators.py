"""Operators of compiled graphs that stand where autograd would call hooks: `offload`, `reload`, `wait_tensor`.

    handle = torch.ops.ssdtrain.offload(tensor)  # forward: the trip begins
    other = torch.ops.ssdtrain.again(handle)  # of the same, where the compiler has a place for each
    handle = torch.ops.ssdtrain.reload(handle)  # backward: a prefetch begins
    tensor = torch.ops.ssdtrain.wait_tensor(handle, size, stride, dtype=dtype, device=device)

Knows the offload context that takes what is saved in a thread, and nothing of graphs.

[Note: handles]
Graphs pass tensors. A handle is one without elements, whose memory is a buffer of ours that holds what was saved: when
autograd lets go of the handle, the buffer goes, and with it the record. The number in the buffer finds it again, also
from an alias of the handle, as a checkpoint makes of what it computes again. No number comes twice.

[Note: functional operators]
No operator changes or aliases what it is given as far as the compiler is told, which may move them as data allows.

[Note: the last time]
A backward that keeps no graph asks for each tensor once. What never left is let go of when it is handed out: its memory
is free after its last use rather than when the whole graph is over, as what a reload brought is anyway. Where it is
asked for again, or others have a part of it, memory that the graph may write to (`may_change`) is a copy.

[Note: version counters]
Below autograd, where compiled graphs run, an alias has a version counter of its own. Hooks need aliases that share it.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.autograd.graph import save_on_cpu

from ssdtrain.activations.hooks import Saved
from ssdtrain.activations.offload import ActivationOffload, innermost_offload
from ssdtrain.store.identity import view_of, view_spec
from ssdtrain.store.record import Handle
from ssdtrain.store.saved_tensors import innermost_hooks

_NUMBER = struct.Struct("q")
_COPIED = (
    "Expected a handle that ssdtrain::offload returned in forward, got a copy of one: saved-tensor hooks that copy, as "
    "those of torch.autograd.graph.save_on_cpu, were entered inside the offload context, or without one round the "
    "compiled model. Leave them out, or compile with another backend"
)


class SavedValue(bytearray):
    """The memory of a handle, which owns what was saved."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """Has the context that takes what is saved in this thread take `tensor`; without one it stays as it is."""
        super().__init__(_NUMBER.pack(number := next(_NUMBERS)))
        self.offload: ActivationOffload | None = innermost_offload()
        with _shared_versions():
            self.saved: Saved | torch.Tensor | None = tensor if self.offload is None else self.offload.save(tensor)
        _LIVE[number] = self

    def handle(self) -> torch.Tensor:
        """A tensor that keeps this alive."""
        storage = torch.frombuffer(self, dtype=torch.uint8).untyped_storage()
        return torch.empty(0, dtype=torch.int64, device="cpu").set_(storage, 0, (0,), (1,))

    @staticmethod
    def of(handle: torch.Tensor) -> SavedValue:
        """What a handle, or an alias of one, stands for.

        Raises:
            RuntimeError: it is a copy.
        """
        storage = handle.untyped_storage()
        if storage.nbytes() == _NUMBER.size and storage.device.type == "cpu":
            number = int(torch.empty(0, dtype=torch.int64, device="cpu").set_(storage, 0, (1,), (1,)).item())
        else:
            number = 0  # nobody's
        value = _LIVE.get(number)
        if value is None:
            raise RuntimeError(_COPIED)
        return value

    def prefetch(self) -> None:
        """Begins a reload, if there is room."""
        if isinstance(self.saved, Handle) and self.offload is not None:
            self.offload.prefetch(self.saved)

    def tensor(self, *, may_change: bool) -> torch.Tensor:
        """What was saved, when it is there, in the order of the current stream; see [Note: the last time]."""
        saved, is_last = self.saved, not torch._C._autograd._get_current_graph_task_keep_graph()
        assert saved is not None
        if isinstance(saved, torch.Tensor):
            tensor = saved
        else:
            assert self.offload is not None
            with _shared_versions():
                tensor = self.offload.reload(saved)
        record = saved.record if isinstance(saved, Handle) else None
        if may_change and (not is_last or (record is not None and record.num_handles > 1)):
            tensor = view_of(tensor.untyped_storage().clone(), view_spec(tensor))
        if is_last and (record is None or record.storage is not None):
            self.saved = None
            if record is not None:
                record.is_handed_over = True
        return tensor


def _shared_versions() -> AbstractContextManager[None]:
    """See [Note: version counters]."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False)


_NUMBERS = itertools.count(1)
_LIVE: WeakValueDictionary[int, SavedValue] = WeakValueDictionary()


def offload(tensor: torch.Tensor) -> torch.Tensor:
    """The handle of a tensor whose trip begins, if this thread is in an offload context.

    Raises:
        RuntimeError: the handle would be copied by the hooks that it is for.
    """
    hooks = innermost_hooks()
    if hooks is not None and getattr(hooks[0], "__qualname__", "").startswith(f"{save_on_cpu.__qualname__}."):
        raise RuntimeError(_COPIED)
    return SavedValue(tensor).handle()


def reload(handle: torch.Tensor) -> torch.Tensor:
    """Another handle of the same; its bytes begin to come back, if there is room for them yet."""
    value = SavedValue.of(handle)
    value.prefetch()
    return value.handle()


def again(handle: torch.Tensor) -> torch.Tensor:
    """Another handle of the same."""
    return SavedValue.of(handle).handle()


def wait_tensor(
    handle: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    may_change: bool = False,
) -> torch.Tensor:
    """What `offload` was given, in the order of the current stream; the other arguments are for the compiler."""
    return SavedValue.of(handle).tensor(may_change=may_change)


def _fake_handle(_: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.int64, device="cpu")


def _fake_tensor(
    handle: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    may_change: bool = False,
) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.cudagraph_unsafe)
_LIBRARY = torch.library.Library("ssdtrain", "DEF")


def _register(name: str, schema: str, call: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor]) -> Any:
    _LIBRARY.define(f"{name}{schema} -> Tensor", tags=_TAGS)
    _LIBRARY.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ssdtrain::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.ssdtrain, name).default


OFFLOAD = _register("offload", "(Tensor tensor)", offload, _fake_handle)
RELOAD = _register("reload", "(Tensor handle)", reload, _fake_handle)
AGAIN = _register("again", "(Tensor handle)", again, _fake_handle)
WAIT_TENSOR = _register(
    "wait_tensor",
    "(Tensor handle, SymInt[] size, SymInt[] stride, *, ScalarType dtype, Device device, bool may_change=False)",
    wait_tensor,
    _fake_tensor,
)
