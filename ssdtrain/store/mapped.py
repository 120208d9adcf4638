"""Tensors in a file without a name: a state dict larger than memory, whose pages the kernel writes out and drops.

Knows shapes and directories, nothing of parameters or optimizers.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from functools import partial
from typing import Any

import torch

from ssdtrain.io.files.unlinked import open_unlinked
from ssdtrain.io.timed_calls import run
from ssdtrain.stats import nbytes_text
from ssdtrain.store.identity import ViewSpec, spec_nbytes

_MS_SYNC = 4
_SYNC_NBYTES = 64 << 20  # what a drive that answers writes within any time limit


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
