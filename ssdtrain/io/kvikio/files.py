"""Spill files as kvikio handles: whole transfers, and kvikio's failures as errno.

[Note: what is set in kvikio]
kvikio keeps its settings for the whole process, and its defaults suit one large file: one thread, reads through the
page cache, bounce buffers of 16 MiB. An engine raises the number of threads to its own, has reads bypass the page
cache, and makes bounce buffers no larger than a slab, so that they stay inside `staging_nbytes`. A setting that the
user made by environment variable stays. The compatibility mode is set while a handle is opened and then put back: a
handle keeps the one it was opened with, which is the one `probe` has found, so that kvikio never chooses by itself.

[Note: the NULL stream]
Where cuFile is used, `pread` and `pwrite` of device memory begin by waiting for all work queued on the NULL stream.
That orders nothing we need (the fences do), and delays a request while a training loop on that stream runs ahead.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from ssdtrain.io.python import EndOfFileError, File

from .memory import Memory

_ANSWER_SECONDS = 10.0
_CHOSEN_BY = {
    "num_threads": ("KVIKIO_NTHREADS", "KVIKIO_NUM_THREADS"),
    "auto_direct_io_read": ("KVIKIO_AUTO_DIRECT_IO_READ",),
    "bounce_buffer_size": ("KVIKIO_BOUNCE_BUFFER_SIZE",),
}


class Handles:
    """One kvikio handle per spill file."""

    def __init__(self, files: Sequence[File], *, is_posix: bool) -> None:
        """Opens the files once more, through their descriptors: they have no names.

        Raises:
            OSError: kvikio cannot open a file, or does not answer.
        """
        import kvikio
        import kvikio.defaults

        mode = type(kvikio.defaults.get("compat_mode"))
        with kvikio.defaults.set("compat_mode", mode.ON if is_posix else mode.OFF):
            self._handles = [_call(kvikio.CuFile, f"/proc/self/fd/{file.fd}", "r+") for file in files]

    def configure(self, num_threads: int, slab_nbytes: int) -> None:
        """Sets what these files need; see [Note: what is set in kvikio]."""
        import kvikio.defaults

        current = {name: kvikio.defaults.get(name) for name in _CHOSEN_BY}
        wanted = {
            "num_threads": max(num_threads, current["num_threads"]),
            "auto_direct_io_read": True,
            "bounce_buffer_size": min(slab_nbytes, current["bounce_buffer_size"]),
        }
        for name, variables in _CHOSEN_BY.items():
            if wanted[name] != current[name] and not any(variable in os.environ for variable in variables):
                kvikio.defaults.set(name, wanted[name])

    def check_answers(self) -> None:
        """Asks kvikio for the first block of a file.

        Raises:
            OSError: it fails, or nobody answers: kvikio's threads do not follow a fork.
        """
        memory = bytearray(1)
        future = _call(self._handles[0].pread, memory, 1, 0, 1)
        deadline = time.monotonic() + _ANSWER_SECONDS
        while not future.done():
            if time.monotonic() > deadline:
                text = f"kvikio did not answer for {_ANSWER_SECONDS:g} s; its threads do not follow a fork: use spawn"
                raise OSError(errno.ETIMEDOUT, text)
            time.sleep(0.001)
        try:
            _call(future.get)
        except EndOfFileError:  # an empty file answers too
            return

    def write(self, file: int, memory: Memory, offset: int, *, is_device: bool) -> None:
        """Writes all of `memory`. Raises `OSError`."""
        self._move(self._handles[file].pwrite, memory, offset, is_device)

    def read(self, file: int, memory: Memory, offset: int, *, is_device: bool) -> None:
        """Fills all of `memory`. Raises `OSError`, with "end of file" where the file is too short."""
        self._move(self._handles[file].pread, memory, offset, is_device)

    def close(self) -> None:
        """Closes kvikio's descriptors."""
        for handle in self._handles:
            handle.close()

    def _move(self, begin: Callable[..., Any], memory: Memory, offset: int, is_device: bool) -> None:
        done = 0
        while done < memory.nbytes:
            rest = memory.from_byte(done)
            # One task for all of it: of several, a short one would leave a hole that the sum does not show.
            future = _call(begin, rest.as_buffer(is_device=is_device), rest.nbytes, offset + done, rest.nbytes)
            moved = _call(future.get)
            if moved == 0:
                raise EndOfFileError(errno.EIO, "end of file")
            done += moved


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What kvikio returns, or its failure as an `OSError`."""
    try:
        return function(*arguments)
    except Exception as error:  # kvikio maps C++ exceptions to many types; a worker has to survive all of them
        failure = as_os_error(error)
    try:
        raise failure
    finally:
        del failure  # a frame that knows its own exception would keep the request until the next garbage collection


def as_os_error(error: Exception) -> OSError:
    """The errno that kvikio spells out in its message; EIO with the message when it names none."""
    text = str(error)
    if text.endswith("EOF"):
        return EndOfFileError(errno.EIO, "end of file")
    named = [number for number in errno.errorcode if text.endswith(os.strerror(number))]
    if not named:
        return OSError(errno.EIO, text)
    number = max(named, key=lambda number: len(os.strerror(number)))
    return OSError(number, os.strerror(number))
