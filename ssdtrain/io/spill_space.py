"""Room on the spill files: which file, which extent, when a file grows, and when it is not used any more.

Knows extents and directories, no records and no requests. Not thread-safe: its owner holds a lock for every call.

[Note: growing]
A file system may take seconds to make a file longer, or for ever. So `allocate` only begins that and answers with a
`Growth`. Whoever gets one waits for it without the lock and asks again; others may do so meanwhile, also for the same
growth, and whoever asks first when it is over takes note of it.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from ssdtrain.io.engine import SpillFile
from ssdtrain.io.extents import BLOCK_NBYTES, Extent, ExtentAllocator
from ssdtrain.io.timed_calls import TimedCall, no_answer, run_all
from ssdtrain.stats import nbytes_text

logger = logging.getLogger("ssdtrain")

_FIRST_NBYTES = 64 << 20
_GROW_NBYTES = 256 << 20
_SHARE = 16  # of what a file system has left: the most that is taken ahead
_MAX_WRITE_ERRORS = 3
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_RETRY_GROW_SECONDS = 5.0


class Growth:
    """A spill file that is becoming longer: wait for it without a lock, then allocate again. See [Note: growing]."""

    def __init__(self, call: Callable[[], int], timeout_seconds: float) -> None:
        """Begins `call()`, which returns how long the file is."""
        self.timed = TimedCall(call)
        self._deadline = time.monotonic() + timeout_seconds

    @property
    def is_over(self) -> bool:
        """Whether there is an answer, or there should be one by now."""
        return self.timed.wait(0.0) or time.monotonic() >= self._deadline

    def wait(self) -> None:
        """Blocks until it is over."""
        self.timed.wait(self._deadline - time.monotonic())


class SpillSpace:
    """Extents over one spill file per directory; large requests are striped, small ones take turns."""

    def __init__(
        self,
        files: Sequence[SpillFile],
        stripe_nbytes: int,
        note_fallback: Callable[[str], None],
        *,
        first: int = 0,
        cap_nbytes: int | None = None,
        timeout_seconds: float = 60.0,
    ) -> None:
        """`stripe_nbytes`: what a file must at least get of a request for striping to pay.

        `first`: the index by which the engine knows the first file. `cap_nbytes`: a bound on all files together, beside
        their own. `timeout_seconds`: how long a file may take to grow.
        """
        self.block_nbytes = max((file.block_nbytes for file in files), default=BLOCK_NBYTES)
        self.memory_alignment = max((file.memory_alignment for file in files), default=BLOCK_NBYTES)
        self.in_use_nbytes = 0
        self.peak_nbytes = 0
        self._files = files
        self._first = first
        self._cap_nbytes = None if cap_nbytes is None or not files else cap_nbytes // len(files)
        self._stripe_nbytes = stripe_nbytes
        self._note_fallback = note_fallback
        self._extents = [ExtentAllocator(self.block_nbytes) for _ in files]
        self._num_errors = [0] * len(files)
        self._is_retired = [False] * len(files)
        self._no_growth_before = [0.0] * len(files)
        self._growths: list[Growth | None] = [None] * len(files)
        self._next = 0
        self._timeout_seconds = timeout_seconds
        self._preallocate()
        if files and not any(extents.capacity for extents in self._extents):
            if any(self._is_retired):
                raise no_answer("room for a spill file", timeout_seconds, self.retired[0])
            names = ", ".join(file.directory for file in files)
            raise OSError(
                errno.ENOSPC,
                f"Expected room for at least {nbytes_text(stripe_nbytes)} of spill space, got a full file system: "
                "free some space or pass another directory",
                names,
            )

    def rounded(self, nbytes: int) -> int:
        """Whole blocks."""
        return -(-nbytes // self.block_nbytes) * self.block_nbytes

    @property
    def free_nbytes(self) -> int:
        """Room in the files as long as they are."""
        return sum(extents.capacity for extents in self._extents) - self.in_use_nbytes

    def allocate(self, nbytes: int, *, stripe: bool = True) -> list[Extent] | Growth:
        """Extents for `nbytes`: several, each of whole blocks, when it is striped. Empty when there is no room.

        Or what to wait for before asking again, see [Note: growing].
        """
        if not self._files:
            return []
        need, num = self.rounded(nbytes), len(self._files)
        first, self._next = self._next, (self._next + 1) % num
        if stripe and num > 1 and need >= num * self._stripe_nbytes:
            per_file = self.rounded(-(-need // num))
            sizes = [min(per_file, need - start) for start in range(0, need, per_file)]
            parts = [self._allocate(file, size) for file, size in enumerate(sizes)]
            found = [part for part in parts if isinstance(part, Extent)]
            if len(found) == len(parts):
                return found
            for part in found:
                self.release(part)
            growth = next((part for part in parts if isinstance(part, Growth)), None)
            if growth is not None and None not in parts:
                return self._ask_again(growth)
        for file in (*range(first, num), *range(first)):
            extent = self._allocate(file, need)
            if isinstance(extent, Growth):
                return self._ask_again(extent)
            if extent is not None:
                return [extent]
        return []

    def _ask_again(self, growth: Growth) -> Growth:
        """Whoever does gets the same turn."""
        self._next = (self._next - 1) % len(self._files)
        return growth

    def release(self, extent: Extent) -> None:
        """Gives an extent, or a block-aligned part of one, back."""
        self._extents[extent.file - self._first].release(extent.offset, extent.nbytes)
        self.in_use_nbytes -= extent.nbytes

    def note_write_error(self, file: int, error: tuple[int, int, int]) -> None:
        """Remembers a failed write; after a few of them the directory is not used any more."""
        number, offset, nbytes = error
        directory = self.directory(file)
        logger.debug("%s: write of %d bytes at offset %d failed: errno %d", directory, nbytes, offset, number)
        self._note_fallback(f"{directory}: write failed: {os.strerror(number)} (errno {number}); bytes kept in memory")
        self._num_errors[file - self._first] += 1
        if self._num_errors[file - self._first] == _MAX_WRITE_ERRORS:
            self.retire(file, f"after {_MAX_WRITE_ERRORS} failed writes")

    def note_read_error(self, file: int, error: tuple[int, int, int, str]) -> None:
        """A read failed although it was tried again: the directory is not used any more."""
        number, offset, nbytes, message = error
        self.retire(file, f"after a failed read of {nbytes} bytes at offset {offset}: {message} (errno {number})")

    @property
    def is_exhausted(self) -> bool:
        """Whether every directory is retired."""
        return all(self._is_retired)

    @property
    def retired(self) -> list[str]:
        """Directories that are not used any more."""
        return [file.directory for file, is_retired in zip(self._files, self._is_retired, strict=True) if is_retired]

    def directory(self, file: int) -> str:
        """Where a spill file is."""
        return self._files[file - self._first].directory

    def leave_out(self, directories: Iterable[str]) -> None:
        """Retires directories without a word: it was said before."""
        names = set(directories)
        self._is_retired = [r or file.directory in names for r, file in zip(self._is_retired, self._files, strict=True)]

    def retire(self, file: int, why: str) -> None:
        """Puts nothing more into a directory; what is there can still be read."""
        if not self._is_retired[file - self._first]:
            self._is_retired[file - self._first] = True
            self._note_fallback(f"{self.directory(file)}: not used any more {why}")

    def _allocate(self, file: int, nbytes: int) -> Extent | Growth | None:
        growth, extents = self._growths[file], self._extents[file]
        if growth is not None and growth.is_over:
            self._take_note(file, growth)
            growth = None
        if self._is_retired[file]:
            return None
        offset = extents.allocate(nbytes)
        if offset is None:
            return growth or self._grow(file, extents.missing_nbytes(nbytes))
        self.in_use_nbytes += nbytes
        self.peak_nbytes = max(self.peak_nbytes, self.in_use_nbytes)
        return Extent(self._first + file, offset, nbytes)

    def _cap(self, file: int) -> float:
        caps = (self._files[file].cap_nbytes, self._cap_nbytes)
        return min((cap for cap in caps if cap is not None), default=math.inf)

    def _preallocate(self) -> None:
        """Begins all files at once; one that is full or silent is left out."""
        limits = [int(min(self._cap(i), sys.maxsize)) for i in range(len(self._files))]
        least = [min(self._stripe_nbytes, limit) for limit in limits]
        calls = [
            partial(lengthen, file, nbytes, limit, _FIRST_NBYTES)
            for file, nbytes, limit in zip(self._files, least, limits, strict=True)
        ]
        for i, timed in enumerate(run_all(calls, self._timeout_seconds)):
            try:
                if self._has_ended(i, timed):
                    self._extents[i].extend(timed.take())
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
                self._note_fallback(f"{self._files[i].directory} is full ({error.strerror}): not used")

    def _has_ended(self, file: int, timed: TimedCall[int]) -> bool:
        """Whether a file has answered; else nothing more is put there."""
        if timed.wait(0.0):
            return True
        timed.abandon()
        self.retire(self._first + file, f"after it did not grow within {self._timeout_seconds:g} s")
        return False

    def _grow(self, file: int, missing_nbytes: int) -> Growth | None:
        """Begins to make the file longer by at least `missing_nbytes`, by more when there is room."""
        needed, limit = self._extents[file].capacity + missing_nbytes, self._cap(file)
        if needed > limit or time.monotonic() < self._no_growth_before[file]:
            return None
        longest = int(min(limit, needed + _GROW_NBYTES))
        growth = Growth(partial(lengthen, self._files[file], needed, longest, _GROW_NBYTES), self._timeout_seconds)
        self._growths[file] = growth
        return growth

    def _take_note(self, file: int, growth: Growth) -> None:
        """The file is longer, or was given up."""
        self._growths[file] = None
        extents = self._extents[file]
        try:
            if self._has_ended(file, growth.timed):
                extents.extend(growth.timed.take())
        except OSError as error:
            self._no_growth_before[file] = time.monotonic() + _RETRY_GROW_SECONDS
            self._note_fallback(
                f"{self._files[file].directory}: no room for more spill space ({error.strerror} after"
                f" {nbytes_text(extents.capacity)}); tensors stay in memory"
            )


def lengthen(spill: SpillFile, least_nbytes: int, most_nbytes: int, step_nbytes: int) -> int:
    """Makes a file `least_nbytes` long or longer, and tells how long.

    By one step more than needed, or a share of what the file system has left when that is less: others need room there
    too, and the first to come must not have it all. Blocks for as long as the drive does.

    Raises:
        OSError: there is no room for `least_nbytes`.
    """
    if least_nbytes <= spill.nbytes:
        return spill.nbytes
    state = os.fstatvfs(spill.fd)
    left_nbytes = state.f_bavail * state.f_frsize - (least_nbytes - spill.nbytes)
    generous = least_nbytes + max(0, min(step_nbytes, left_nbytes // _SHARE))
    target = min(generous, most_nbytes)
    if target > least_nbytes:
        try:
            spill.grow(target)
            return target
        except OSError:  # a quota, or somebody else was faster
            pass
    spill.grow(least_nbytes)
    return least_nbytes
