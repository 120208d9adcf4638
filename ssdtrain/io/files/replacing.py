"""A file that is replaced as a whole or not at all, whoever else writes to the same path and whenever one is killed.

Knows no format. The new file has no name until it is complete where the file system allows that, and a name of its own
until then where not; it is flushed, takes the place of the old one, and then the directory is flushed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger("ssdtrain")

_NAMELESS_MISSING = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
_UNFLUSHABLE = (errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF)
_MAX_PREFIX = 100  # bytes of a name of 255


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Gives an empty file to write; when the block ends without an error it is at `path`, in the place of an older one.

    A link at `path` is followed. An older file gives its mode on, and stays as it is until the new one is complete.

    Raises:
        FileExistsError: what is at `path` is no regular file.
        OSError: the file cannot be written; with errno and path.
    """
    target = Path(os.path.realpath(os.fspath(path)))
    before = _regular(target)
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    name = f".{os.fsencode(target.name)[:_MAX_PREFIX].decode(errors='ignore')}.{secrets.token_hex(8)}.partial"
    is_named = False
    try:
        fd, is_named = _open_new(folder, name, 0o666 if before is None else 0o600)
        with os.fdopen(fd, "wb") as file:
            if before is not None:
                os.fchmod(fd, stat.S_IMODE(before.st_mode) & 0o777)
            yield file
            file.flush()
            os.fsync(fd)
            if not is_named:
                os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=folder, follow_symlinks=True)
                is_named = True
        if _identity(_regular(target)) != _identity(before):
            logger.warning(
                "Another process wrote %s while this one did: the file is whole, and this one's; save on one rank, or "
                "give each rank a path of its own",
                target,
            )
        os.rename(name, target.name, src_dir_fd=folder, dst_dir_fd=folder)
        is_named = False
        _flush(folder)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise type(error)(
                error.errno, f"{os.strerror(error.errno)}; the older file, if any, stays", path
            ) from error
        raise
    finally:
        if is_named:
            os.unlink(name, dir_fd=folder)
        os.close(folder)


def _regular(target: Path) -> os.stat_result | None:
    """What is there, None for nothing."""
    try:
        found = target.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise FileExistsError(errno.EEXIST, "Expected a regular file or none, got something else", str(target))
    return found


def _identity(found: os.stat_result | None) -> tuple[int, ...] | None:
    return None if found is None else (found.st_dev, found.st_ino, found.st_mtime_ns)


def _open_new(folder: int, name: str, mode: int) -> tuple[int, bool]:
    """A new file in a directory, and whether it has the name: a nameless one leaves nothing behind when killed."""
    try:
        return os.open(".", os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, mode, dir_fd=folder), False
    except OSError as error:
        if error.errno not in _NAMELESS_MISSING:
            raise
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, mode, dir_fd=folder), True


def _flush(folder: int) -> None:
    """The rename itself; some network file systems have nothing to flush in a directory."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _UNFLUSHABLE:
            raise
