"""An engine for files that others know, and a file that it has open.

Any range, memory at any address, whoever wrote the bytes: whole pages go past the page cache, straight to the memory
or through a slab where that is not aligned, and what is left at both ends through the cache, in exactly its bytes.

    with FileEngine() as engine, engine.open("/mnt/nvme/weights.bin", "rw") as file:
        writes = [file.write(chunk, offset) for offset, chunk in chunks]     # begin at once
        for write in writes:
            write.result()                                                  # all bytes are there, or OSError
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import threading
import weakref
from collections import Counter
from typing import Any

from ssdtrain.io.extension import UnavailableError, extension
from ssdtrain.io.files.paths import absolute_path
from ssdtrain.io.named.memory import Memory
from ssdtrain.io.named.request import Flight, Request, Task, Watcher
from ssdtrain.policy import parse_nbytes

logger = logging.getLogger("ssdtrain")

ENGINES = ("auto", "io_uring", "threads")
_PAGE = 4096
_MODES = {
    "r": os.O_RDONLY,
    "r+": os.O_RDWR,
    "rw": os.O_RDWR | os.O_CREAT,
    "w": os.O_RDWR | os.O_CREAT | os.O_TRUNC,
    "x": os.O_RDWR | os.O_CREAT | os.O_EXCL,
}


class FileEngine:
    """Reads and writes files in the background. Thread-safe; unusable in a forked child.

    Requests are served in no order but that reads go before writes: wait for one before another that overlaps it.
    Leaving it as a context manager waits for all of them and raises what nobody was told of, as `synchronize` does;
    after an exception it only closes, and after a `close` that was not over in time it waits no longer.
    """

    def __init__(
        self,
        *,
        block_nbytes: int | str = "1MiB",
        queue_depth: int = 32,
        num_threads: int = 4,
        engine: str = "auto",
    ) -> None:
        """Starts its threads.

        Args:
            block_nbytes: the most bytes the drive is asked for at once, rounded up to whole pages.
            queue_depth: the most it is asked for at a time. A slab of `block_nbytes` for each is taken where memory is
                not aligned.
            num_threads: of engine ``"threads"``, which serve as many requests at a time.
            engine: ``"io_uring"``, ``"threads"``, or ``"auto"`` for the first that works here; see `fallbacks`.

        Raises:
            ValueError: a number is not positive, or the engine unknown.
            RuntimeError: the C++ extension cannot be used, or the engine asked for by name does not work here.
        """
        if engine not in ENGINES:
            raise ValueError(f"Expected an engine among {', '.join(ENGINES)}, got {engine!r}")
        given = {"block_nbytes": parse_nbytes(block_nbytes), "queue_depth": queue_depth, "num_threads": num_threads}
        block, depth, threads = (_at_least_one(name, value) for name, value in given.items())
        self.block_nbytes = -(-block // _PAGE) * _PAGE
        self.queue_depth = depth
        self.fallbacks: list[str] = []
        """Why it is not the fastest engine, if so."""
        self._engine, self.kind = self._open(engine, threads)
        self._lock = threading.Lock()
        self._pending: dict[int, Flight] = {}
        self._is_closing = False
        self._num_before_pruning = 2 * depth
        self._watcher = Watcher(self._engine)
        self._closer = weakref.finalize(self, _close, self._engine, self._watcher, self._pending)

    def __repr__(self) -> str:
        state = "closed" if self._engine.is_closed else "closing" if self._is_closing else "open"
        return f"<FileEngine {self.kind}, {self.queue_depth} x {self.block_nbytes} bytes, {state}>"

    def __enter__(self) -> FileEngine:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._is_closing:
            with contextlib.suppress(TimeoutError):
                self.close(0.0)
            return
        try:
            if kind is None and not self._engine.is_closed:
                self.synchronize()
        finally:
            self.close()

    def _open(self, asked: str, num_threads: int) -> tuple[Any, str]:
        try:
            module = extension()
        except UnavailableError as error:
            raise RuntimeError(f"Expected the C++ engine for files, got: {error}") from error
        block, depth = self.block_nbytes, self.queue_depth
        options: dict[str, Any] = {"num_threads": num_threads, "queue_depth": depth}
        for kind in ENGINES[1:] if asked == "auto" else (asked,):
            try:
                return module.Engine(kind, [], depth * block, block, **options), kind
            except OSError as error:
                if kind == asked or kind == "threads":
                    raise RuntimeError(f"Expected engine {kind!r} to work here, got: {error}; use 'auto'") from error
                self.fallbacks.append(f"engine {kind} is not available: {error}")
                logger.warning("%s", self.fallbacks[-1])
        raise AssertionError("threads work everywhere")

    def open(self, path: str | os.PathLike[str] | int, mode: str = "r", *, direct: bool = True) -> File:
        """Opens a regular file, or anew the one behind a descriptor, which stays the caller's.

        Args:
            path: the file. A descriptor's mode is its own.
            mode: ``"r"``; ``"r+"`` to write too; ``"rw"`` makes it where it is missing; ``"w"`` makes or empties it;
                ``"x"`` makes it.
            direct: past the page cache where the file system can.

        Raises:
            OSError: it cannot be opened.
            ValueError: the mode is unknown, or the path none.
        """
        if mode not in _MODES:
            raise ValueError(f"Expected a mode among {', '.join(_MODES)}, got {mode!r}")
        if isinstance(path, int):
            name, flags = _name_of(path), fcntl.fcntl(path, fcntl.F_GETFL) & os.O_ACCMODE
            return File(self, f"/proc/self/fd/{path}", name, flags, direct)
        name = absolute_path(path, "a file")
        return File(self, name, name, _MODES[mode], direct)

    def synchronize(self) -> None:
        """Waits until nothing is queued or under way.

        Raises:
            OSError: the first error of a request that nobody has asked for its result.
        """
        self._engine.drain()
        self._prune()
        with self._lock:
            untold = [flight for flight in self._pending.values() if flight.is_done and flight.has_news]
        errors = [flight.tell() for flight in untold]
        if errors and errors[0] is not None:
            raise errors[0]

    def close(self, timeout: float | None = None) -> None:
        """Cancels what has not begun, waits for what has, calls the last callbacks. Idempotent.

        Args:
            timeout: seconds to wait for what has begun, at most; None for as long as it takes.

        Raises:
            TimeoutError: requests are still with the drive, and it says with which files. They keep their memory, no
                others begin, and `close` can be called again.
            ValueError: `timeout` is no time.
        """
        if timeout is not None:
            if not timeout >= 0:
                raise ValueError(f"Expected a timeout of 0 or more seconds, or None, got {timeout!r}")
            late = self._outlast(timeout) if self._closer.alive else []
            if late:
                names = Counter([flight.task.name for flight in late])
                where = ", ".join([f"{num} on {name!r}" for name, num in names.items()])
                raise TimeoutError(
                    errno.ETIMEDOUT,
                    f"Expected all requests to be done within {timeout} s of close(), got {len(late)} that are not,"
                    f" {where}; their memory stays in use: close again when the drive answers",
                )
        self._closer()

    def _outlast(self, timeout_seconds: float) -> list[Flight]:
        """Begins nothing any more, and waits; what is not done then."""
        with self._lock:
            self._is_closing = True
            flights = list(self._pending.values())
        try:
            for flight in flights:
                flight.handle.cancel()
            self._engine.wait_idle(timeout_seconds)
            return [flight for flight in flights if not flight.is_done]
        except RuntimeError:  # another thread has closed it, or this is a forked child
            return []

    @property
    def written_nbytes(self) -> int:
        """Bytes written to files so far."""
        return int(self._engine.written_nbytes)

    @property
    def read_nbytes(self) -> int:
        """Bytes read from files so far."""
        return int(self._engine.read_nbytes)

    def submit(self, file: Any, memory: Memory, task: Task) -> Request:
        """Begins a request of an open file; `File.read` and `File.write` are the way to it."""
        if self._is_closing:
            raise RuntimeError("Expected an open engine, got one that is being closed; open another engine")
        handle = self._engine.transfer(file, task.kind == "write", memory.address, task.nbytes, task.offset)
        flight = Flight(handle, memory, task)
        with self._lock:
            self._pending[id(flight)] = flight
            if self._is_closing:  # meanwhile
                handle.cancel()
        if len(self._pending) > self._num_before_pruning:
            self._prune()
        return Request(flight, self._watcher)

    def _prune(self) -> None:
        """Lets go of requests that are done, and whose error, if any, somebody knows."""
        with self._lock:
            for key, flight in list(self._pending.items()):
                if flight.is_done and not flight.has_news:
                    del self._pending[key]
            self._num_before_pruning = 2 * max(len(self._pending), self.queue_depth)


class File:
    """An open file. Every request names a range; there is no position."""

    def __init__(self, engine: FileEngine, path: str, name: str, flags: int, direct: bool) -> None:
        """As `FileEngine.open` says."""
        self.name = name
        self._engine = engine
        try:
            self._file = extension().NamedFile(path, flags, 0o666, direct)
        except OSError as error:
            raise OSError(error.errno, error.strerror, name) from error

    def __repr__(self) -> str:
        return f"<File {self.name!r}: {self._file.direct_reason}>"

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_direct(self) -> bool:
        """Whether whole pages bypass the page cache; `direct_reason` says why or why not."""
        return bool(self._file.is_direct)

    @property
    def direct_reason(self) -> str:
        """Why `is_direct` is what it is."""
        return str(self._file.direct_reason)

    @property
    def nbytes(self) -> int:
        """Length of the file now."""
        return os.fstat(self._file.fd).st_size

    def read(self, into: Any, offset: int = 0) -> Request:
        """Begins to fill all of `into` with the bytes from `offset` on. Never blocks for the drive.

        Args:
            into: writable memory: a `bytearray`, a `memoryview`, a NumPy array, a tensor on the CPU. It must not be
                used until the request is done.
            offset: where in the file.

        Raises:
            TypeError: `into` is no writable memory.
            ValueError: it has gaps, is not in host memory, or the file or offset cannot be used.
            RuntimeError: the engine is closed.
        """
        return self._submit("read", Memory(into, is_written=True), offset)

    def write(self, source: Any, offset: int = 0) -> Request:
        """Begins to write all of `source` from `offset` on; what lies beside it stays. As `read`.

        A file grows to the last byte written, not to a whole block. Bytes are with the drive when the request is done;
        `flush` has the drive keep them, and the file's length.
        """
        return self._submit("write", Memory(source, is_written=False), offset)

    def _submit(self, kind: str, memory: Memory, offset: int) -> Request:
        if not isinstance(offset, int) or not 0 <= offset < 1 << 63:
            raise ValueError(f"Expected an offset of 0 or more, below 8 EiB, got {offset!r}")
        return self._engine.submit(self._file, memory, Task(kind, self.name, offset, memory.nbytes))

    def truncate(self, nbytes: int) -> None:
        """Makes the file exactly `nbytes` long; nothing beyond may be under way.

        Raises:
            OSError: the file cannot be changed.
        """
        os.ftruncate(self._file.fd, nbytes)

    def flush(self) -> None:
        """Waits until the drive keeps what is done.

        Raises:
            OSError: it failed, and bytes may be lost.
        """
        os.fsync(self._file.fd)

    def close(self) -> None:
        """Closes it when what is under way is done. Idempotent."""
        self._file.close()


def _close(engine: Any, watcher: Watcher, pending: dict[int, Flight]) -> None:
    try:
        engine.close()
    except RuntimeError:  # a forked child, in which nothing of it is
        return
    watcher.close()
    for flight in pending.values():
        if flight.is_done and flight.has_news:
            logger.warning("Nobody asked for the result of a request that failed: %s", flight.tell())
    pending.clear()


def _at_least_one(name: str, value: object) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"Expected {name} of at least 1, got {value!r}")
    return value


def _name_of(descriptor: int) -> str:
    """What a descriptor is open on.

    Raises:
        OSError: it is not open, or on no regular file.
    """
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, "Expected the descriptor of a regular file, got another", str(descriptor))
    return os.readlink(f"/proc/self/fd/{descriptor}")
