"""Is this directory fit for spill files? Refuses what cannot work, names what is unwise.

Looks at the path and the mount table only; whether the file system can do direct I/O is the engine's to find out.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ssdtrain.io.timed_calls import no_answer, run_all

_MEMORY = frozenset({"tmpfs", "ramfs", "hugetlbfs", "devtmpfs"})
_NETWORK = frozenset(
    "9p afs beegfs ceph cifs fuse.ceph fuse.gcsfuse fuse.glusterfs fuse.juicefs fuse.s3fs fuse.sshfs glusterfs gpfs "
    "lustre ncpfs nfs nfs4 orangefs smb3 smbfs virtiofs".split()
)


def check_directories(directories: Sequence[str], timeout_seconds: float = 60.0) -> list[str]:
    """What is unwise about each of `directories`, as sentences.

    One that does not answer within `timeout_seconds` is passed over while another does: whoever opens it leaves it out.

    Raises:
        OSError: one is missing, is no directory or cannot be written to, or none answers; errno and filename are set.
        ValueError: none is given, or one twice.
    """
    if not directories:
        raise ValueError("Expected one directory or several, got none")
    timed_calls = run_all([partial(_looked_at, directory) for directory in directories], timeout_seconds)
    found: dict[str, list[str]] = {}
    for directory, timed in zip(directories, timed_calls, strict=True):
        if not timed.wait(0.0):
            timed.abandon()
            continue
        real, unwise = timed.take()
        if real in found:
            raise ValueError(f"Expected different directories, got {directory!r} twice: list each drive once")
        found[real] = unwise
    if not found:
        raise no_answer("a directory", timeout_seconds, directories[0])
    return [text for unwise in found.values() for text in unwise]


def _looked_at(directory: str) -> tuple[str, list[str]]:
    _check_usable(directory)
    return os.path.realpath(directory), _unwise(directory)


def _check_usable(directory: str) -> None:
    hint = "pass an existing, writable directory on a fast local drive"
    if not os.path.lexists(directory):
        raise FileNotFoundError(errno.ENOENT, f"Expected a directory, got one that does not exist: {hint}", directory)
    if not os.path.isdir(directory):
        raise NotADirectoryError(errno.ENOTDIR, f"Expected a directory, got something else: {hint}", directory)
    if not os.access(directory, os.W_OK | os.X_OK):
        number = errno.EROFS if _is_read_only(directory) else errno.EACCES
        raise OSError(number, f"Expected a writable directory, got {os.strerror(number).lower()}: {hint}", directory)


def _is_read_only(directory: str) -> bool:
    return bool(os.statvfs(directory).f_flag & os.ST_RDONLY)


def _unwise(directory: str) -> list[str]:
    kind = file_system_of(directory)
    if kind in _MEMORY:
        return [f"{directory} is on {kind}, a file system in memory: what goes there does not leave memory"]
    if kind in _NETWORK:
        return [f"{directory} is on {kind}, a network file system: expect it to be slow; a local drive is better"]
    return []


def file_system_of(path: str) -> str:
    """The kind of file system `path` is on, such as ``"ext4"``; ``"unknown"`` where the system does not say."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return "unknown"
    real = os.path.realpath(path)
    best, kind = -1, "unknown"
    for line in mounts:
        fields = line.split()
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        is_below = real == point or real.startswith(point.rstrip("/") + "/")
        if is_below and len(point) >= best:  # later mounts hide earlier ones at the same place
            best, kind = len(point), fields[fields.index("-") + 1]
    return kind
