"""Paths as users pass them: checked, and absolute from the moment they are passed.

Knows no files. What is relative is meant from the directory that is the current one now: a later `os.chdir` must not
move it. A directory may begin with ``~``, and ``{rank}`` and ``{local_rank}`` in it are those of the process. A text
may list several with ``:`` between them, as the system's own lists of paths do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

_LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


def absolute_path(path: object, what: str) -> str:
    """`path` from the root, its links left as they are; `~` is the user's home.

    Args:
        path: what a user passed.
        what: what it is to be, for messages, such as ``"a directory"``.

    Raises:
        TypeError: it is no path, or one of bytes.
        ValueError: it is empty, has a null character, or characters that stand for no bytes of a file system.
    """
    if isinstance(path, bytes):
        raise TypeError(f"Expected {what} as text, got bytes {path!r}: pass os.fsdecode(path)")
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"Expected {what}, got {_short(path)}: {_hint(path)}")
    text = os.fspath(path)
    if isinstance(text, bytes):
        raise TypeError(f"Expected {what} as text, got a path of bytes {text!r}: pass os.fsdecode(path)")
    if not text or "\0" in text:
        raise ValueError(f"Expected {what}, got {text!r}: pass a path without null characters that is not empty")
    try:
        os.fsencode(text)  # bytes that are no UTF-8 have characters of their own: surrogateescape
    except UnicodeEncodeError:
        raise ValueError(
            f"Expected {what} whose name the system can have, got {text!r}: pass os.fsdecode of its bytes"
        ) from None
    text = os.path.expanduser(text)
    return text if os.path.isabs(text) else str(Path.cwd() / text)


def printable(text: str) -> str:
    r"""`text` as every stream and file takes it: bytes of a path that are no UTF-8 become ``\udcff`` and the like."""
    return text.encode(errors="backslashreplace").decode()


def path_fields_of_process(
    rank: int | None = None, environment: Mapping[str, str] = os.environ
) -> dict[str, str | None]:
    """What a directory may name, in this process; None for what its launcher does not say.

    Args:
        rank: that of a process group, which knows best.
        environment: what the launcher has set; a process without one is the only one of its job.
    """
    own = environment.get("RANK") if rank is None else str(rank)
    local = next((environment[name] for name in _LOCAL_RANKS if name in environment), None)
    if own is None and local is None:
        own = local = "0"
    return {"rank": own, "local_rank": local}


def fill_in(directory: str, fields: Mapping[str, str | None] | None = None) -> str:
    """The directory with `{rank}` and `{local_rank}` replaced, and `~` at its beginning.

    Raises:
        ValueError: it names something else, unless there is a directory of that very name; or nobody knows the rank.
    """
    known = path_fields_of_process() if fields is None else fields

    def value(match: re.Match[str]) -> str:
        accepted = " or ".join(f"{{{name}}}" for name in known)
        if match[1] not in known:
            if os.path.isdir(directory):
                return match[0]
            raise ValueError(f"Expected {accepted} in a directory, got {match[0]} in {directory!r}")
        found = known[match[1]]
        if found is None:
            raise ValueError(
                f"Expected {match[1].upper()} in the environment to fill in {directory!r}, got none; start with "
                "torchrun"
            )
        return found

    return re.sub(r"\{(\w*)\}", value, os.path.expanduser(directory))


def absolute_directories(directories: object, fields: Mapping[str, str | None] | None = None) -> list[str]:
    """One directory or several, from the root, with placeholders filled in; `fields` as for `fill_in`.

    ``"/mnt/nvme0:/mnt/nvme1"`` are two, unless there is a directory of that very name.

    Raises:
        TypeError: something is no path.
        ValueError: there is none, or one is not a path that can be used.
    """
    if isinstance(directories, str | bytes | os.PathLike):
        directories = [directories]
    if not isinstance(directories, Iterable) or _stands_wrong(directories):
        raise TypeError(f"Expected a directory or several, got {_short(directories)}: {_hint(directories)}")
    paths = [_absolute_directory(path, fields) for each in directories for path in _listed(each, fields)]
    if not paths:
        raise ValueError("Expected one directory or several, got none")
    return paths


def _listed(text: object, fields: Mapping[str, str | None] | None) -> list[object]:
    """A text with colons names several directories, unless there is one of that name, or its parts are no paths."""
    if not isinstance(text, str) or os.path.isdir(fill_in(text, fields)):
        return [text]
    parts = text.split(os.pathsep)
    are_paths = "://" not in text and all(parts) and len({part[0] in "/~{." for part in parts}) == 1
    return [*parts] if are_paths else [text]


def _absolute_directory(path: object, fields: Mapping[str, str | None] | None) -> str:
    if isinstance(path, str | os.PathLike) and isinstance(os.fspath(path), str):
        path = fill_in(str(os.fspath(path)), fields)
    return absolute_path(path, "a directory")


def _stands_wrong(value: object) -> str:
    kinds = {"named_parameters": "a model", "param_groups": "an optimizer"}
    return next((kind for attribute, kind in kinds.items() if hasattr(value, attribute)), "")


def _hint(value: object) -> str:
    if _stands_wrong(value):
        return "it stands where the directory belongs, pass that first or as directory="
    return "pass a str or an os.PathLike of one"


def _short(value: object) -> str:
    if _stands_wrong(value):
        return f"{_stands_wrong(value)} ({type(value).__name__})"
    text = repr(value) if isinstance(value, float | bool | None) else type(value).__name__
    return text if len(text) <= 80 else f"{text[:80]}..."
