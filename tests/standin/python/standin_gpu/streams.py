"""Callbacks in the stand-in's streams, and what the driver counted."""

from __future__ import annotations

import atexit
import ctypes
import itertools
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

library = ctypes.CDLL("libcudart.so.13")
library.standin_count.restype = ctypes.c_long

_COUNTERS = ("copies_out", "copies_in", "copies_refused", "copies_unpinned", "unsafe_calls", "registrations")
_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_jobs: dict[int, tuple[Callable[[], Any], str]] = {}
_replayed: set[int] = set()  # jobs in graphs, which may run again
_numbers = itertools.count(1)
errors: list[BaseException] = []


class _Launches:
    """Keeps callbacks out of the streams while PyTorch's cache is emptied, which waits for streams with a lock held.

    Whoever frees memory with the GIL meanwhile waits for that lock: a callback, which needs the GIL, would never run.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_under_way = self._num_waiting = 0
        self._is_emptying = False

    @contextmanager
    def one(self) -> Iterator[None]:
        """Callbacks are queued inside."""
        with self._changed:
            self._num_waiting += 1
            self._changed.wait_for(lambda: not self._is_emptying)
            self._num_waiting -= 1
            self._num_under_way += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._num_under_way -= 1
                self._changed.notify_all()

    @contextmanager
    def none(self) -> Iterator[None]:
        """No stream has a callback inside."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_emptying and not self._num_waiting)  # they had no turn yet
            self._is_emptying = True
            self._changed.wait_for(lambda: not self._num_under_way)
        try:
            library.standin_drain_all()
            yield
        finally:
            with self._changed:
                self._is_emptying = False
                self._changed.notify_all()


_launches = _Launches()


def install_emptying() -> None:
    """PyTorch's cache is emptied while no stream has a callback."""
    empty = torch._C._cuda_emptyCache

    def empty_alone() -> None:
        with _launches.none():
            empty()

    torch._C._cuda_emptyCache = empty_alone


@_Callback
def _run(key: int) -> None:
    job, name = _jobs[key] if key in _replayed else _jobs.pop(key)
    try:
        with torch.inference_mode():  # in which tensors of either mode may be written to
            job()
    except BaseException as error:
        print(f"stand-in: {name}:", *traceback.format_exception(error, limit=-2), file=sys.stderr)
        errors.append(error)


def enqueue(job: Callable[[], Any], stream: int | None = None, name: str = "callback") -> None:
    """Runs `job` when the stream (the current one unless told otherwise) comes to it, in the stream's thread."""
    key = next(_numbers)
    _jobs[key] = job, name
    handle = torch.cuda.current_stream().cuda_stream if stream is None else stream
    library.standin_enqueue.argtypes = [ctypes.c_void_p, _Callback, ctypes.c_void_p]
    with _launches.one():
        outcome = library.standin_enqueue(handle, _run, key)
    if outcome == 1:
        _replayed.add(key)
    elif outcome < 0:
        check(-outcome)


def synchronize(stream: int) -> None:
    """Waits for a stream, without the GIL, which its callbacks need."""
    check(library.cudaStreamSynchronize(ctypes.c_void_p(stream)))


def check(code: int) -> None:
    """Raises what the driver answered."""
    if code != 0:
        library.cudaGetErrorString.restype = ctypes.c_char_p
        raise torch.AcceleratorError(f"CUDA error: {library.cudaGetErrorString(code).decode()}")


def raise_earlier_error() -> None:
    """As on a device: what failed there is told by a later call."""
    if errors:
        raise RuntimeError("CUDA error: a kernel failed earlier") from errors[0]


def counts() -> dict[str, int]:
    """What the driver saw since the process began."""
    return {name: library.standin_count(index) for index, name in enumerate(_COUNTERS)}


atexit.register(library.cudaDeviceSynchronize)  # no callback comes when the interpreter is gone
