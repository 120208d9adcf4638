"""Is GPUDirect real here? Which way bytes between a GPU and a directory would take, and why.

There are three ways, and two layers that fall back in silence: kvikio to plain system calls, and cuFile, underneath, to
a compatibility mode of its own. So facts are gathered, and where they allow GPUDirect, a real transfer is tried with
cuFile's compatibility mode switched off. All of it happens in a child process with a time limit: cuFile without a
driver never returns.

    verdict = probe(["/mnt/nvme"])
    print(verdict.sentence)      # "POSIX mode of kvikio: /run/udev is not readable (typical in containers)"
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

Mode = Literal["gpudirect", "cufile", "posix", "unavailable"]

INSTALL = 'pip install "ssdtrain[gds]"'
TIMEOUT_SECONDS = 120.0
_PROCESSOR_SECONDS = 20  # cuFile spins when it never returns, so that a busy machine need not be taken for that
_KILL_SECONDS = 5.0

_NAMES: dict[Mode, str] = {
    "gpudirect": "GPUDirect",
    "cufile": "compatibility mode of cuFile",
    "posix": "POSIX mode of kvikio",
    "unavailable": "kvikio does not work here",
}
_ORDER: tuple[Mode, ...] = ("unavailable", "posix", "cufile", "gpudirect")
_CHILD = Path(__file__).with_name("probe_child.py")


@dataclass(frozen=True)
class GpuDirect:
    """Which way bytes between a GPU and a directory take, and why."""

    mode: Mode
    """``"gpudirect"``: past the host; ``"cufile"``: through cuFile's host buffers; ``"posix"``: through kvikio's;
    ``"unavailable"``: kvikio cannot be used at all."""

    reasons: tuple[str, ...]
    """What decided it, the most telling first."""

    @property
    def is_real(self) -> bool:
        """Whether no byte passes through host memory."""
        return self.mode == "gpudirect"

    @property
    def sentence(self) -> str:
        """Mode and reasons in one line."""
        return f"{_NAMES[self.mode]}: {'; '.join(self.reasons)}"


def probe(directories: Sequence[str], timeout_seconds: float = TIMEOUT_SECONDS) -> GpuDirect:
    """The verdict for a set of directories: that of the worst of them.

    Args:
        directories: where spill files would be; a small one without a name is made in each.
        timeout_seconds: for each of at most two child processes per directory.
    """
    verdicts = [_probe_one(directory, timeout_seconds) for directory in dict.fromkeys(directories)]
    return min(verdicts, key=lambda verdict: _ORDER.index(verdict.mode))


@lru_cache(maxsize=8)
def probe_once(directories: tuple[str, ...]) -> GpuDirect:
    """As `probe`, but a process asks only once: an engine may be opened in every step."""
    return probe(directories)


def _probe_one(directory: str, timeout_seconds: float) -> GpuDirect:
    strict = _ask_child(directory, "strict", timeout_seconds)
    if "transfer" not in strict:
        return judge(strict, {})
    is_direct = strict["transfer"] == ""
    return judge(strict, {} if is_direct else _ask_child(directory, "lenient", timeout_seconds))


def _ask_child(directory: str, mode: str, timeout_seconds: float) -> dict[str, Any]:
    """The facts the child printed, and under ``"ending"`` why there are no more of them; empty when all is said."""
    command = [sys.executable, str(_CHILD), directory, mode, str(_PROCESSOR_SECONDS)]
    environment = {"CUFILE_LOGFILE_PATH": os.devnull} | os.environ  # else a cufile.log appears where the user is
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
    )
    try:
        output, errors = child.communicate(timeout=timeout_seconds)
        ending = "" if child.returncode == 0 else f"exit status {child.returncode}: {errors.strip()[-300:]}"
        if child.returncode == -signal.SIGXCPU:
            ending = f"no answer within {_PROCESSOR_SECONDS} s of processor time"
    except subprocess.TimeoutExpired:
        child.kill()
        ending = f"no answer within {timeout_seconds:g} s"
        try:
            output, _ = child.communicate(timeout=_KILL_SECONDS)
        except subprocess.TimeoutExpired:  # stuck in the kernel; it goes when the kernel lets it
            output = ""
    facts: dict[str, Any] = {"ending": ending}
    for line in output.splitlines():
        if line.startswith("{"):
            facts |= json.loads(line)
    return facts


def judge(strict: Mapping[str, Any], lenient: Mapping[str, Any]) -> GpuDirect:
    """The verdict on what children have found; `lenient` is empty unless the strict one's transfer failed."""
    for name, why in (
        ("kvikio_error", f"kvikio does not import ({strict.get('kvikio_error')}); {INSTALL}"),
        ("libcuda_error", f"there is no NVIDIA driver ({strict.get('libcuda_error')})"),
    ):
        if strict.get(name):
            return GpuDirect("unavailable", (why,))
    if "is_posix_preferred" not in strict:
        return GpuDirect("unavailable", (f"the probe ended early: {strict['ending']}",))
    place = f"{strict['directory']} is {strict['file_system']}"
    if "transfer" not in strict:
        return GpuDirect("posix", (*_why_posix(strict), place))
    if strict["transfer"] == "":
        return GpuDirect("gpudirect", ("a transfer with cuFile's compatibility mode off came back equal", place))
    reasons = (strict["transfer"], *_why_not_direct(strict), place)
    if lenient.get("transfer") == "":
        return GpuDirect("cufile", reasons)
    return GpuDirect("posix", (lenient.get("transfer") or f"cuFile: {lenient.get('ending')}", *reasons))


def _why_posix(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """What keeps kvikio from using cuFile at all."""
    wish = facts["compat_mode_variable"]
    found = [
        (wish.lower() in ("on", "true", "yes", "1"), f"KVIKIO_COMPAT_MODE={wish} asks for it"),
        (facts["cufile_version"] == [0, 0], "libcufile.so.0 does not load"),
        (not facts["has_udev"], "/run/udev is not readable (typical in containers: mount it)"),
        (facts["is_wsl"], "this is WSL, which has no GPUDirect Storage"),
        (not facts["is_posix_preferred"], f"cuFile does not work: {facts['ending'] or 'it said nothing'}"),
    ]
    return tuple(text for is_true, text in found if is_true) or ("kvikio prefers it and does not say why",)


def _why_not_direct(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """What is missing, as far as it can be seen, when a transfer past the host failed."""
    found = [
        (not facts["has_nvidia_fs"], "the kernel module nvidia_fs is not loaded"),
        (not facts["cufile_json"], "there is no cufile.json"),
        (facts["is_compat_forced"], f"{facts['cufile_json'] or 'the environment'} forces cuFile's compatibility mode"),
    ]
    return tuple(text for is_true, text in found if is_true)
