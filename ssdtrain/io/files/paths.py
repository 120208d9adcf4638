"""Paths as users pass them: checked, and absolute from the moment they are passed.

Knows no files. What is relative is meant from the directory that is the current one now: a later `os.chdir` must not
move it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

_HINT = "pass a str or an os.PathLike of one"


def absolute_path(path: object, what: str) -> str:
    """`path` from the root, its links left as they are; `~` is the user's home.

    Args:
        path: what a user passed.
        what: what it is to be, for messages, such as ``"a directory"``.

    Raises:
        TypeError: it is no path, or one of bytes.
        ValueError: it is empty, has a null character, or is not UTF-8, which neither records nor the engines can name.
    """
    if isinstance(path, bytes):
        raise TypeError(f"Expected {what} as text, got bytes {path!r}: pass os.fsdecode(path)")
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"Expected {what}, got {_short(path)}: {_HINT}")
    text = os.fspath(path)
    if isinstance(text, bytes):
        raise TypeError(f"Expected {what} as text, got a path of bytes {text!r}: pass os.fsdecode(path)")
    if not text or "\0" in text:
        raise ValueError(f"Expected {what}, got {text!r}: pass a path without null characters that is not empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"Expected {what} whose path is UTF-8, got {text!r}: rename it, or reach it by a symbolic link"
        ) from None
    text = os.path.expanduser(text)
    return text if os.path.isabs(text) else os.path.join(os.getcwd(), text)


def absolute_directories(directories: object) -> list[str]:
    """One directory or several, from the root.

    Raises:
        TypeError: something is no path.
        ValueError: there is none, or one is not a path that can be used.
    """
    if isinstance(directories, str | bytes | os.PathLike):
        return [absolute_path(directories, "a directory")]
    if not isinstance(directories, Iterable):
        raise TypeError(f"Expected a directory or several, got {_short(directories)}: {_HINT}")
    paths = [absolute_path(path, "a directory") for path in directories]
    if not paths:
        raise ValueError("Expected one directory or several, got none")
    return paths


def _short(value: object) -> str:
    text = repr(value) if isinstance(value, float | bool | None) else type(value).__name__
    return text if len(text) <= 80 else f"{text[:80]}..."
