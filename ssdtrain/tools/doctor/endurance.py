"""How worn an NVMe drive is, from its own health log, by whichever tool may read it without a password."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

_UNIT_NBYTES = 512_000  # of the health log: thousands of 512-byte blocks
_LIMIT_SECONDS = 1.0


@dataclass(frozen=True)
class Endurance:
    """What the drive says of its wear."""

    percent_used: int
    written_nbytes: int
    has_critical_warning: bool


def endurance_of(drive: str) -> Endurance | str:
    """The wear of `/dev/drive`, or why it is not known."""
    if not drive.startswith("nvme"):
        return "not an NVMe drive: its wear is not looked at"
    commands = {
        "smartctl": ["smartctl", "--json", "--all", f"/dev/{drive}"],
        "nvme": ["nvme", "smart-log", "--output-format=json", f"/dev/{drive}"],
    }
    there = [command for tool, command in commands.items() if shutil.which(tool)]
    if not there:
        return "not known; install smartmontools or nvme-cli"
    for command in there:
        found = parse(_output(command))
        if found is not None:
            return found
    return "not readable by this user; as root: smartctl --all shows it"


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=_LIMIT_SECONDS, check=False
        )
        return done.stdout.decode(errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return ""


def parse(text: str) -> Endurance | None:
    """Reads what `smartctl` or `nvme` printed as JSON; None when the log is not in it."""
    try:
        log: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError:
        return None
    log = log.get("nvme_smart_health_information_log", log)
    used = log.get("percentage_used", log.get("percent_used"))
    written = log.get("data_units_written")
    if not isinstance(used, int) or not isinstance(written, int):
        return None
    return Endurance(used, written * _UNIT_NBYTES, bool(log.get("critical_warning", 0)))
