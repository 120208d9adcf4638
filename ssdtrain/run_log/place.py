"""Where a record is written: the path a user gave, for this process of a job."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping

from ssdtrain.run_log.format import is_record

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
    """Opens a new record, which replaces an older one; a descriptor to append to.

    Raises:
        OSError: the file cannot be made, or exists and is no record.
    """
    if os.path.isfile(path) and os.path.getsize(path) and not is_record(path):
        raise FileExistsError(
            errno.EEXIST, "Expected a new file or an older run record, got another kind of file", path
        )
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o644)
