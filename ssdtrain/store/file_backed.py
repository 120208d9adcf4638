"""Tensors in a file without a name: a state dict larger than memory, whose pages the kernel writes out and drops.

Knows shapes and directories, nothing of parameters or optimizers.

[Note: writes to copies]
In PyTorch the values of a state dict are the state itself: `for value in ema.state_dict().values(): value.mul_(0.9)`
changes the module. Ours are copies. Each shares its version counter with an empty tensor that is kept here, so that a
write to it, or to a view of it, is noticed also when it has been dropped since; its memory is kept as long as it lives,
and after that only if it was written to. Whoever needs the state next takes over what was written. A copy of what has
changed since cannot be taken over: that is an error. What is written past the version counter (through `.data` or
NumPy) is not noticed.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from ssdtrain.io.files.unlinked import open_unlinked
from ssdtrain.io.timed_calls import run
from ssdtrain.stats import nbytes_text
from ssdtrain.store.identity import ViewSpec, spec_nbytes, version_probe, view_of, view_spec

_MS_SYNC = 4
_SYNC_NBYTES = 64 << 20  # what a drive that answers writes within any time limit

Owner = TypeVar("Owner")


def mapped_copy(
    tensor: torch.Tensor, spec: ViewSpec, directory: str | None, io_timeout_seconds: float = 60.0
) -> torch.Tensor:
    """A copy of `tensor` with the dtype, size and strides of `spec`, in a file in `directory` that is mapped to memory.

    Its pages are written out and taken from this process; they come back when it is read. Without a directory it is in
    plain memory.

    The file never has a name: the space is free when the tensor is gone, or the process, however it ends.

    Raises:
        OSError: there is no room, or no answer from the drive for `io_timeout_seconds`.
    """
    nbytes = spec_nbytes(spec)
    if directory is None or not nbytes:
        return torch.empty_strided(spec.size, spec.stride, dtype=spec.dtype, device="cpu").copy_(tensor)
    storage = run(partial(_mapped, nbytes, directory), io_timeout_seconds, directory, "a file for a state dict")
    copy = torch.empty(0, dtype=spec.dtype, device="cpu").set_(storage, 0, spec.size, spec.stride).copy_(tensor)
    for start in range(0, nbytes, _SYNC_NBYTES):
        write_out = partial(_write_out, storage.data_ptr() + start, min(_SYNC_NBYTES, nbytes - start), storage)
        run(write_out, io_timeout_seconds, directory, "to write a state dict out")
    return copy


def _mapped(nbytes: int, directory: str) -> torch.UntypedStorage:
    fd = open_unlinked(directory)
    try:
        _reserve(fd, nbytes, directory)
        # Opened once more through the descriptor, as no path leads there; the mapping then needs none.
        storage: Any = torch.UntypedStorage.from_file(f"/proc/self/fd/{fd}", shared=True, nbytes=nbytes)
    finally:
        os.close(fd)
    return storage  # type: ignore[no-any-return]


def _reserve(fd: int, nbytes: int, directory: str) -> None:
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise OSError(
                error.errno,
                f"Expected room for {nbytes_text(nbytes)} of a state dict, got {error.strerror}: free some space",
                directory,
            ) from error
        os.ftruncate(fd, nbytes)


def _write_out(start: int, nbytes: int, storage: torch.UntypedStorage) -> None:
    """Of a mapping of its own, which `storage` keeps: on other memory this would lose what is there."""
    address, length = ctypes.c_void_p(start), ctypes.c_size_t(nbytes)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.msync(address, length, _MS_SYNC):
        number = ctypes.get_errno()
        raise OSError(number, f"Expected to write a state dict out, got {os.strerror(number)}")
    libc.madvise(address, length, mmap.MADV_DONTNEED)


@dataclass(eq=False)
class _Copy(Generic[Owner]):
    owner: Owner
    stamp: object  # of its owner's bytes when it was made
    storage: torch.UntypedStorage
    spec: ViewSpec
    probe: torch.Tensor
    version: int
    value: weakref.ref[torch.Tensor] | None = None


class Copies(Generic[Owner]):
    """Copies of state that somebody may have: see [Note: writes to copies]."""

    def __init__(self, stamp_of: Callable[[Owner], object], name_of: Callable[[Owner], str]) -> None:
        """There is none. `stamp_of` gives another value when the owner's bytes have changed."""
        self._stamp_of, self._name_of = stamp_of, name_of
        self._copies: dict[int, _Copy[Owner]] = {}

    def note(self, value: torch.Tensor, owner: Owner) -> None:
        """`value` is a copy of what `owner` has now."""
        probe = version_probe(value)
        copy = _Copy(owner, self._stamp_of(owner), value.untyped_storage(), view_spec(value), probe, probe._version)
        key, copies = id(copy), self._copies

        def drop(_: object, probe: torch.Tensor = probe, version: int = probe._version) -> None:
            if probe._version == version:  # else somebody has to learn of it
                copies.pop(key, None)

        copy.value = weakref.ref(value, drop)
        copies[key] = copy

    def forget(self, owners: Iterable[Owner]) -> None:
        """Copies of what these have had until now are nobody's."""
        gone = {id(owner) for owner in owners} if self._copies else set()
        for key, copy in list(self._copies.items()):
            if id(copy.owner) in gone:
                self._copies.pop(key, None)

    def take_over(self, write: Callable[[Owner, torch.Tensor], None]) -> None:
        """Has `write(owner, value)` write what was written to copies; the value is its own.

        Raises:
            RuntimeError: a copy was written to whose owner has changed since it was made.
        """
        for key, copy in list(self._copies.items()) if self._copies else ():
            version = copy.probe._version
            if version == copy.version:
                continue
            copy.version = version
            if copy.value is None or copy.value() is None:
                self._copies.pop(key, None)
            if self._stamp_of(copy.owner) != copy.stamp:
                raise RuntimeError(
                    f"Expected no write to values of a state dict that was taken before the last change, got one to "
                    f"that of {self._name_of(copy.owner)}: it is a copy, which cannot be taken over any more. Take a "
                    "new state_dict() before writing to it, or write to a clone"
                )
            write(copy.owner, view_of(copy.storage, copy.spec).clone())
            copy.stamp = self._stamp_of(copy.owner)
