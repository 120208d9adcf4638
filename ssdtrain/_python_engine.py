"""The engine in plain Python: the reference for `ssdtrain._C`, and what runs where that is not built.

Same interface and same promises (`ssdtrain.engine` documents them), with ordinary threads and less speed. Knows
addresses and files, no tensors.

One condition guards all state; it is released while bytes move. Worker threads serve reads first, then copy sources
into free slabs, then write slabs to the file.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import secrets
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Protocol

_PAGE_NBYTES = 4096
_MAX_RETRIES = 2
_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.ENOSYS})
_NO_FALLOCATE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})
_NOT_DIRECT = frozenset({errno.EINVAL, errno.EOPNOTSUPP})


def _view(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def _round_up(nbytes: int, block: int) -> int:
    return -(-nbytes // block) * block


class _Owned:
    """Refuses use in a process other than the one that made it."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            name = type(self).__name__
            raise RuntimeError(
                f"Expected {name} to be used in the process that opened it, got a forked child; "
                "open another one in the child"
            )


# ---------------------------------------------------------------------------------------------- spill file


def _open_unlinked(directory: str) -> int:
    flags = os.O_RDWR | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(directory, flags | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise
    path = os.path.join(directory, f".ssdtrain-{secrets.token_hex(8)}.spill")
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise OSError(error.errno, error.strerror, directory) from error
    os.unlink(path)
    return fd


def _logical_block_nbytes(fd: int) -> int:
    device = os.fstat(fd).st_dev
    base = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for tail in ("/queue/logical_block_size", "/../queue/logical_block_size"):
        with suppress(OSError, ValueError), open(base + tail) as file:
            return int(file.read())
    return 0


def _set_direct(fd: int, on: bool) -> None:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)


def _try_one_block(fd: int, block: int) -> None:
    with mmap.mmap(-1, max(_PAGE_NBYTES, 2 * block)) as memory, memoryview(memory) as view:
        view[:block] = b"\x5a" * block
        with view[:block] as out, view[block : 2 * block] as back:
            if os.pwrite(fd, out, 0) != block or os.preadv(fd, [back], 0) != block or back != out:
                raise OSError(errno.EIO, os.strerror(errno.EIO))


def _enable_direct(fd: int, directory: str) -> tuple[int, bool, str]:
    """Block size, whether direct, and why; leaves the file empty."""
    least = max(512, _logical_block_nbytes(fd))
    try:
        _set_direct(fd, True)
    except OSError:
        return least, False, "buffered: the file system refuses O_DIRECT"
    for block in sorted({least, max(least, _PAGE_NBYTES)}):
        try:
            _try_one_block(fd, block)
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                raise OSError(error.errno, error.strerror, directory) from error
            continue
        os.ftruncate(fd, 0)
        return block, True, f"direct: {block}-byte blocks, found by trying"
    _set_direct(fd, False)
    return least, False, "buffered: direct writes of 512 and 4096 bytes are refused"


def _fallocate(fd: int, start: int, stop: int) -> int:
    """0 or errno. Not `os.posix_fallocate`, which writes zeros where the file system cannot reserve."""
    call = ctypes.CDLL(None, use_errno=True).fallocate
    while call(fd, 0, ctypes.c_longlong(start), ctypes.c_longlong(stop - start)) != 0:
        if ctypes.get_errno() != errno.EINTR:
            return ctypes.get_errno()
    return 0


class SpillFile(_Owned):
    """One preallocated, already unlinked file in a directory."""

    def __init__(self, directory: str, cap_nbytes: int | None = None) -> None:
        super().__init__()
        self.directory = directory
        self.cap_nbytes = cap_nbytes
        self.nbytes = 0
        self.fallocate_reason = ""
        fd = _open_unlinked(directory)
        self._closer = weakref.finalize(self, _close_in, self._pid, fd)
        self._fd: int | None = fd
        self._users = 0
        self._is_closing = False
        self._lock = threading.Lock()
        self.block_nbytes, self.is_direct, self.direct_reason = _enable_direct(fd, directory)
        self.memory_alignment = self.block_nbytes if self.is_direct else 1

    @property
    def fd(self) -> int:
        self._check_process()
        if self._fd is None or self._is_closing:
            raise RuntimeError(
                f"Expected an open spill file, got a closed one in {self.directory}; open a new SpillFile"
            )
        return self._fd

    def grow(self, nbytes: int) -> None:
        self._check_process()
        if self.cap_nbytes is not None and nbytes > self.cap_nbytes:
            message = f"Expected at most cap_nbytes={self.cap_nbytes} bytes in the spill file, got {nbytes}"
            raise OSError(errno.EDQUOT, message, self.directory)
        target = _round_up(nbytes, self.block_nbytes)
        if self.cap_nbytes is not None:
            target = min(target, self.cap_nbytes // self.block_nbytes * self.block_nbytes)
        with self._lock:
            if target > self.nbytes:
                self._reserve(self.fd, target)
                self.nbytes = target

    def _reserve(self, fd: int, target: int) -> None:
        number = _fallocate(fd, self.nbytes, target)
        if number in _NO_FALLOCATE:
            self.fallocate_reason = "the file system has no fallocate: space is not reserved ahead"
            os.ftruncate(fd, target)
            return
        if number != 0:
            with suppress(OSError):  # a fallocate that fails half way may have lengthened the file
                os.ftruncate(fd, self.nbytes)
            raise OSError(number, os.strerror(number), self.directory)

    def close(self) -> None:
        self._check_process()
        with self._lock:
            self._is_closing = True
            self._close_if_unused()

    def acquire(self) -> int:
        """The descriptor, kept open until `release`: an engine uses it."""
        with self._lock:
            self._users += 1
            return self.fd

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._is_closing and self._users == 0:
            self._closer()
            self._fd = None


def _close_in(pid: int, fd: int) -> None:
    if os.getpid() == pid:
        os.close(fd)


class _File(Protocol):
    @property
    def fd(self) -> int: ...
    @property
    def directory(self) -> str: ...
    @property
    def block_nbytes(self) -> int: ...
    @property
    def memory_alignment(self) -> int: ...
    @property
    def is_direct(self) -> bool: ...
    @property
    def nbytes(self) -> int: ...


# ------------------------------------------------------------------------------------------------ requests


class _State(Enum):
    QUEUED = auto()  # waits for a slab
    COPYING = auto()
    COPIED = auto()  # in a slab, waits for its turn to be written
    WRITING = auto()
    WRITTEN = auto()
    FAILED = auto()  # the bytes are kept in memory
    DROPPED = auto()  # nobody wants it any more


@dataclass(slots=True, eq=False)
class _Slab:
    """A slab on loan to a chunk and to the reads that copy from it."""

    pool: _Pool
    index: int
    view: memoryview
    num_users: int = 1

    def release(self) -> None:
        self.num_users -= 1
        if self.num_users == 0:
            self.pool.free.append(self.index)


class _Pool:
    """Staging memory in slabs. Used under the engine's condition."""

    def __init__(self, num_slabs: int, slab_nbytes: int) -> None:
        self.slab_nbytes = slab_nbytes
        self.num_slabs = num_slabs
        self.peak_nbytes = 0
        self.free = list(range(num_slabs))
        memory = mmap.mmap(-1, num_slabs * slab_nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):
            memory.madvise(mmap.MADV_DONTFORK)
        self._view = memoryview(memory)

    @property
    def in_use_nbytes(self) -> int:
        return (self.num_slabs - len(self.free)) * self.slab_nbytes

    def lease(self) -> _Slab:
        index = self.free.pop()
        self.peak_nbytes = max(self.peak_nbytes, self.in_use_nbytes)
        start = index * self.slab_nbytes
        return _Slab(self, index, self._view[start : start + self.slab_nbytes])


@dataclass(slots=True, eq=False)
class _Part:
    """The part of one piece that lies in one chunk."""

    piece: int
    chunk: _Chunk
    piece_offset: int
    chunk_offset: int
    nbytes: int
    checksum: int = 0
    is_skipped: bool = False


@dataclass(slots=True, eq=False)
class _Chunk:
    """One slab's worth of an extent."""

    offset: int
    nbytes: int
    parts: list[_Part] = field(default_factory=list)
    num_live: int = 0
    state: _State = _State.QUEUED
    slab: _Slab | None = None
    rescued: bytes | None = None


@dataclass(slots=True, eq=False)
class _Piece:
    address: int
    nbytes: int
    offset: int
    parts: list[_Part] = field(default_factory=list)
    num_unread: int = 0
    is_cancelled: bool = False


class _Clock:
    """Seconds with at least one transfer in flight."""

    def __init__(self) -> None:
        self._num_active = 0
        self._started = 0.0
        self._seconds = 0.0

    def begin(self) -> None:
        if self._num_active == 0:
            self._started = time.monotonic()
        self._num_active += 1

    def end(self) -> None:
        self._num_active -= 1
        if self._num_active == 0:
            self._seconds += time.monotonic() - self._started

    @property
    def seconds(self) -> float:
        running = time.monotonic() - self._started if self._num_active else 0.0
        return self._seconds + running


class _Monitor:
    """What an engine shares with its requests, which may outlive it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.is_closing = False
        self.num_pending = 0
        self.inflight_nbytes = 0
        self.num_events = 0
        self.written_nbytes = 0
        self.read_nbytes = 0
        self.num_retries = 0
        self.num_write_errors = 0
        self.num_read_errors = 0
        self.rescued_nbytes = 0
        self.write_clock = _Clock()
        self.read_clock = _Clock()

    def add_event(self) -> None:
        self.num_events += 1
        self.changed.notify_all()


class Write(_Owned):
    """The life of one write request; methods with an underscore need the monitor's condition."""

    def __init__(self, monitor: _Monitor, place: tuple[int, int, int], pieces: list[_Piece], step: int) -> None:
        super().__init__()
        self._monitor = monitor
        self._file, self._offset, self._nbytes = place
        self._pieces = pieces
        self._chunks = [_Chunk(at, min(step, self._nbytes - at)) for at in range(0, self._nbytes, step)]
        for i, piece in enumerate(pieces):
            self._split(i, piece, step)
        self._chunks = [chunk for chunk in self._chunks if chunk.parts]
        self._num_uncopied = len(pieces)
        self._num_unfinished = len(self._chunks)
        self.error: tuple[int, int, int] | None = None
        self.written_nbytes = 0
        self.cancelled_nbytes = 0
        self.rescued_nbytes = 0

    def __del__(self) -> None:
        if getattr(self, "_pid", None) == os.getpid():
            kept = sum(len(chunk.rescued) for chunk in self._chunks if chunk.rescued is not None)
            self._monitor.rescued_nbytes -= kept

    def _split(self, index: int, piece: _Piece, step: int) -> None:
        done = 0
        while done < piece.nbytes:
            at = piece.offset + done
            chunk = self._chunks[at // step]
            nbytes = min(piece.nbytes - done, chunk.offset + chunk.nbytes - at)
            part = _Part(index, chunk, done, at - chunk.offset, nbytes)
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

    def is_piece_copied(self, piece: int) -> bool:
        self._check_process()
        return self._piece(piece).num_unread == 0

    def cancel(self, piece: int) -> None:
        self._check_process()
        with self._monitor.changed:
            self._cancel(self._piece(piece))

    def wait(self) -> None:
        self._check_process()
        with self._monitor.changed:
            self._monitor.changed.wait_for(lambda: self._num_unfinished == 0)

    def wait_copied(self) -> None:
        self._check_process()
        with self._monitor.changed:
            self._monitor.changed.wait_for(lambda: self._num_uncopied == 0)

    def _piece(self, index: int) -> _Piece:
        if not 0 <= index < len(self._pieces):
            raise IndexError(f"Expected a piece below {len(self._pieces)}, got {index}")
        return self._pieces[index]

    def _cancel_all(self) -> None:
        for piece in self._pieces:
            self._cancel(piece)

    def _cancel(self, piece: _Piece) -> None:
        if piece.is_cancelled:
            return
        piece.is_cancelled = True
        for part in piece.parts:
            part.chunk.num_live -= 1
            if part.chunk.state is _State.QUEUED:
                part.is_skipped = True
                self.cancelled_nbytes += part.nbytes
                self._mark_read(part)
            if part.chunk.num_live == 0:
                self._drop_unwanted(part.chunk)

    def _mark_read(self, part: _Part) -> None:
        piece = self._pieces[part.piece]
        piece.num_unread -= 1
        if piece.num_unread == 0:
            self._num_uncopied -= 1
            self._monitor.add_event()

    def _drop_unwanted(self, chunk: _Chunk) -> None:
        if chunk.state in (_State.QUEUED, _State.COPIED):
            self.cancelled_nbytes += sum(part.nbytes for part in chunk.parts if not part.is_skipped)
            self._finish(chunk, _State.DROPPED)
        elif chunk.state is _State.FAILED and chunk.rescued is not None:
            self.rescued_nbytes -= chunk.nbytes
            self._monitor.rescued_nbytes -= chunk.nbytes
            chunk.rescued = None

    def _end_copy(self, chunk: _Chunk) -> bool:
        chunk.state = _State.COPIED
        for part in chunk.parts:
            if not part.is_skipped:
                self._mark_read(part)
        if chunk.num_live == 0:
            self._drop_unwanted(chunk)
        return chunk.state is _State.COPIED

    def _end_write(self, chunk: _Chunk) -> None:
        self.written_nbytes += chunk.nbytes
        self._monitor.written_nbytes += chunk.nbytes
        self._finish(chunk, _State.WRITTEN)

    def _fail_write(self, chunk: _Chunk, number: int) -> None:
        self._monitor.num_write_errors += 1
        if self.error is None:
            self.error = (number, self._offset + chunk.offset, chunk.nbytes)
        if chunk.num_live > 0 and chunk.slab is not None:
            chunk.rescued = bytes(chunk.slab.view[: chunk.nbytes])
            self.rescued_nbytes += chunk.nbytes
            self._monitor.rescued_nbytes += chunk.nbytes
        self._finish(chunk, _State.FAILED)

    def _finish(self, chunk: _Chunk, state: _State) -> None:
        chunk.state = state
        if chunk.slab is not None:
            chunk.slab.release()
            chunk.slab = None
            self._monitor.changed.notify_all()
        self._num_unfinished -= 1
        if self._num_unfinished == 0:
            self._monitor.inflight_nbytes -= self._nbytes
            self._monitor.num_pending -= 1
            self._monitor.add_event()


class Read(_Owned):
    """The life of one read request: parts from the file or from memory."""

    def __init__(self, monitor: _Monitor, num_parts: int) -> None:
        super().__init__()
        self._monitor = monitor
        self._num_unfinished = num_parts
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
            return self._monitor.changed.wait_for(lambda: self._num_unfinished == 0, timeout_seconds)

    def _finish(self, error: tuple[int, int, int, str] | None = None) -> None:
        if error is not None and self.error is None:
            self.error = error
        self._num_unfinished -= 1
        if self._num_unfinished == 0:
            self._monitor.num_pending -= 1
            self._monitor.add_event()


# -------------------------------------------------------------------------------------------- moving bytes


@dataclass(slots=True, eq=False)
class _FetchJob:
    """A part of a read: from memory where `source` is set, else from the file."""

    read: Read
    write: Write
    part: _Part
    address: int
    nbytes: int
    source: memoryview | None = None
    slab: _Slab | None = None

    @property
    def file_offset(self) -> int:
        return self.write._offset + self.part.chunk.offset + self.part.chunk_offset


class _EndOfFileError(OSError):
    """The file is shorter than what is asked of it."""


def _transfer(move: Callable[[memoryview, int], int], view: memoryview, offset: int, file: _File) -> None:
    """Moves the whole view, continuing short transfers."""
    done = 0
    while done < len(view):
        moved = move(view[done:], offset + done)
        if file.is_direct and done + moved < len(view):
            moved -= moved % file.block_nbytes  # direct I/O can only continue at a block
        if moved == 0:
            raise _EndOfFileError(errno.EIO, "end of file")
        done += moved


class _Core:
    """Queues and worker threads; the engine in front of it may be collected while they run."""

    def __init__(self, files: list[_File], pool: _Pool, has_checksum: bool) -> None:
        self.pid = os.getpid()
        self.files = files
        self.fds = [file.acquire() if isinstance(file, SpillFile) else file.fd for file in files]
        self.pool = pool
        self.has_checksum = has_checksum
        self.monitor = _Monitor()
        self.fetches: deque[_FetchJob] = deque()
        self.to_copy: deque[tuple[Write, _Chunk]] = deque()
        self.to_write: deque[tuple[Write, _Chunk]] = deque()
        self.is_stopping = False
        self.threads: list[threading.Thread] = []

    def start(self, num_threads: int) -> None:
        for i in range(num_threads):
            thread = threading.Thread(target=self._run, name=f"ssdtrain-python-{i}", daemon=True)
            self.threads.append(thread)
            thread.start()

    def close(self) -> None:
        if os.getpid() != self.pid:
            return
        with self.monitor.changed:
            self.monitor.is_closing = True
            self._cancel_queued()
            self.monitor.changed.wait_for(lambda: self.monitor.num_pending == 0)
            self.is_stopping = True
            self.monitor.changed.notify_all()
            threads, self.threads = self.threads, []
            files, self.files = self.files, []
        for thread in threads:
            thread.join()
        for file in files:
            if isinstance(file, SpillFile):
                file.release()

    def _cancel_queued(self) -> None:
        for queue in (self.to_copy, self.to_write):
            for write, _ in tuple(queue):
                write._cancel_all()
            queue.clear()
        for job in self.fetches:
            if job.slab is not None:
                job.slab.release()
            job.read._finish((errno.ECANCELED, job.file_offset, job.nbytes, "the engine was closed"))
        self.fetches.clear()

    def _run(self) -> None:
        while True:
            with self.monitor.changed:
                self.monitor.changed.wait_for(lambda: self.is_stopping or self._has_work())
                if self.is_stopping:
                    return
                task = self._take()
            if task is not None:
                task()
            task = None  # a sleeping worker keeps no request alive

    def _has_work(self) -> bool:
        return bool(self.fetches or self.to_write or (self.to_copy and self.pool.free))

    def _take(self) -> Callable[[], None] | None:
        if self.fetches:
            fetch = self.fetches.popleft()
            if fetch.source is None:
                self.monitor.read_clock.begin()
            return lambda: self._fetch(fetch)
        while self.to_copy and self.pool.free:
            write, chunk = self.to_copy.popleft()
            if chunk.state is _State.QUEUED:
                chunk.state, chunk.slab = _State.COPYING, self.pool.lease()
                return lambda: self._copy(write, chunk)
        while self.to_write:
            write, chunk = self.to_write.popleft()
            if chunk.state is _State.COPIED:
                chunk.state = _State.WRITING
                self.monitor.write_clock.begin()
                return lambda: self._store(write, chunk)
        return None

    def _copy(self, write: Write, chunk: _Chunk) -> None:
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

    def _store(self, write: Write, chunk: _Chunk) -> None:
        assert chunk.slab is not None
        file, fd = self.files[write._file], self.fds[write._file]
        view, offset = chunk.slab.view[: chunk.nbytes], write._offset + chunk.offset

        def move() -> None:
            _transfer(lambda part, at: os.pwrite(fd, part, at), view, offset, file)
            if not file.is_direct:
                os.fdatasync(fd)
                os.posix_fadvise(fd, offset, chunk.nbytes, os.POSIX_FADV_DONTNEED)

        error = self._attempt(move)
        with self.monitor.changed:
            self.monitor.write_clock.end()
            if error is None:
                write._end_write(chunk)
            else:
                write._fail_write(chunk, error.errno or errno.EIO)

    def _fetch(self, job: _FetchJob) -> None:
        if job.source is None:
            self._fetch_from_file(job)
            return
        nbytes = job.part.nbytes
        _view(job.address, nbytes)[:] = job.source[:nbytes]
        with self.monitor.changed:
            if job.slab is not None:
                job.slab.release()
                self.monitor.changed.notify_all()
            job.read.forwarded_nbytes += nbytes
            job.read._finish()

    def _fetch_from_file(self, job: _FetchJob) -> None:
        file, fd = self.files[job.write._file], self.fds[job.write._file]
        view = _view(job.address, job.nbytes)

        def move() -> None:
            _transfer(lambda part, at: os.preadv(fd, [part], at), view, job.file_offset, file)
            if not file.is_direct:
                os.posix_fadvise(fd, job.file_offset, job.nbytes, os.POSIX_FADV_DONTNEED)

        error = self._attempt(move)
        if error is None and self.has_checksum and zlib.crc32(view[: job.part.nbytes]) != job.part.checksum:
            text = "checksum mismatch: the bytes in the file are not those that were written"
            error = OSError(errno.EBADMSG, text)
        with self.monitor.changed:
            self.monitor.read_clock.end()
            if error is None:
                job.read.read_nbytes += job.nbytes
                self.monitor.read_nbytes += job.nbytes
                job.read._finish()
            else:
                self.monitor.num_read_errors += 1
                number = error.errno or errno.EIO
                job.read._finish((number, job.file_offset, job.nbytes, str(error.strerror)))

    def _attempt(self, move: Callable[[], None]) -> OSError | None:
        for attempt in range(_MAX_RETRIES + 1):
            try:
                move()
            except OSError as error:
                if attempt == _MAX_RETRIES or isinstance(error, _EndOfFileError):
                    return error.with_traceback(None)  # whose frames would keep the request alive
                with self.monitor.changed:
                    self.monitor.num_retries += 1
            else:
                return None
        raise AssertionError("the last attempt returns")


# -------------------------------------------------------------------------------------------------- engine


def _check_pieces(pieces: Iterable[_Piece], extent_nbytes: int, block: int) -> None:
    least = 0
    for piece in pieces:
        end = piece.offset + piece.nbytes
        if piece.nbytes <= 0 or piece.offset < least or piece.offset % block != 0 or end > extent_nbytes:
            raise ValueError(
                f"Expected pieces of at least one byte, sorted, apart, each at a multiple of {block} bytes inside "
                f"the extent of {extent_nbytes}, got {piece.nbytes} bytes at {piece.offset}"
            )
        least = end
    if least == 0:
        raise ValueError("Expected at least one piece, got none")


def _check_sizes(files: list[_File], staging_nbytes: int, slab_nbytes: int) -> None:
    if not files:
        raise ValueError("Expected at least one spill file, got none")
    for step in (_PAGE_NBYTES, *(file.block_nbytes for file in files)):
        if slab_nbytes <= 0 or slab_nbytes % step != 0:
            raise ValueError(f"Expected slab_nbytes to be a multiple of {step}, got {slab_nbytes}")
    if staging_nbytes < slab_nbytes:
        raise ValueError(f"Expected staging_nbytes to hold one slab of {slab_nbytes} bytes, got {staging_nbytes}")


class PythonEngine(_Owned):
    """The engine for `ssdtrain.engine.open_engine` kind ``"python"``."""

    kind = "python"
    registered_buffers = False

    def __init__(
        self,
        files: Iterable[Any],
        staging_nbytes: int,
        slab_nbytes: int,
        checksum: bool = False,
        num_threads: int = 2,
    ) -> None:
        super().__init__()
        targets: list[_File] = list(files)
        _check_sizes(targets, staging_nbytes, slab_nbytes)
        self.slab_nbytes = slab_nbytes
        self.staging_nbytes = staging_nbytes // slab_nbytes * slab_nbytes
        self.notes: list[str] = []
        self._core = _Core(targets, _Pool(staging_nbytes // slab_nbytes, slab_nbytes), checksum)
        self._monitor = self._core.monitor
        self._closer = weakref.finalize(self, self._core.close)
        self._core.start(num_threads)

    def write(self, file: int, offset: int, nbytes: int, pieces: list[tuple[int, int, int]]) -> Write:
        self._check_open()
        if not 0 <= file < len(self._core.files):
            raise ValueError(f"Expected a file index below {len(self._core.files)}, got {file}")
        self._check_extent(file, offset, nbytes)
        sources = [_Piece(*piece) for piece in pieces]
        _check_pieces(sources, nbytes, self._core.files[file].block_nbytes)
        write = Write(self._monitor, (file, offset, nbytes), sources, self.slab_nbytes)
        with self._monitor.changed:
            self._check_open()
            self._monitor.num_pending += 1
            self._monitor.inflight_nbytes += nbytes
            self._core.to_copy.extend((write, chunk) for chunk in write._chunks)
            self._monitor.changed.notify_all()
        return write

    def read(self, write: Write, piece: int, address: int, capacity: int) -> Read:
        self._check_open()
        source = write._piece(piece)
        self._check_destination(write, source, address, capacity)
        with self._monitor.changed:
            self._check_open()
            if source.num_unread > 0 or source.is_cancelled:
                raise RuntimeError(
                    f"Expected piece {piece} to be copied and not cancelled, got one that is not; "
                    "wait for is_piece_copied"
                )
            read = Read(self._monitor, len(source.parts))
            self._monitor.num_pending += 1
            for part in source.parts:
                self._core.fetches.append(self._fetch_job(read, write, part, address + part.piece_offset))
            self._monitor.changed.notify_all()
        return read

    def _fetch_job(self, read: Read, write: Write, part: _Part, address: int) -> _FetchJob:
        chunk, start = part.chunk, part.chunk_offset
        nbytes = _round_up(part.nbytes, self._core.files[write._file].block_nbytes)
        job = _FetchJob(read, write, part, address, nbytes)
        if chunk.slab is not None:
            chunk.slab.num_users += 1
            job.slab, job.source = chunk.slab, chunk.slab.view[start:]
        elif chunk.rescued is not None:
            job.source = memoryview(chunk.rescued)[start:]
        return job

    def wait_inflight(self, max_nbytes: int, timeout_seconds: float | None = None) -> bool:
        self._check_process()
        monitor = self._monitor
        with monitor.changed:
            return monitor.changed.wait_for(lambda: monitor.inflight_nbytes <= max_nbytes, timeout_seconds)

    def drain(self) -> None:
        self._check_process()
        with self._monitor.changed:
            self._monitor.changed.wait_for(lambda: self._monitor.num_pending == 0)

    def close(self) -> None:
        self._check_process()
        self._closer()

    def _check_open(self) -> None:
        self._check_process()
        if self._monitor.is_closing:
            raise RuntimeError("Expected an open engine, got a closed one; open another engine")

    def _check_extent(self, file: int, offset: int, nbytes: int) -> None:
        target = self._core.files[file]
        block, limit = target.block_nbytes, target.nbytes
        is_aligned = offset % block == 0 and nbytes % block == 0
        if not is_aligned or nbytes <= 0 or offset < 0 or offset + nbytes > limit:
            raise ValueError(
                f"Expected an extent aligned to {block} bytes inside the first {limit} bytes of file {file}, got "
                f"offset {offset}, nbytes {nbytes}; grow the spill file first"
            )

    def _check_destination(self, write: Write, piece: _Piece, address: int, capacity: int) -> None:
        target = self._core.files[write._file]
        needed = _round_up(piece.nbytes, target.block_nbytes)
        if capacity < needed:
            raise ValueError(
                f"Expected a capacity of at least {needed} bytes (the piece in whole blocks), got {capacity}"
            )
        if address % target.memory_alignment != 0:
            raise ValueError(
                f"Expected an address aligned to memory_alignment={target.memory_alignment}, got {address}"
            )

    @property
    def is_closed(self) -> bool:
        self._check_process()
        return self._monitor.is_closing

    @property
    def staging_in_use_nbytes(self) -> int:
        return self._core.pool.in_use_nbytes

    @property
    def peak_staging_nbytes(self) -> int:
        return self._core.pool.peak_nbytes

    @property
    def num_events(self) -> int:
        return self._monitor.num_events

    @property
    def inflight_nbytes(self) -> int:
        return self._monitor.inflight_nbytes

    @property
    def written_nbytes(self) -> int:
        return self._monitor.written_nbytes

    @property
    def read_nbytes(self) -> int:
        return self._monitor.read_nbytes

    @property
    def num_retries(self) -> int:
        return self._monitor.num_retries

    @property
    def num_write_errors(self) -> int:
        return self._monitor.num_write_errors

    @property
    def num_read_errors(self) -> int:
        return self._monitor.num_read_errors

    @property
    def rescued_nbytes(self) -> int:
        return self._monitor.rescued_nbytes

    @property
    def write_busy_seconds(self) -> float:
        return self._monitor.write_clock.seconds

    @property
    def read_busy_seconds(self) -> float:
        return self._monitor.read_clock.seconds
