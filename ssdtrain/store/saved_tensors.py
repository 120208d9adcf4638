"""What the hooks need and no offload context: ranges of storages, in-place errors, hooks that leave everything alone.

Knows records and handles; moves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from ssdtrain.stats import Counters
from ssdtrain.store.record import Record, Resident

_ALIGNMENT = 16  # of the first byte of a record: a multiple of every element size
_WHOLE_STORAGE_FRACTION = 4  # a view of at least a quarter of its storage takes the whole storage along


def is_resized(record: Record) -> bool:
    """Whether the source was freed behind autograd's back: whoever did that refills it before backward."""
    return record.storage is not None and record.storage.nbytes() != record.storage_nbytes


def widen(span: tuple[int, int], base_nbytes: int) -> tuple[int, int]:
    """The range a record takes: the whole storage of a view's base, unless the view is a small part of it.

    What shares a storage and is no view (`unsafe_chunk`, ``.data``) has a version counter of its own: the bytes around
    it may be changed in place while it is copied.
    """
    start, end = span
    if start < base_nbytes <= (end - start) * _WHOLE_STORAGE_FRACTION:
        return 0, base_nbytes
    return start - start % _ALIGNMENT, end


def modified(what: object, version: int, expected: int) -> RuntimeError:
    """What autograd itself would have raised; `what` is the tensor, or its view spec."""
    if isinstance(what, torch.Tensor):
        what = f"{str(what.dtype).removeprefix('torch.')}{list(what.shape)}"
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"{what} is at version {version}; expected version {expected} instead. Hint: find the in-place operation on a "
        "tensor that was saved for backward, and use its out-of-place form or clone the tensor first"
    )


def innermost_hooks() -> tuple[Any, Any] | None:
    """The pack and unpack hooks that are asked first in this thread, whoever installed them."""
    hooks: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks


@contextmanager
def keep_resident() -> Iterator[None]:
    """Inside, saved tensors are left alone: they stay in memory, also in a surrounding `offload_activations`.

    Example:
        >>> with offload_activations("/mnt/nvme"):
        ...     hidden = body(batch)
        ...     with keep_resident():
        ...         loss = head(hidden)  # needed first by backward
    """
    counters = Counters()
    with saved_tensors_hooks(lambda tensor: Resident(tensor, 0, counters), unpack_resident):
        yield


def unpack_resident(handle: Resident) -> torch.Tensor:
    """The tensor, unless it was changed meanwhile."""
    if handle.tensor._version != handle.version:
        raise modified(handle.tensor, handle.tensor._version, handle.version)
    return handle.tensor
