"""Memory that bytes are moved from and to: where it is, how long, and kept where it is meanwhile.

Knows addresses. Whatever has the buffer protocol will do, and whatever has a tensor's `data_ptr`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_PyBUF_WRITABLE = 1  # and contiguous, as without any flag


class _Buffer(ctypes.Structure):
    """CPython's `Py_buffer`."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


class Memory:
    """A stretch of memory in use: it stays where it is as long as this object lives."""

    def __init__(self, owner: Any, *, is_written: bool) -> None:
        """`is_written`: bytes are put there.

        Raises:
            TypeError: it is no memory, or cannot be written to though it has to be.
            ValueError: it is not contiguous, or not in host memory.
        """
        if hasattr(owner, "data_ptr"):
            self.address, self.nbytes = _of_tensor(owner)
            self._owner: Any = owner
            return
        self._owner = _Buffer()
        flags = _PyBUF_WRITABLE if is_written else 0
        try:
            ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(owner), ctypes.byref(self._owner), flags)
        except (TypeError, BufferError) as error:
            what = "contiguous memory that can be written to" if is_written else "contiguous memory"
            raise TypeError(f"Expected {what}, got {type(owner).__name__}: {error}") from None
        weakref.finalize(self, ctypes.pythonapi.PyBuffer_Release, ctypes.byref(self._owner)).atexit = False
        self.address, self.nbytes = self._owner.buf or 0, self._owner.len


def _of_tensor(tensor: Any) -> tuple[int, int]:
    if tensor.device.type != "cpu":
        raise ValueError(f"Expected a tensor in host memory, got one on {tensor.device}: copy it with .cpu() first")
    if not tensor.is_contiguous():
        raise ValueError("Expected a contiguous tensor, got one with gaps: pass tensor.contiguous()")
    return int(tensor.data_ptr()), int(tensor.numel() * tensor.element_size())


class PinnedBuffer:
    """Memory at a page boundary that the system does not move or swap out: a direct transfer needs no copy.

    Has the buffer protocol through `view`, and the memory lives as long as somebody has that.
    """

    def __init__(self, nbytes: int) -> None:
        """`is_locked` is false, and `reason` says why, where the system locks no more memory (``ulimit -l``).

        Raises:
            ValueError: `nbytes` is negative.
            OSError: there is not so much memory.
        """
        if nbytes < 0:
            raise ValueError(f"Expected a size of 0 or more, got {nbytes}")
        self._map = mmap.mmap(-1, max(nbytes, 1))
        self.view = memoryview(self._map)[:nbytes]
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        failed = _LIBC.mlock(ctypes.c_void_p(address), ctypes.c_size_t(nbytes)) if nbytes else 0
        number = ctypes.get_errno() if failed else 0
        self.is_locked = not failed
        hint = " (see ulimit -l)" if number in (errno.ENOMEM, errno.EAGAIN) else ""
        self.reason = f"{os.strerror(number)}{hint}" if failed else ""

    def __len__(self) -> int:
        return len(self.view)
