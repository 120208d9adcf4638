"""Where a record is written: the path a user gave, for this process of a job."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import stat
from collections.abc import Mapping

from ssdtrain.run_log.format import is_record

logger = logging.getLogger("ssdtrain")

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of some network file systems
_RANKS = {"rank": "RANK", "local_rank": "LOCAL_RANK"}


def record_path(path: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The path for this process; None where another one records for the whole job.

    Raises:
        ValueError: a placeholder other than ``{rank}`` and ``{local_rank}``.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in _RANKS:
            raise ValueError(f"Expected {{rank}} or {{local_rank}} in the path of a record, got {path!r}")
        return environment.get(_RANKS[match[1]], "0")

    filled = re.sub(r"\{(\w*)\}", value, path)
    return None if filled == path and environment.get("RANK", "0") != "0" else filled


def open_record(path: str) -> int:
    """Opens a new record, which replaces an older one; a descriptor to append to, locked against other writers.

    Raises:
        OSError: the file cannot be made, is no regular file, exists and is no record, or another offload writes to it.
    """
    if not os.path.isfile(path) and os.path.exists(path):  # opening a device may do something already
        raise _not_regular(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    fd = os.open(path, flags, 0o644)
    try:
        _claim(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _claim(fd: int, path: str) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise _not_regular(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise FileExistsError(
            errno.EEXIST,
            "Expected a record that no other run writes to, got one in use; close() the other offload, or give each a"
            " path of its own, such as with {rank}",
            path,
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("Nothing can be locked where %s is: two runs that record to this path would mix", path)
    if os.fstat(fd).st_size and not is_record(fd):
        raise FileExistsError(
            errno.EEXIST, "Expected a new file or an older run record, got another kind of file", path
        )
    os.ftruncate(fd, 0)


def close_record(fd: int) -> None:
    """Closes a record for good. Forked children may have its descriptor still: they lock it no longer."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _not_regular(path: str) -> OSError:
    return FileExistsError(errno.EEXIST, "Expected a regular file or none for the record, got something else", path)
