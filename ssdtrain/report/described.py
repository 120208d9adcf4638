"""What `describe` returns, for who reads `ssdtrain report --json`: names, types and meanings. Knows no numbers.

The tests compare it with what is printed, and the documentation has it as tables.
"""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict

from ssdtrain.report.timeline import Bar


class Summary(TypedDict):
    """The run in a few numbers. Peaks are of saved tensors in memory, with ssdtrain's own buffers."""

    num_steps: int
    total_seconds: float
    """Of all steps."""
    peak_nbytes: int
    """The highest of the run."""
    peak_step: int
    """In which step, from 1."""
    without_nbytes: int
    """What it would have been without ssdtrain; an estimate."""
    saved_share: float
    """Of that, what was saved."""
    typical_peak_nbytes: float
    """Median over the second half of the steps, when plans have settled."""
    typical_peak_if_kept_nbytes: float
    """The same, had everything stayed in memory."""
    highest_peak_nbytes: int
    """Of `steps`, which leave out staging that is not in use."""
    typical_seconds: float
    """A step; median over the second half."""
    worst_seconds: float
    """The slowest step."""
    typical_stall_seconds: float
    """Of a step that training waited; median over the second half."""
    stall_seconds: float
    """Of the run that training waited."""
    stall_share: float
    """Of the time of all steps."""
    stalls: dict[str, float]
    """The waits by what was waited for, in seconds."""
    ahead_seconds: float
    """How long before they were needed reloads were there, summed up."""
    totals: dict[str, float]
    """Counters after the last step, by their names in `Stats`."""


class StepRow(TypedDict):
    """One step, or a few of a long run together; bytes, seconds and rates are then means, peaks the highest."""

    step: int
    """The last of them, from 1."""
    num_steps: int
    """How many share this row."""
    seconds: float
    worst_seconds: float
    """The slowest of them."""
    predicted_seconds: float
    """By the plan; 0 without one."""
    stall_seconds: float
    """What training waited."""
    peak_nbytes: int
    """Saved tensors in memory, with ssdtrain's own buffers that are in use."""
    peak_if_kept_nbytes: int
    """The same, had everything stayed in memory."""
    predicted_peak_nbytes: float
    """By the plan; 0 without one."""
    offloaded_nbytes: float
    """Left for host memory or the drive."""
    kept_nbytes: float
    """Stayed in memory although they could have been offloaded."""
    forwarded_nbytes: float
    """Were handed back before they had left."""
    written_nbytes: float
    """To the drive."""
    read_nbytes: float
    """From the drive."""
    hosted_nbytes: float
    """To host memory."""
    write_gbs: float
    """Written, over the whole time of the step."""
    read_gbs: float
    """Read, over the whole time of the step."""


class Bandwidth(TypedDict):
    """Of the drive, over the run."""

    write_used_gbs: float
    """Written, over the time of all steps."""
    write_ceiling_gbs: float
    """Written, over the time in which anything was being written."""
    write_busy_share: float
    """That time, of the time of all steps."""
    read_used_gbs: float
    """The same of reads."""
    read_ceiling_gbs: float
    read_busy_share: float


class StepTimeline(TypedDict):
    """One step in full; moments are microseconds since it began."""

    step: int
    """Its number, from 1."""
    why: Literal["first", "sample", "worst"]
    """Why it was recorded in full."""
    seconds: float
    is_wall_time: bool
    """Whether saves and needs have the times of the computation: a host ahead of an accelerator knows none."""
    num_records: int
    num_omitted_records: int
    """The smallest, where there are too many."""
    peak_nbytes: int | None
    """As in `steps`; null where it shares a row."""
    peak_if_kept_nbytes: int | None
    memory: dict[str, list[float]]
    """Columns: moments `at`, and bytes in memory `with ssdtrain` and `without`."""
    residency: dict[str, list[float]]
    """Columns: moments `at`, and bytes by where they are."""
    bars: list[Bar]
    """What took time."""


class ModuleRow(TypedDict):
    """Saved tensors of one module, mean of a step."""

    module: str
    """Its name; `(no module's)`, and `(N more)` for the smallest together."""
    num_records: float
    """Tensors, each storage once."""
    nbytes: float
    kept_nbytes: float
    """Of these, in memory,"""
    host_nbytes: float
    """sent to host memory,"""
    disk_nbytes: float
    """and sent to the drive."""
    tier: str
    """Where most of them went, in words."""
    stall_seconds: float
    """What training waited for them."""


class Memory(TypedDict):
    """Peaks over the run; 0 where nobody told."""

    peak_memory_nbytes: int
    """Saved tensors, with ssdtrain's own buffers."""
    peak_process_nbytes: int
    """Resident memory of the process."""
    peak_allocated_nbytes: int
    """Of the device's allocator: in tensors,"""
    peak_reserved_nbytes: int
    """and taken from the device."""


class Wear(TypedDict):
    """Of the drive, with parameters and optimizer state on it."""

    written_nbytes: int
    written_nbytes_per_step: float
    """Mean over all steps."""
    written_nbytes_per_day: float
    """If training went on day and night as in the second half of the steps."""
    endurance_tbw: float | None
    """As the policy has it."""
    life_years: float | None
    """How long the drive lasts then; null without `endurance_tbw`, or where nothing is written."""


class Kept(TypedDict):
    """Saved tensors that were left alone for one reason, mean of a step."""

    reason: str
    """In words that the documentation explains."""
    count: float
    nbytes: float


class Engine(TypedDict):
    """What moved the bytes."""

    name: str
    reason: str
    """Why this one."""


class RecordState(TypedDict):
    """Of the file that was read."""

    is_complete: bool
    """Whether the run closed it; else it was ended, or is still going on."""
    num_lost_nbytes: int
    """At its end, that could not be read."""
    num_damaged_blocks: int
    totals_after_step: int
    """When `modules`, `kept` and `fallbacks` were last written."""


class Described(TypedDict):
    """All there is to say of a run."""

    headline: list[str]
    """What it did and what it cost, in sentences."""
    summary: Summary
    steps: list[StepRow]
    """At most 1000."""
    bandwidth: Bandwidth
    timelines: list[StepTimeline]
    """The latest ordinary step, and the worst after plans had settled."""
    modules: list[ModuleRow]
    """The most bytes first."""
    memory: Memory
    wear: Wear
    kept: list[Kept]
    """The most bytes first."""
    fallbacks: list[str]
    """What was done in another way than asked for, and why."""
    plan: str
    """What the plan does, in a sentence; empty without one."""
    engine: Engine
    environment: dict[str, Any]
    """Versions and machine, as in the [run log](run-log.md#block-environment-of-run)."""
    policy: dict[str, Any]
    """Fields of the [`ActivationPolicy`](policies.md), sizes in bytes."""
    record: RecordState


class TwoRuns(TypedDict):
    """Of two records."""

    runs: list[Described]
    """Both, in the order they were given."""
    rows: list[tuple[str, str, str, str]]
    """What is compared: its name, the value of either run as text, and the change where there is one."""
