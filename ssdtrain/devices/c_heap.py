"""The C library's heap, which keeps what tensors in host memory free: when to have it given back to the system.

Knows sizes and times; neither records nor when anything is freed.

[Note: what a heap keeps]
PyTorch's memory on the CPU is glibc's `malloc`. Small tensors that stay lie between large ones that leave, so holes are
left which the next ones do not fit: where a third of the saved tensors is in memory, the process may hold two thirds.
Not even a tensor of the same size fits: `posix_memalign`, which PyTorch calls, asks `malloc` for the alignment on top.
`malloc_trim` gives the holes' pages back. That takes milliseconds, and what is used again is cleared by the kernel
first, up to half a second a gigabyte: as much as a fast drive costs. So it is done as often as a twentieth of the time
allows: many times in a step where layers compute long for every byte, else every few steps, for without it the holes
become more from step to step. Or where somebody asked for it, always.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from typing import Literal

_LEAST_NBYTES = 32 << 20
_SHARE = 8  # of what a step saves, freed before it is given back
_WORTH_SHARE = 8  # of what was freed, of what a step saves at most: less is not worth it
_MAX_PATIENCE = 64  # of these shares: more seldom than every few steps it lowers no peak
_MAX_COST = 0.05  # of the time
_SECONDS_PER_BYTE = 0.3 / (1 << 30)  # to clear a page when it is used again


class CHeap:
    """Gives memory back that the tensors of one offload context free."""

    def __init__(
        self,
        when: Literal["auto", "always", "never"],
        trim: Callable[[], None] | None = None,
        resident_nbytes: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`trim`: gives back what is free; None for the C library's own, where it has one."""
        self._trim = trim or _trim_of_libc()
        self._resident_nbytes, self._clock = resident_nbytes or _resident_nbytes, clock
        self._is_always = when == "always"
        self.is_due = False
        """Whether `give_back` is to be called."""
        self._freed_nbytes = self._saved_nbytes = 0
        self._patience = 1
        self._is_off = when == "never" or self._trim is None
        self._last = clock()

    def note(self, nbytes: int, saved_nbytes: int) -> None:
        """So many bytes more were freed, of what a step saves."""
        self._freed_nbytes, self._saved_nbytes = self._freed_nbytes + nbytes, saved_nbytes
        self.is_due = not self._is_off and self._freed_nbytes >= self._patience * max(
            _LEAST_NBYTES, saved_nbytes // _SHARE
        )

    def give_back(self) -> int:
        """Gives back what is free, and learns what that costs. Takes milliseconds.

        Returns:
            Bytes of the process that are resident after it; 0 where the system does not say.
        """
        self.is_due = False
        if self._trim is None:
            return 0
        before, begin = self._resident_nbytes(), self._clock()
        self._trim()
        end, after = self._clock(), self._resident_nbytes()
        self._learn(end - begin, max(0, before - after), end)
        return after

    def _learn(self, seconds: float, returned: int, now: float) -> None:
        """How often to have it given back, from what it cost this time."""
        cost, since = seconds + returned * _SECONDS_PER_BYTE, now - self._last
        freed, self._freed_nbytes, self._last = self._freed_nbytes, 0, now
        if self._is_always:
            return
        if cost > _MAX_COST * since or returned < min(freed, self._saved_nbytes) // _WORTH_SHARE:
            self._patience *= 2
            self._is_off = self._patience > _MAX_PATIENCE


def _trim_of_libc() -> Callable[[], None] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:  # another C library
        return None
    return lambda: trim(0)


def _resident_nbytes() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # it is not mounted, or too many files are open: nothing is learned
        return 0
