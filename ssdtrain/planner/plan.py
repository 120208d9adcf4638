"""A plan: what one step does with every record, what that will cost, and the same as text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ssdtrain.planner.recorded_step import Where
from ssdtrain.stats import nbytes_text

SECONDS_PER_DAY = 86400
_DAYS_PER_YEAR = 365.25


@dataclass(frozen=True)
class Goal:
    """What a plan is for. Without a budget: the lowest peak at which nothing waits."""

    memory_budget: int | None = None
    """Bytes of memory to stay under, at the least step time that allows it."""
    daily_nbytes: float = math.inf
    """What may be written to the drive per day."""
    endurance_nbytes: float = math.inf
    """What may be written to the drive in its life."""
    others_daily_nbytes: float = 0.0
    """What is written to it per day anyway, for parameters and optimizer state."""
    buffers_nbytes: int = 0
    """What of the budget our own buffers take, and what stays free for steps unlike the plan."""
    staging_limit_nbytes: int = 0
    """Most staging in the memory that tensors are saved in; see `ssdtrain.planner.buffers`. 0: it is in another."""

    is_staging_set: bool = True
    """Whether staging takes the same of any budget."""

    @property
    def own_daily_nbytes(self) -> float:
        """What is left per day for saved activations."""
        return max(0.0, self.daily_nbytes - self.others_daily_nbytes)


@dataclass(frozen=True)
class Plan:
    """Per position where a record spends its time, and when its reload starts."""

    placement: tuple[int, ...]
    """A `Where` for every record."""
    starts: tuple[float, ...]
    """Seconds of compute time at which reloads start; minus infinity for what does not come back."""
    statement: str
    """What the plan does, or why nothing moves."""
    is_patient: bool
    """Whether training waits when the drive is behind, because memory must not grow."""
    kept_peak_nbytes: int
    """Peak if everything stayed in memory."""
    peak_nbytes: int
    """Predicted peak, staging included where it is in the same memory."""
    compute_seconds: float
    """Step time when nothing waits."""
    stall_seconds: float
    """Predicted wait per step."""
    host_nbytes: int
    """Sent to host memory per step."""
    disk_nbytes: int
    """Written to the drive per step."""
    endurance_nbytes: float = math.inf
    """What may be written to the drive in its life."""
    others_daily_nbytes: float = 0.0
    """What is written to it per day for parameters and optimizer state."""
    recomputed: tuple[str, ...] = ()
    """Names of the blocks that run a second time in backward instead of keeping what they saved."""
    needed_nbytes: int = 0
    """The smallest budget that can be met, where the one that was asked for cannot; else 0."""
    measured_peak_nbytes: int = 0
    """Peak of the last step that followed it to its end,"""
    measured_seconds: float = 0.0
    """and its time; 0 before there was one."""

    @property
    def is_declined(self) -> bool:
        """Whether nothing moves, and nothing is recomputed."""
        return not any(self.placement) and not self.recomputed

    @property
    def step_seconds(self) -> float:
        """Predicted step time."""
        return self.compute_seconds + self.stall_seconds

    @property
    def daily_nbytes(self) -> float:
        """Written to the drive in a day of such steps, all in all."""
        own = self.disk_nbytes / self.step_seconds * SECONDS_PER_DAY if self.step_seconds else 0.0
        return own + self.others_daily_nbytes

    @property
    def drive_life_years(self) -> float:
        """How long the drive's endurance lasts when training never stops; infinite when it is not known."""
        return self.endurance_nbytes / self.daily_nbytes / _DAYS_PER_YEAR if self.daily_nbytes else math.inf

    def __repr__(self) -> str:
        """One line."""
        return (
            f"Plan({self.statement!r}, peak {nbytes_text(self.peak_nbytes)} of {nbytes_text(self.kept_peak_nbytes)},"
            f" {self.step_seconds:.3f} s a step, {self.stall_seconds:.3f} s of it waiting)"
        )

    def __str__(self) -> str:
        """What moves, and what is predicted of it."""
        num = {where: self.placement.count(where) for where in Where}
        lines = [
            f"plan: {self.statement}",
            f"  records   {num[Where.KEEP]} kept, {num[Where.HOST]} to host memory ({nbytes_text(self.host_nbytes)}),"
            f" {num[Where.DISK]} to the drive ({nbytes_text(self.disk_nbytes)})",
            f"  memory    peak {nbytes_text(self.peak_nbytes)},"
            f" {nbytes_text(self.kept_peak_nbytes)} if everything stayed",
            f"  time      {self.step_seconds:.3f} s a step, {self.stall_seconds:.3f} s of it waiting",
        ]
        if self.measured_seconds:
            lines.append(
                f"  measured  peak {nbytes_text(self.measured_peak_nbytes)}, {self.measured_seconds:.3f} s a step,"
                " in the last step that followed it"
            )
        if self.recomputed:
            lines.append(f"  recompute {len(self.recomputed)} blocks: {', '.join(self.recomputed)}")
        if self.disk_nbytes:
            life = f", drive life {self.drive_life_years:.1f} years" if self.drive_life_years < math.inf else ""
            others = f" ({self.others_daily_nbytes / 1e12:.2f} TB for others)" if self.others_daily_nbytes else ""
            lines.append(f"  drive     {self.daily_nbytes / 1e12:.2f} TB written a day{others}{life}")
        return "\n".join(lines)
