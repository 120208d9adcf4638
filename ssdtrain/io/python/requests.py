"""Write and read requests in plain Python: chunks, pieces, and the states between memory and file.

Public methods are the owner's; those with an underscore are the engine's and need the monitor's condition.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto

from .monitor import Monitor
from .spill_file import Owned


class State(Enum):
    QUEUED = auto()  # waits for a slab
    COPYING = auto()
    COPIED = auto()  # in a slab, waits for its turn to be written
    WRITING = auto()
    WRITTEN = auto()
    FAILED = auto()  # the bytes are kept in memory
    DROPPED = auto()  # nobody wants it any more


@dataclass(slots=True, eq=False)
class Slab:
    """A slab on loan to a chunk and to the reads that copy from it."""

    pool: Pool
    index: int
    view: memoryview
    num_users: int = 1

    def release(self) -> None:
        self.num_users -= 1
        if self.num_users == 0:
            self.pool.free.append(self.index)


class Pool:
    """Staging memory in slabs. Used under the engine's condition."""

    def __init__(self, num_slabs: int, slab_nbytes: int) -> None:
        self.slab_nbytes = slab_nbytes
        self.num_slabs = num_slabs
        self.peak_nbytes = 0
        nbytes = num_slabs * slab_nbytes
        try:
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, MemoryError) as error:
            text = f"Expected {nbytes} bytes of memory for staging, got {os.strerror(errno.ENOMEM)}; lower the size"
            raise OSError(errno.ENOMEM, text) from error
        self.free = list(range(num_slabs))
        with suppress(OSError):
            memory.madvise(mmap.MADV_DONTFORK)
        self._view = memoryview(memory)

    @property
    def in_use_nbytes(self) -> int:
        return (self.num_slabs - len(self.free)) * self.slab_nbytes

    def lease(self) -> Slab:
        index = self.free.pop()
        self.peak_nbytes = max(self.peak_nbytes, self.in_use_nbytes)
        start = index * self.slab_nbytes
        return Slab(self, index, self._view[start : start + self.slab_nbytes])


@dataclass(slots=True, eq=False)
class Part:
    """The part of one piece that lies in one chunk."""

    piece: int
    chunk: Chunk
    piece_offset: int
    chunk_offset: int
    nbytes: int
    checksum: int = 0
    is_skipped: bool = False


@dataclass(slots=True, eq=False)
class Chunk:
    """One slab's worth of an extent."""

    offset: int
    nbytes: int
    parts: list[Part] = field(default_factory=list)
    num_live: int = 0
    state: State = State.QUEUED
    slab: Slab | None = None
    rescued: bytes | bytearray | None = None


@dataclass(slots=True, eq=False)
class Piece:
    address: int
    nbytes: int
    offset: int
    parts: list[Part] = field(default_factory=list)
    num_unread: int = 0
    is_cancelled: bool = False


class Write(Owned):
    """The life of one write request; methods with an underscore need the monitor's condition."""

    def __init__(self, monitor: Monitor, place: tuple[int, int, int], pieces: list[Piece], step: int) -> None:
        super().__init__()
        self._monitor = monitor
        self._file, self._offset, self._nbytes = place
        self._pieces = pieces
        self._chunks = [Chunk(at, min(step, self._nbytes - at)) for at in range(0, self._nbytes, step)]
        for i, piece in enumerate(pieces):
            self._split(i, piece, step)
        self._chunks = [chunk for chunk in self._chunks if chunk.parts]
        self._num_uncopied = len(pieces)
        self._queued = time.monotonic()
        self._copy_begun = self._copied = self._write_begun = self._done = 0.0
        self._num_unfinished = len(self._chunks)
        self.error: tuple[int, int, int] | None = None
        self.written_nbytes = 0
        self.cancelled_nbytes = 0
        self.rescued_nbytes = 0

    def __del__(self) -> None:
        if getattr(self, "_pid", None) == os.getpid():
            kept = sum(len(chunk.rescued) for chunk in self._chunks if chunk.rescued is not None)
            self._monitor.rescued_nbytes -= kept

    def _split(self, index: int, piece: Piece, step: int) -> None:
        done = 0
        while done < piece.nbytes:
            at = piece.offset + done
            chunk = self._chunks[at // step]
            nbytes = min(piece.nbytes - done, chunk.offset + chunk.nbytes - at)
            part = Part(index, chunk, done, at - chunk.offset, nbytes)
            chunk.parts.append(part)
            chunk.num_live += 1
            piece.parts.append(part)
            done += nbytes
        piece.num_unread = len(piece.parts)

    @property
    def is_copied(self) -> bool:
        self._check_process()
        return self._num_uncopied == 0

    @property
    def is_done(self) -> bool:
        self._check_process()
        return self._num_unfinished == 0

    @property
    def moments(self) -> tuple[float, float, float, float, float]:
        self._check_process()
        return self._queued, self._copy_begun, self._copied, self._write_begun, self._done

    is_issued = is_copied  # host memory knows no streams
    is_lost = False

    def make_wait(self, stream: int) -> None:
        self._check_process()

    def is_piece_copied(self, piece: int) -> bool:
        self._check_process()
        return self._piece(piece).num_unread == 0

    def cancel(self, piece: int) -> None:
        self._check_process()
        with self._monitor.changed:
            self._cancel(self._piece(piece))

    def wait(self, timeout_seconds: float | None = None) -> bool:
        self._check_process()
        with self._monitor.changed:
            return self._monitor.changed.wait_for(lambda: self._num_unfinished == 0, timeout_seconds)

    def wait_copied(self, timeout_seconds: float | None = None) -> bool:
        self._check_process()
        with self._monitor.changed:
            return self._monitor.changed.wait_for(
                lambda: self._num_uncopied == 0 or self._num_unfinished == 0, timeout_seconds
            )

    wait_issued = wait_copied

    def _piece(self, index: int) -> Piece:
        if not 0 <= index < len(self._pieces):
            raise IndexError(f"Expected a piece below {len(self._pieces)}, got {index}")
        return self._pieces[index]

    def _cancel_all(self) -> None:
        for piece in self._pieces:
            self._cancel(piece)

    def _cancel(self, piece: Piece) -> None:
        if piece.is_cancelled:
            return
        piece.is_cancelled = True
        for part in piece.parts:
            part.chunk.num_live -= 1
            if part.chunk.state is State.QUEUED:
                part.is_skipped = True
                self.cancelled_nbytes += part.nbytes
                self._mark_read(part)
            if part.chunk.num_live == 0:
                self._drop_unwanted(part.chunk)

    def _mark_read(self, part: Part) -> None:
        piece = self._pieces[part.piece]
        piece.num_unread -= 1
        if piece.num_unread == 0:
            if self._num_uncopied == 1:
                self._copied = time.monotonic()
            self._num_uncopied -= 1
            self._monitor.add_event()

    def _drop_unwanted(self, chunk: Chunk) -> None:
        if chunk.state in (State.QUEUED, State.COPIED):
            self.cancelled_nbytes += sum(part.nbytes for part in chunk.parts if not part.is_skipped)
            self._finish(chunk, State.DROPPED)
        elif chunk.state is State.FAILED and chunk.rescued is not None:
            self.rescued_nbytes -= len(chunk.rescued)
            self._monitor.rescued_nbytes -= len(chunk.rescued)
            chunk.rescued = None

    def _begin_copy(self, chunk: Chunk) -> None:
        chunk.state = State.COPYING
        self._copy_begun = self._copy_begun or time.monotonic()

    def _begin_write(self, chunk: Chunk) -> None:
        chunk.state = State.WRITING
        self._write_begun = self._write_begun or time.monotonic()

    def _end_copy(self, chunk: Chunk) -> bool:
        chunk.state = State.COPIED
        self._free_sources(chunk)
        if chunk.num_live == 0:
            self._drop_unwanted(chunk)
        return chunk.state is State.COPIED

    def _free_sources(self, chunk: Chunk) -> None:
        for part in chunk.parts:
            if not part.is_skipped:
                self._mark_read(part)

    def _end_write(self, chunk: Chunk) -> None:
        self.written_nbytes += self.stored_nbytes(chunk)
        self._finish(chunk, State.WRITTEN)

    def stored_nbytes(self, chunk: Chunk) -> int:
        return chunk.nbytes

    def _fail_write(self, chunk: Chunk, number: int, rescued: bytes | bytearray | None) -> None:
        self._monitor.num_write_errors += 1
        if self.error is None:
            self.error = (number, self._offset + chunk.offset, chunk.nbytes)
        if chunk.num_live > 0 and rescued is not None:
            chunk.rescued = rescued
            self.rescued_nbytes += len(rescued)
            self._monitor.rescued_nbytes += len(rescued)
        self._finish(chunk, State.FAILED)

    def _finish(self, chunk: Chunk, state: State) -> None:
        chunk.state = state
        if chunk.slab is not None:
            chunk.slab.release()
            chunk.slab = None
            self._monitor.changed.notify_all()
        if self._num_unfinished == 1:
            self._done = time.monotonic()
        self._num_unfinished -= 1
        if self._num_unfinished == 0:
            self._monitor.inflight_nbytes -= self._nbytes
            self._monitor.num_pending -= 1
            self._monitor.add_event()


class Read(Owned):
    """The life of one read request: parts from the file or from memory."""

    def __init__(self, monitor: Monitor, num_parts: int) -> None:
        super().__init__()
        self._monitor = monitor
        self._num_unfinished = num_parts
        self._queued, self._read_begun, self._done = time.monotonic(), 0.0, 0.0
        self.is_awaited = False
        self.error: tuple[int, int, int, str] | None = None
        self.read_nbytes = 0
        self.forwarded_nbytes = 0

    @property
    def is_done(self) -> bool:
        self._check_process()
        return self._num_unfinished == 0

    def wait(self, timeout_seconds: float | None = None) -> bool:
        self._check_process()
        with self._monitor.changed:
            self._await()
            return self._monitor.changed.wait_for(lambda: self._num_unfinished == 0, timeout_seconds)

    @property
    def moments(self) -> tuple[float, float, float]:
        self._check_process()
        return self._queued, self._read_begun, self._done

    is_issued = is_done  # host memory knows no streams
    wait_issued = wait

    def make_wait(self, stream: int) -> None:
        self._check_process()

    def expedite(self) -> None:
        self._check_process()
        with self._monitor.changed:
            self._await()

    def _await(self) -> None:
        if not self.is_awaited and self._num_unfinished > 0:
            self.is_awaited = True
            self._monitor.num_awaited += 1

    def _begin(self) -> None:
        self._read_begun = self._read_begun or time.monotonic()

    def _finish(self, error: tuple[int, int, int, str] | None = None) -> None:
        if error is not None and self.error is None:
            self.error = error
        if self._num_unfinished == 1:
            self._done = time.monotonic()
        self._num_unfinished -= 1
        if self._num_unfinished == 0:
            self._monitor.num_awaited -= self.is_awaited
            self._monitor.num_pending -= 1
            self._monitor.add_event()
