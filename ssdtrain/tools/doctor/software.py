"""Python, PyTorch, the extension, and the packages that ssdtrain works with."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from ssdtrain.integrations import TESTED_TORCH, TESTED_VERSIONS
from ssdtrain.io.extension import extension_problem, extension_remedy
from ssdtrain.tools.doctor.finding import Finding, Verdict

_AREA = "software"
_OLDEST_PYTHON, _OLDEST_TORCH = (3, 10), (2, 9)
_KVIKIO = ("kvikio-cu13", "kvikio-cu12", "kvikio")


def examine_software() -> list[Finding]:
    """One finding per package."""
    return [_python(), _torch(), _extension(), *[_framework(name) for name in TESTED_VERSIONS], _kvikio()]


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info >= _OLDEST_PYTHON:
        return Finding(_AREA, "Python", Verdict.GOOD, found)
    return Finding(_AREA, "Python", Verdict.BROKEN, found, "install Python 3.10 or newer")


def _torch() -> Finding:
    found = installed("torch")
    if found is None:
        return Finding(_AREA, "PyTorch", Verdict.BROKEN, "not installed", "pip install 'torch>=2.9'")
    if _numbers(found) > _numbers(TESTED_TORCH[-1]):
        remedy = f"compare losses of a few steps with and without ssdtrain, or pip install torch=={TESTED_TORCH[-1]}"
        return Finding(_AREA, "PyTorch", Verdict.UNWISE, f"{found}; tested with {_span(TESTED_TORCH)}", remedy)
    if _numbers(found) >= _OLDEST_TORCH:
        return Finding(_AREA, "PyTorch", Verdict.GOOD, found)
    return Finding(_AREA, "PyTorch", Verdict.BROKEN, found, "pip install 'torch>=2.9': older ones are not tested")


def _extension() -> Finding:
    problem = extension_problem()
    if problem is None:
        return Finding(_AREA, "C++ extension", Verdict.GOOD, "built and importable")
    remedy = f"{extension_remedy()}; until then the slow engine in Python runs"
    return Finding(_AREA, "C++ extension", Verdict.UNWISE, problem.partition("; ")[0], remedy)


def _framework(name: str) -> Finding:
    found, tested = installed(name), " or ".join(TESTED_VERSIONS[name])
    if found is None:
        return Finding(_AREA, name, Verdict.ABSENT, f"not installed (tested with {tested})")
    if found.partition("+")[0] in TESTED_VERSIONS[name]:
        return Finding(_AREA, name, Verdict.GOOD, f"{found}, a version it is tested with")
    last = TESTED_VERSIONS[name][-1]
    remedy = f"compare losses of a few steps with and without ssdtrain, or pip install {name}=={last}"
    return Finding(_AREA, name, Verdict.UNWISE, f"{found}; tested with {tested}", remedy)


def _kvikio() -> Finding:
    for name in _KVIKIO:
        found = installed(name)
        if found is not None:
            return Finding(_AREA, "kvikio", Verdict.GOOD, f"{name} {found}")
    return Finding(_AREA, "kvikio", Verdict.ABSENT, "not installed: needed for GPUDirect Storage only (ssdtrain[gds])")


def _span(versions: Sequence[str]) -> str:
    return f"{versions[0]} to {versions[-1]}"


def installed(package: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    digits = [part for part in text.partition("+")[0].split(".")[:2] if part.isdigit()]
    return tuple(map(int, digits))
