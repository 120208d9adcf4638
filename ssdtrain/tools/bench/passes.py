"""Passes over a spill file through one of our engines. Knows requests and seconds, not what they are measured for."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable

from ssdtrain.io.engine import Read, Write
from ssdtrain.io.open_engine import EngineChoice, open_engine
from ssdtrain.tools.bench.memory import Memory


class Passes:
    """One engine with as many slabs as requests may be in flight, and memory to write from and read into."""

    def __init__(self, directory: str, memory: Memory, request_nbytes: int, depth: int, kind: str = "auto") -> None:
        """Opens a spill file as large as `memory` and writes it once.

        Raises:
            OSError: no space, or the drive refused.
        """
        self.choice: EngineChoice = open_engine(kind, [directory], request_nbytes * depth, request_nbytes)
        self._engine, self._memory = self.choice.engine, memory
        self._request, self._depth = request_nbytes, depth
        self._writes: list[Write] = []
        try:
            self.choice.files[0].grow(memory.nbytes)
            self.write()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives file and slabs back."""
        self.choice.close()

    def write(self) -> float:
        """Seconds to write the file once, at most `depth` requests in flight."""
        begin = time.perf_counter()
        self._writes = []
        for offset in self._offsets():
            self._engine.wait_inflight((self._depth - 1) * self._request)
            self._writes.append(self._begin_write(offset))
        _finish_writes(self._writes)
        return time.perf_counter() - begin

    def read(self) -> float:
        """Seconds to read it once, `depth` requests in flight."""
        begin = time.perf_counter()
        pending: deque[Read] = deque()
        for write, offset in zip(self._writes, self._offsets(), strict=True):
            if len(pending) == self._depth:
                _finish_read(pending.popleft())
            pending.append(self._begin_read(write, offset))
        while pending:
            _finish_read(pending.popleft())
        return time.perf_counter() - begin

    def latencies(self, num: int) -> tuple[list[float], list[float]]:
        """Seconds of single writes and single reads, nothing else in flight."""
        offsets = list(self._offsets())[:num]
        writes, reads = [], []
        for i, offset in enumerate(offsets):
            begin = time.perf_counter()
            self._writes[i] = self._begin_write(offset)
            _finish_writes([self._writes[i]])
            writes.append(time.perf_counter() - begin)
        for i, offset in enumerate(offsets):
            begin = time.perf_counter()
            _finish_read(self._begin_read(self._writes[i], offset))
            reads.append(time.perf_counter() - begin)
        return writes, reads

    def mixed(self) -> float:
        """Seconds to write one half of the file and read the other at the same time."""
        offsets = list(self._offsets())
        middle = len(offsets) // 2
        writes: list[Write] = []
        pending: deque[Read] = deque()
        begin = time.perf_counter()
        for i in range(middle):
            self._engine.wait_inflight((self._depth - 1) * self._request)
            writes.append(self._begin_write(offsets[i]))
            if len(pending) == self._depth:
                _finish_read(pending.popleft())
            pending.append(self._begin_read(self._writes[middle + i], offsets[middle + i]))
        while pending:
            _finish_read(pending.popleft())
        _finish_writes(writes)
        self._writes[:middle] = writes
        return time.perf_counter() - begin

    def sustained(self, nbytes: int, seconds: float, window: float, progress: Callable[[int], None]) -> list[float]:
        """Bytes per second of each `window`, while the file is written over and over, past a drive's fast cache."""
        speeds: list[float] = []
        written, mark, end = 0, 0, time.perf_counter() + seconds
        since = time.perf_counter()
        while written < nbytes and time.perf_counter() < end:
            writes = []
            for offset in self._offsets():
                self._engine.wait_inflight((self._depth - 1) * self._request)
                writes.append(self._begin_write(offset))
                written += self._request
                now = time.perf_counter()
                if now - since >= window:
                    speeds.append((written - mark) / (now - since))
                    since, mark = now, written
                    progress(written)
            _finish_writes(writes)
            self._writes = writes
        now = time.perf_counter()
        if not speeds and now > since:
            speeds.append((written - mark) / (now - since))
        return speeds

    def _offsets(self) -> range:
        return range(0, self._memory.nbytes - self._request + 1, self._request)

    def _begin_write(self, offset: int) -> Write:
        source = (self._memory.address + offset, self._request, 0)
        return self._engine.write(0, offset, self._request, [source])

    def _begin_read(self, write: Write, offset: int) -> Read:
        return self._engine.read(write, 0, self._memory.address + offset, self._request)


def _finish_writes(writes: list[Write]) -> None:
    for write in writes:
        write.wait()
        if write.error is not None:
            raise OSError(write.error[0], os.strerror(write.error[0]))


def _finish_read(read: Read) -> None:
    read.wait()
    if read.error is not None:
        raise OSError(read.error[0], read.error[3])
