"""One line of the examination."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


class Verdict(enum.Enum):
    """How good it is."""

    GOOD = "good"
    UNWISE = "unwise"
    """Works, but costs time, memory or safety."""
    BROKEN = "broken"
    """Does not work."""
    ABSENT = "absent"
    """Not there, and not needed by what is."""
    UNKNOWN = "unknown"
    """The system does not say."""


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, and what to do about it."""

    area: str
    """Software, kernel, GPU, or a directory."""
    name: str
    """What was looked at."""
    verdict: Verdict
    """How good it is."""
    found: str
    """In words."""
    remedy: str = ""
    """What to do; empty where nothing is to be done."""

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self) | {"verdict": self.verdict.value}


def read_text(path: Path) -> str:
    """A small system file without its last newline; empty when it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
