"""What `state_cap.py` says of its runs, for itself and for the README's table."""

from __future__ import annotations

import statistics
from typing import Any


def waiting_seconds(capped: dict[str, Any]) -> float:
    """For the drive: of activations, and of parameters and optimizer state, which share their account."""
    stats = capped["stats"]
    return float(stats["activations"]["stall_seconds"] + stats["optimizer"]["wait_seconds"])


def bandwidth_of(paged: dict[str, Any]) -> tuple[float, float, float]:
    """Seconds of an update, GB/s it moved both ways together, and GB/s the drive moves so."""
    update = statistics.median(paged["update_seconds"][1:])
    moved = 2 * paged["stats"]["optimizer"]["away_nbytes"] / update / 1e9
    return update, moved, statistics.median(paged["ceiling_gbs"][1:])
