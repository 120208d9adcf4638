"""The extension `ssdtrain._C`: whether it is there and belongs to this source code, and what to do when not.

The only file that imports it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

INTERFACE = 2
"""What of `csrc/bindings.cpp` this source code is written for; to be raised in both when `_C.pyi` changes."""

_ROOT = Path(__file__).parents[2]


class UnavailableError(Exception):
    """The engine cannot run here; the message says why."""


def extension() -> ModuleType:
    """The extension, built from this source code.

    Raises:
        UnavailableError: it is not wanted, not built, does not import, or was built from other source code.
    """
    if _opts_out():
        raise UnavailableError("SSDTRAIN_NO_CPP is set")
    try:
        from ssdtrain import _C
    except ImportError as error:
        raise UnavailableError(f"{_why_without(error)}; {extension_remedy()}") from error
    if _interface_of(_C) != INTERFACE:
        found = _interface_of(_C) or "none"
        problem = f"{_C.__file__} does not belong to this source code (expected interface {INTERFACE}, got {found})"
        raise UnavailableError(f"{problem}; {extension_remedy()}")
    return _C


def extension_problem() -> str | None:
    """Why the C++ engines cannot run here; None when they can."""
    try:
        extension()
    except UnavailableError as error:
        return str(error)
    return None


def extension_remedy() -> str:
    """What to do about an extension that cannot be used."""
    if _opts_out():
        return "unset SSDTRAIN_NO_CPP"
    again = f"pip install -e {_ROOT}" if _is_source_checkout() else "pip install --force-reinstall --no-deps ssdtrain"
    if other := sys.modules.get("ssdtrain._C"):
        return f"build it anew: rm {other.__file__} && {again}"
    if _is_source_checkout():
        return f"start Python in another directory to use an installed ssdtrain, or build this one: {again}"
    return f"install a wheel for this Python, or reinstall with a C++17 compiler and without SSDTRAIN_NO_CPP: {again}"


def _interface_of(module: ModuleType) -> int | None:
    """None where it was built before there was such a number."""
    return getattr(module, "INTERFACE", None)


def _opts_out() -> bool:
    return os.environ.get("SSDTRAIN_NO_CPP", "0") not in ("", "0")


def _why_without(error: ImportError) -> str:
    if _is_source_checkout():
        return f"ssdtrain was imported from its source code in {_ROOT}, where the C++ extension is not built"
    return f"the C++ extension ssdtrain._C does not import ({error})"


def _is_source_checkout() -> bool:
    """Whether the C++ sources lie beside the package: an installed one has none."""
    return (_ROOT / "csrc" / "bindings.cpp").exists()
