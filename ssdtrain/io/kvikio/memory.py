"""Memory by its address, as kvikio takes it, and the few driver functions that copy to and from a device.

The driver is libcuda, loaded by name when it is first needed; without it there is no device memory to copy.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from ssdtrain.io.python import view_of

_NON_BLOCKING = 1  # a stream that does not wait for the NULL stream, nor the NULL stream for it


class Memory(NamedTuple):
    """Bytes [`address`, `address` + `nbytes`) of the host or of a device."""

    address: int
    nbytes: int

    def from_byte(self, start: int) -> Memory:
        """What is left after `start` bytes."""
        return Memory(self.address + start, self.nbytes - start)

    def as_buffer(self, *, is_device: bool) -> Any:
        """What kvikio accepts; the caller keeps the memory alive."""
        return _DeviceArray(self) if is_device else view_of(self.address, self.nbytes)


class _DeviceArray:
    """Bytes of a device under the name that array libraries agreed upon."""

    def __init__(self, memory: Memory) -> None:
        self.__cuda_array_interface__ = {
            "shape": (memory.nbytes,),
            "typestr": "|u1",
            "data": (memory.address, False),
            "version": 3,
        }


class Driver:
    """Copies between host and device memory, blocking, on a stream of its own: for the rare cases only."""

    def __init__(self) -> None:
        self._library: ctypes.CDLL | None = None

    def read(self, memory: Memory, device_index: int) -> bytearray:
        """The bytes of device memory.

        Raises:
            OSError: (EIO) the driver says why.
        """
        content = bytearray(memory.nbytes)
        target = (ctypes.c_char * memory.nbytes).from_buffer(content)
        self._copy("cuMemcpyDtoHAsync_v2", (ctypes.addressof(target), memory.address), memory.nbytes, device_index)
        return content

    def write(self, memory: Memory, content: memoryview, device_index: int) -> None:
        """Fills device memory with the first bytes of `content`, which is writable memory.

        Raises:
            OSError: (EIO) the driver says why.
        """
        source = (ctypes.c_char * memory.nbytes).from_buffer(content)
        self._copy("cuMemcpyHtoDAsync_v2", (memory.address, ctypes.addressof(source)), memory.nbytes, device_index)

    @contextmanager
    def allocated(self, nbytes: int, device_index: int) -> Iterator[Memory]:
        """Device memory for a while."""
        with self._context(device_index):
            address = ctypes.c_size_t()
            self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        try:
            yield Memory(address.value, nbytes)
        finally:
            with self._context(device_index):
                self._call("cuMemFree_v2", address)

    def _copy(self, function: str, ends: tuple[int, int], nbytes: int, device_index: int) -> None:
        to, source = ends
        with self._context(device_index):
            stream = ctypes.c_void_p()
            self._call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
            try:
                self._call(function, ctypes.c_size_t(to), ctypes.c_size_t(source), ctypes.c_size_t(nbytes), stream)
                self._call("cuStreamSynchronize", stream)
            finally:
                self._call("cuStreamDestroy_v2", stream)

    @contextmanager
    def _context(self, device_index: int) -> Iterator[None]:
        """The device's primary context, which is PyTorch's, current on this thread."""
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), device_index)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        try:
            self._call("cuCtxPushCurrent_v2", context)
            try:
                yield
            finally:
                self._call("cuCtxPopCurrent_v2", ctypes.byref(context))
        finally:
            self._call("cuDevicePrimaryCtxRelease_v2", device)

    def _call(self, function: str, *arguments: Any) -> None:
        if self._library is None:
            self._library = ctypes.CDLL("libcuda.so.1")  # its functions run without the GIL
        result = getattr(self._library, function)(*arguments)
        if result != 0:
            raise OSError(errno.EIO, f"{function} failed with CUDA error {result}")
