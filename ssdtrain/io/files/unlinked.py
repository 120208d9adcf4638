"""Files without a name: for this process only, and gone with it, however it ends."""

from __future__ import annotations

import errno
import os
import secrets

_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.ENOSYS})


def open_unlinked(directory: str) -> int:
    """A descriptor of a new, empty file of mode 0600 in `directory`.

    Where the file system cannot make one without a name, it has one that nobody can guess or have put there, for the
    time between two system calls. Nothing is ever opened by a name.

    Raises:
        OSError: the directory cannot be used; errno and filename are set.
    """
    flags = os.O_RDWR | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(directory, flags | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise
    folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    name = f".ssdtrain-{secrets.token_hex(8)}.spill"
    try:
        fd = os.open(name, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=folder)
        try:
            os.unlink(name, dir_fd=folder)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, directory) from error
    finally:
        os.close(folder)
    return fd
