"""A gradient on the drive: where its bytes are, and how they are to be changed when they are read.

Knows the store; not who looks at the gradient, and not optimizers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map, tree_map_only

from ssdtrain.devices.base import Device
from ssdtrain.store.identity import view_of, view_spec, whole
from ssdtrain.store.pending import PendingRead
from ssdtrain.store.record import Record
from ssdtrain.store.state_store import StateStore

ITSELF = object()
"""Stands for the gradient among the arguments of a change."""

_MAX_CHANGES = 8


class Change(NamedTuple):
    """An operator that has yet to change a gradient, which `ITSELF` stands for among its arguments."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any

    def apply(self, grad: torch.Tensor) -> None:
        """Changes a gradient in memory."""
        args, kwargs = tree_map(lambda value: grad if value is ITSELF else value, (self.args, self.kwargs))
        self.function(*args, **kwargs)


class GradientRecord:
    """One gradient: where its bytes are, and how they are to be changed."""

    def __init__(self, store: StateStore, name: str, grad: torch.Tensor, device: Device) -> None:
        """Begins to write `grad`."""
        self.record = Record(f"grad of {name}")
        self.changes: list[Change] = []
        self._norm: torch.Tensor | None = None  # of the bytes that were written
        self._store, self._device = store, device
        self._pending: PendingRead | None = None
        self._here: torch.Tensor | None = None  # in memory until it is dropped
        self._empty = torch.empty(0, dtype=grad.dtype, device=grad.device)
        self.spec = view_spec(grad)
        self.store(grad)

    @property
    def is_away(self) -> bool:
        """Whether it has to be read."""
        return self._here is None and self.record.storage is None

    def store(self, grad: torch.Tensor) -> None:
        """Begins to write `grad`, in the place of the bytes that were written before."""
        if grad is self._here:
            return
        self._norm = torch.linalg.vector_norm(grad)
        source = whole(grad)
        self.spec, self._pending, self.changes = view_spec(source), None, []
        self._store.write(self.record, source.untyped_storage(), self._device)

    def prefetch(self, device: Device | None = None) -> int:
        """Begins to read it, to where it came from or to another device; how many reads."""
        to = device or self._device
        if self._here is not None or (self._pending is not None and self._pending.device is to):
            return 0
        self._pending = self._store.read(self.record, to)
        return int(self._pending.has_left)

    def load(self) -> torch.Tensor:
        """All of it in memory, which is the caller's, or shared by all callers while it stays there.

        Raises:
            StateLostError: the drive does not have it any more.
        """
        if self._here is not None:
            return self._here
        grad, is_shared = self._read(self._device)
        for change in self.changes:
            change.apply(grad)
        if is_shared:
            self._stay(grad)
        return grad

    def load_to(self, host: Device) -> torch.Tensor:
        """All of it in host memory, without its changes; the caller's. In any thread.

        Raises:
            StateLostError: the drive does not have it any more.
        """
        grad, is_shared = self._read(host)
        return grad.to("cpu", copy=is_shared)  # one that could not even be copied from its device is still there

    def hold(self) -> torch.Tensor:
        """Has it in memory until it is dropped."""
        if self._here is None:
            self._stay(self.load())
        assert self._here is not None
        return self._here

    def hand_out(self) -> torch.Tensor:
        """Has it in memory for somebody who may read and write it at any time."""
        if self._here is None:
            self._store.note("gradients of which a view or the memory is used stay in memory until they are dropped")
        return self.hold()

    def _read(self, device: Device) -> tuple[torch.Tensor, bool]:
        self.prefetch(device)
        pending, self._pending = self._pending, None
        assert pending is not None
        return view_of(self._store.wait(pending), self.spec), not pending.has_left

    def _stay(self, grad: torch.Tensor) -> None:
        self._here, self.changes = grad, []
        self._store.release(self.record)

    def like(self) -> dict[str, Any]:
        """Size, strides, dtype and device of a tensor that stands for it."""
        spec = self.spec
        return {"size": spec.size, "strides": spec.stride, "dtype": spec.dtype, "device": self._empty.device}

    def replace(self, grad: torch.Tensor) -> None:
        """Begins to write what an operator has changed.

        Raises:
            RuntimeError: it looks otherwise than before.
        """
        if view_spec(grad)[:3] != self.spec[:3]:
            raise RuntimeError(
                f"Expected {self.record.name} as {self.spec}, got {view_spec(grad)}: set parameter.grad to another "
                "tensor"
            )
        self.store(grad)

    def in_place_of(self, grad: torch.Tensor) -> GradientRecord:
        """That of another gradient, which stays in memory."""
        found = copy.copy(self)
        found.record, found.spec, found.changes, found._pending = Record(self.record.name), view_spec(grad), [], None
        found._here, found._empty = grad, grad.new_empty(0)
        return found

    def known_norm(self) -> torch.Tensor | None:
        """Its 2-norm, if that was computed before."""
        return None if self._norm is None or self.changes or self._here is not None else self._norm.clone()

    def change(self, change: Change) -> None:
        """Changes it when it is read; here and now it raises what the operator raises.

        What the operator is given may change later: this keeps copies.
        """
        if self._here is not None:
            change.apply(self._here)
            return
        change.apply(self._empty)
        self.changes.append(tree_map_only(torch.Tensor, torch.clone, change))
        if len(self.changes) > _MAX_CHANGES:
            self.store(self.load())
