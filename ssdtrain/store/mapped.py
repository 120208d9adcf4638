"""Tensors in an unlinked file: a state dict larger than memory, whose pages the kernel writes out and drops at need.

Knows shapes and directories, nothing of parameters or optimizers.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
from typing import Any

import torch

from ssdtrain.stats import nbytes_text
from ssdtrain.store.identity import ViewSpec, spec_nbytes

_MS_SYNC = 4


def mapped_copy(tensor: torch.Tensor, spec: ViewSpec, directory: str | None) -> torch.Tensor:
    """A copy of `tensor` with the dtype, size and strides of `spec`, in a file in `directory` that is mapped to memory.

    Its pages are written out and taken from this process; they come back when it is read. Without a directory it is in
    plain memory.

    The file is unlinked at once: the space is free when the tensor is gone.

    Raises:
        OSError: there is no room.
    """
    if directory is None or not spec_nbytes(spec):
        return torch.empty_strided(spec.size, spec.stride, dtype=spec.dtype).copy_(tensor)
    copy = _mapped(spec, directory).copy_(tensor)
    _let_go(copy.untyped_storage())
    return copy


def _mapped(spec: ViewSpec, directory: str) -> torch.Tensor:
    nbytes = spec_nbytes(spec)
    handle, path = tempfile.mkstemp(dir=directory)
    try:
        try:
            os.posix_fallocate(handle, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise OSError(
                    error.errno,
                    f"Expected room for {nbytes_text(nbytes)} of a state dict, got {error.strerror}: free some space",
                    directory,
                ) from error
            os.ftruncate(handle, nbytes)
        storage: Any = torch.UntypedStorage.from_file(path, shared=True, nbytes=nbytes)  # holds no descriptor
    finally:
        os.close(handle)
        os.unlink(path)
    return torch.empty(0, dtype=spec.dtype).set_(storage, 0, spec.size, spec.stride)


def _let_go(storage: torch.UntypedStorage) -> None:
    """Of a mapping of its own: on other memory this would lose what is there."""
    address, length = ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes())
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.msync(address, length, _MS_SYNC):
        number = ctypes.get_errno()
        raise OSError(number, f"Expected to write a state dict out, got {os.strerror(number)}")
    libc.madvise(address, length, mmap.MADV_DONTNEED)
