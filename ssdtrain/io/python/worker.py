"""The threads of an engine. One moves bytes in memory: from slabs to readers first, then from sources to slabs.

The others serve the files, reads first; a file that does not answer never keeps from anyone what is in memory.
One condition guards all state; it is released while bytes move. `Workers` knows queues, retries and endings, and leaves
the moving to a subclass: `Core` here, with slabs and system calls, or another engine's.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from .monitor import Direction, Monitor, Pulse
from .requests import Chunk, Part, Pool, Read, Slab, State, Write
from .spill_file import File, SpillFile

_MAX_RETRIES = 2
_MAX_REFUSED = 1000  # then something is wrong and EAGAIN counts as an error
_Task = Callable[[], None]


class Fence(Protocol):
    """What has to be over before device memory may be touched."""

    @property
    def device_index(self) -> int:
        """The device whose memory it is."""

    def synchronize(self) -> None:
        """Blocks, without the GIL, until the memory may be read (its producer) or written (its last user)."""


def view_of(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


@dataclass(slots=True, eq=False)
class FetchJob:
    """A part of a read: from memory where `source` is set, else from the file."""

    read: Read
    write: Write
    part: Part
    address: int
    nbytes: int
    source: memoryview | None = None
    slab: Slab | None = None
    ready: Fence | None = None

    @property
    def file_offset(self) -> int:
        return self.write._offset + self.part.chunk.offset + self.part.chunk_offset


class EndOfFileError(OSError):
    """The file is shorter than what is asked of it."""


class _ChecksumError(OSError):
    """The file holds other bytes than were written."""


def _transfer(move: Callable[[memoryview, int], int], view: memoryview, offset: int, place: tuple[File, Pulse]) -> None:
    """Moves the whole view, continuing short transfers."""
    file, pulse = place
    done = 0
    while done < len(view):
        with pulse:
            moved = move(view[done:], offset + done)
        if file.is_direct and done + moved < len(view):
            moved -= moved % file.block_nbytes  # direct I/O can only continue at a block
        if moved == 0:
            raise EndOfFileError(errno.EIO, "end of file")
        done += moved


class Workers:
    """Queues and worker threads; the engine in front of them may be collected while they run."""

    kind: str
    takes_writes_in = State.COPIED  # what a chunk has to be for its turn to be written

    def __init__(self, files: list[File], has_checksum: bool) -> None:
        self.pid = os.getpid()
        self.files = files
        self.users = [file.user for file in files]
        self.fds = [file.acquire() if isinstance(file, SpillFile) else file.fd for file in files]
        self.pulses = [Pulse() for _ in files]  # held while the drive is asked for something
        self.has_checksum = has_checksum
        self.monitor = Monitor()
        self.forwards: deque[FetchJob] = deque()  # reads from memory
        self.fetches: deque[FetchJob] = deque()  # reads from a file
        self.to_copy: deque[tuple[Write, Chunk]] = deque()
        self.to_write: deque[tuple[Write, Chunk]] = deque()
        self.is_stopping = False
        self.threads: list[threading.Thread] = []

    def start(self, num_threads: int) -> None:
        takes = [self._take_in_memory] + [self._take_of_files] * num_threads
        for i, take in enumerate(takes):
            thread = threading.Thread(target=self._run, args=(take,), name=f"ssdtrain-{self.kind}-{i}", daemon=True)
            self.threads.append(thread)
            thread.start()

    def add(self, job: FetchJob) -> None:
        (self.fetches if job.source is None else self.forwards).append(job)

    def close(self, seconds: float | None = None) -> None:
        """Waits for what has begun, at most `seconds`: a file that does not answer keeps its thread and descriptor."""
        if os.getpid() != self.pid:
            return
        with self.monitor.changed:
            self.monitor.begin_close()
            self._cancel_queued()
            is_quiet = self.monitor.changed.wait_for(lambda: self.monitor.num_pending == 0, seconds)
            self.is_stopping = True
            self.monitor.changed.notify_all()
            if not is_quiet:
                return
            threads, self.threads = self.threads, []
            files, self.files = self.files, []
        for thread in threads:
            thread.join()
        self._let_go()
        for file in files:
            if isinstance(file, SpillFile):
                file.release()

    def _let_go(self) -> None:
        """Gives up what a subclass holds, when the threads are gone."""

    def _cancel_queued(self) -> None:
        for queue in (self.to_copy, self.to_write):
            for write, _ in tuple(queue):
                write._cancel_all()
            queue.clear()
        for job in (*self.forwards, *self.fetches):
            if job.slab is not None:
                job.slab.release()
            job.read._finish((errno.ECANCELED, job.file_offset, job.nbytes, "the engine was closed"))
        self.forwards.clear()
        self.fetches.clear()

    def _run(self, take: Callable[[], _Task | None]) -> None:
        while True:
            task: _Task | None = None

            def is_due() -> bool:
                nonlocal task
                task = None if self.is_stopping else take()
                return self.is_stopping or task is not None

            with self.monitor.changed:
                self.monitor.changed.wait_for(is_due)
            if task is None:
                return
            task()
            task = None  # a sleeping worker keeps no request alive

    def _take_in_memory(self) -> _Task | None:
        return partial(self._forward, self.forwards.popleft()) if self.forwards else None

    def _take_of_files(self) -> _Task | None:
        if self.fetches:
            job = self._next_fetch()
            job.read._begin()
            for direction in self._reading(job):
                direction.begin()
            return partial(self._fetch, job)
        while self.to_write:
            write, chunk = self.to_write.popleft()
            if chunk.state is self.takes_writes_in:
                write._begin_write(chunk)
                for direction in self._writing(write):
                    direction.begin()
                return partial(self._store, write, chunk)
        return None

    def _next_fetch(self) -> FetchJob:
        """One that somebody waits for before the others."""
        job = self.fetches[0]
        if self.monitor.num_awaited > 0:
            job = next((other for other in self.fetches if other.read.is_awaited), job)
        self.fetches.remove(job)
        return job

    def _writing(self, write: Write) -> tuple[Direction, Direction]:
        """Who counts it."""
        return self.monitor.totals.written, self.monitor.traffic[self.users[write._file]].written

    def _reading(self, job: FetchJob) -> tuple[Direction, Direction]:
        return self.monitor.totals.read, self.monitor.traffic[self.users[job.write._file]].read

    def _store(self, write: Write, chunk: Chunk) -> None:
        error = self._attempt(partial(self._write_file, write, chunk))
        rescued = self._rescue(write, chunk) if error is not None else None
        with self.monitor.changed:
            for direction in self._writing(write):
                direction.end(write.stored_nbytes(chunk) if error is None else 0)
            if error is None:
                write._end_write(chunk)
            else:
                write._fail_write(chunk, error.errno or errno.EIO, rescued)

    def _forward(self, job: FetchJob) -> None:
        error = self._attempt(partial(self._read_memory, job))
        with self.monitor.changed:
            if job.slab is not None:
                job.slab.release()
                self.monitor.changed.notify_all()
            if error is None:
                job.read.forwarded_nbytes += job.part.nbytes
            self._finish(job, error)

    def _fetch(self, job: FetchJob) -> None:
        error = self._attempt(partial(self._read_checked, job))
        with self.monitor.changed:
            for direction in self._reading(job):
                direction.end(job.nbytes if error is None else 0)
            if error is None:
                job.read.read_nbytes += job.nbytes
            self._finish(job, error)

    def _read_checked(self, job: FetchJob) -> None:
        self._read_file(job)
        if self.has_checksum and self._checksum(job) != job.part.checksum:
            text = "checksum mismatch: the bytes in the file are not those that were written"
            raise _ChecksumError(errno.EBADMSG, text)

    def _finish(self, job: FetchJob, error: OSError | None) -> None:
        if error is None:
            job.read._finish()
        else:
            self.monitor.num_read_errors += 1
            job.read._finish((error.errno or errno.EIO, job.file_offset, job.nbytes, str(error.strerror)))

    def _attempt(self, move: Callable[[], None]) -> OSError | None:
        num_failures = num_refused = 0
        while True:
            try:
                move()
            except (BlockingIOError, InterruptedError) as error:  # EAGAIN, EINTR: for now only
                num_refused += 1
                if num_refused > _MAX_REFUSED:
                    return error.with_traceback(None)
            except OSError as error:
                num_failures += 1
                if num_failures > _MAX_RETRIES or isinstance(error, (EndOfFileError, _ChecksumError)):
                    return error.with_traceback(None)  # whose frames would keep the request alive
                with self.monitor.changed:
                    self.monitor.num_retries += 1
            except MemoryError:
                return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            else:
                return None

    def _write_file(self, write: Write, chunk: Chunk) -> None:
        raise NotImplementedError

    def _read_file(self, job: FetchJob) -> None:
        raise NotImplementedError

    def _read_memory(self, job: FetchJob) -> None:
        raise NotImplementedError

    def _rescue(self, write: Write, chunk: Chunk) -> bytes | bytearray | None:
        """The bytes of a chunk that could not be written; None when they cannot be had."""
        raise NotImplementedError

    def _checksum(self, job: FetchJob) -> int:
        """Of what a read brought."""
        raise NotImplementedError

    def _end_buffered(self, file: int, offset: int, nbytes: int, *, is_write: bool) -> None:
        """Has a transfer through the page cache reach the drive, and leaves nothing of it in the cache."""
        if not self.files[file].is_direct:
            if is_write:
                with self.pulses[file]:
                    os.fdatasync(self.fds[file])
            os.posix_fadvise(self.fds[file], offset, nbytes, os.POSIX_FADV_DONTNEED)


class Core(Workers):
    """Slabs and system calls."""

    kind = "python"

    def __init__(self, files: list[File], pool: Pool, has_checksum: bool) -> None:
        super().__init__(files, has_checksum)
        self.pool = pool

    def _take_in_memory(self) -> _Task | None:
        forward = super()._take_in_memory()
        while forward is None and self.to_copy and self.pool.free:
            write, chunk = self.to_copy.popleft()
            if chunk.state is State.QUEUED:
                chunk.slab = self.pool.lease()
                write._begin_copy(chunk)
                return partial(self._copy, write, chunk)
        return forward

    def _copy(self, write: Write, chunk: Chunk) -> None:
        assert chunk.slab is not None
        view, filled = chunk.slab.view, 0
        for part in chunk.parts:
            if part.is_skipped:
                continue
            view[filled : part.chunk_offset] = bytes(part.chunk_offset - filled)
            filled = part.chunk_offset + part.nbytes
            source = write._pieces[part.piece].address + part.piece_offset
            target = view[part.chunk_offset : filled]
            ctypes.memmove(ctypes.addressof(ctypes.c_char.from_buffer(target)), source, part.nbytes)
            if self.has_checksum:
                part.checksum = zlib.crc32(target)
        view[filled : chunk.nbytes] = bytes(chunk.nbytes - filled)
        with self.monitor.changed:
            if self.monitor.is_closing:
                write._cancel_all()
            if write._end_copy(chunk):
                self.to_write.append((write, chunk))
                self.monitor.changed.notify_all()

    def _write_file(self, write: Write, chunk: Chunk) -> None:
        assert chunk.slab is not None
        file, fd = self.files[write._file], self.fds[write._file]
        view, offset = chunk.slab.view[: chunk.nbytes], write._offset + chunk.offset
        _transfer(lambda part, at: os.pwrite(fd, part, at), view, offset, (file, self.pulses[write._file]))
        self._end_buffered(write._file, offset, chunk.nbytes, is_write=True)

    def _rescue(self, write: Write, chunk: Chunk) -> bytes:
        assert chunk.slab is not None
        return bytes(chunk.slab.view[: chunk.nbytes])

    def _read_memory(self, job: FetchJob) -> None:
        assert job.source is not None
        view_of(job.address, job.part.nbytes)[:] = job.source[: job.part.nbytes]

    def _read_file(self, job: FetchJob) -> None:
        file, fd = self.files[job.write._file], self.fds[job.write._file]
        view = view_of(job.address, job.nbytes)
        pulse = self.pulses[job.write._file]
        _transfer(lambda part, at: os.preadv(fd, [part], at), view, job.file_offset, (file, pulse))
        self._end_buffered(job.write._file, job.file_offset, job.nbytes, is_write=False)

    def _checksum(self, job: FetchJob) -> int:
        return zlib.crc32(view_of(job.address, job.part.nbytes))
