"""Counts the bytes that autograd keeps for the backward pass when nothing is offloaded: the demo's yardstick.

Each saved tensor becomes a handle that autograd owns, and a storage counts from its first live handle to its
last. Parameters and their views do not count: they are in memory anyway.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class SavedTensorCounter:
    """Hooks that leave every saved tensor alone and remember the most bytes alive at once.

    Example:
        >>> with SavedTensorCounter(model.parameters()) as counter:
        ...     model(tokens, targets).backward()
        >>> counter.peak_nbytes
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.peak_nbytes = 0
        self.live_nbytes = 0
        self._ignored = {_identity(parameter) for parameter in parameters}
        self._num_handles: dict[int, int] = {}
        self._hooks = saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> SavedTensorCounter:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> _Handle:
        return _Handle(tensor, self)

    def hold(self, tensor: Tensor) -> None:
        """Counts one more handle on the storage of `tensor`."""
        key = _identity(tensor)
        if key in self._ignored:
            return
        if key not in self._num_handles:
            self.live_nbytes += tensor.untyped_storage().nbytes()
            self.peak_nbytes = max(self.peak_nbytes, self.live_nbytes)
        self._num_handles[key] = self._num_handles.get(key, 0) + 1

    def let_go(self, tensor: Tensor) -> None:
        """Counts one handle fewer on the storage of `tensor`."""
        key = _identity(tensor)
        if key in self._ignored:
            return
        self._num_handles[key] -= 1
        if not self._num_handles[key]:
            del self._num_handles[key]
            self.live_nbytes -= tensor.untyped_storage().nbytes()


class _Handle:
    """What autograd holds in place of a saved tensor; it keeps the storage, and so its identity, alive."""

    def __init__(self, tensor: Tensor, counter: SavedTensorCounter) -> None:
        self.tensor = tensor
        self._counter = counter
        counter.hold(tensor)

    def __del__(self) -> None:
        self._counter.let_go(self.tensor)


def _unpack(handle: _Handle) -> Tensor:
    return handle.tensor


def _identity(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
