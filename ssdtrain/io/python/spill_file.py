"""The spill file in plain Python: one preallocated, already unlinked file, and how direct I/O is found."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from ssdtrain.io.files.unlinked import open_unlinked

MAX_USERS = 2  # who share an engine, each with files of its own
_PAGE_NBYTES = 4096
_NO_FALLOCATE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})
_NOT_DIRECT = frozenset({errno.EINVAL, errno.EOPNOTSUPP})


def round_up(nbytes: int, block: int) -> int:
    return -(-nbytes // block) * block


class Owned:
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


def _enable_direct(fd: int, directory: str, least_nbytes: int) -> tuple[int, bool, str]:
    """Block size (`least_nbytes` or more), whether direct, and why; leaves the file empty."""
    least = max(least_nbytes, _logical_block_nbytes(fd))
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


class SpillFile(Owned):
    """One preallocated, already unlinked file in a directory."""

    least_block_nbytes = 512

    def __init__(self, directory: str, cap_nbytes: int | None = None, user: int = 0) -> None:
        super().__init__()
        if not 0 <= user < MAX_USERS:
            raise ValueError(f"Expected a user below {MAX_USERS}, got {user}")
        self.user = user
        self.directory = directory
        self.cap_nbytes = cap_nbytes
        self.nbytes = 0
        self.fallocate_reason = ""
        fd = open_unlinked(directory)
        self._closer = weakref.finalize(self, _close_in, self._pid, fd)
        self._closer.atexit = False  # the end of the process closes it, and waits for no drive here
        self._fd: int | None = fd
        self._users = 0
        self._is_closing = False
        self._lock = threading.Lock()  # never held while the drive is asked
        self._length_lock = threading.Lock()  # held while the file grows or shrinks
        self.block_nbytes, self.is_direct, self.direct_reason = _enable_direct(fd, directory, self.least_block_nbytes)
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
        target = round_up(nbytes, self.block_nbytes)
        if self.cap_nbytes is not None:
            target = min(target, self.cap_nbytes // self.block_nbytes * self.block_nbytes)
        with self._in_use() as fd, self._length_lock:
            if target > self.nbytes:
                self._reserve(fd, target)
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

    def shrink_to_nothing(self) -> None:
        self._check_process()
        with self._in_use() as fd, self._length_lock:
            os.ftruncate(fd, 0)
            self.nbytes = 0

    def close(self) -> None:
        self._check_process()
        with self._lock:
            self._is_closing = True
        self._close_if_unused()

    @contextmanager
    def _in_use(self) -> Iterator[int]:
        fd = self.acquire()
        try:
            yield fd
        finally:
            self.release()

    def acquire(self) -> int:
        """The descriptor, kept open until `release`: an engine uses it."""
        with self._lock:
            fd = self.fd
            self._users += 1
            return fd

    def release(self) -> None:
        with self._lock:
            self._users -= 1
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        with self._lock:
            is_over = self._is_closing and self._users == 0 and self._fd is not None
            if is_over:
                self._fd = None
        if is_over:
            self._closer()


def _close_in(pid: int, fd: int) -> None:
    if os.getpid() == pid:
        os.close(fd)


class File(Protocol):
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
    @property
    def user(self) -> int: ...
