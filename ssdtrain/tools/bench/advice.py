"""From what was measured to settings, and to how much the drive can hide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ssdtrain.tools.bench.drive import Report

_ENOUGH = 0.95  # of the best bandwidth
_LEAST_STAGING_NBYTES = 64 << 20


@dataclass(frozen=True)
class Advice:
    """What to do with the numbers."""

    policy: dict[str, Any]
    """Fields of an `ActivationPolicy`."""
    hidden_gb_per_forward_second: float
    """GB of activations per second of forward that go out and come back without a wait."""
    explanation: str
    """How that was worked out."""


def advise(report: Report) -> Advice:
    """Settings for this drive.

    What is saved in forward has to be written by its end or soon after, and read during backward, which takes about
    twice as long: so in one second of forward the drive hides min(write, 2 x read).
    """
    best = report.best
    enough = min(
        (row for row in report.rows if row.hidden_gbs >= _ENOUGH * best.hidden_gbs),
        key=lambda row: row.request_nbytes * row.depth,
    )
    staging = max(_LEAST_STAGING_NBYTES, 2 * enough.request_nbytes * enough.depth)
    write = report.steady_gbs or best.write_gbs
    hidden = min(write, 2 * best.read_gbs)
    speeds = f"{write:.2f} GB/s written for long, 2 x {best.read_gbs:.2f} GB/s read"
    explanation = f"min({speeds}): backward takes about twice as long as forward"
    return Advice({"staging_nbytes": staging, "prefetch_nbytes": staging}, hidden, explanation)
