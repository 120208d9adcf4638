"""What `--json` prints: names, types and meanings, by command. Knows no numbers.

The tests compare it with what is printed, and the documentation has it as tables. Fields are only ever added.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from typing_extensions import TypedDict

from ssdtrain.report.described import Described, TwoRuns
from ssdtrain.tools.bench import Advice, Report
from ssdtrain.tools.demo.settings import DemoSettings
from ssdtrain.tools.doctor import Finding
from ssdtrain.tools.estimate import Drives, Estimate, Gpu, Shape


class Verdicts(TypedDict):
    """How many findings of each verdict there are."""

    good: int
    """All is well; printed as `ok`."""
    unwise: int
    """Works, but costs time, memory or safety; `warn`."""
    broken: int
    """Does not work; `fail`."""
    absent: int
    """Not there, and not needed by what is."""
    unknown: int
    """The system does not say."""


class Examined(TypedDict):
    """What was looked at."""

    verdicts: Verdicts
    findings: list[Finding]


class Measured(TypedDict):
    """Beside what was measured and advised."""

    steady_gbs: float
    """Written in the long run: the median of the last half of `sustained_gbs`."""
    pinned_copy_gbs: dict[str, float]
    """Copies of GPU memory `out` to pinned host memory and `in` from it, GB/s; empty without a GPU."""
    warnings: list[str]
    """About the directory."""


class Asked(TypedDict):
    """What was estimated."""

    shape: Shape
    drives: Drives
    gpu: Gpu


class ListedChoice(TypedDict):
    """One way to train, per GPU."""

    activations: str
    """Where they are until backward, in words."""
    optimizer_state: str
    """Where it is between steps, in words."""
    how: str
    """What to write for it; empty where nothing is needed."""
    memory_nbytes: float
    """Of the GPU: peak of activations, and all state that stays there."""
    host_nbytes: float
    """Of host memory."""
    cost: float
    """Share of the step time that it adds."""
    written_bytes_per_second: float
    """To the drives, averaged over steps."""
    life_days: float | None
    """Of the drives; null where nothing is written, or `--tbw` is not given."""
    fits: bool
    """Whether the GPU has so much memory."""


class Choices(TypedDict):
    """What to do."""

    choices: list[ListedChoice]
    """The best few: the cheapest in time that fit first, then those that need least memory."""


class Replayed(TypedDict):
    """The plan of a recorded step."""

    statement: str
    """What the plan does, in a sentence."""
    kept_peak_nbytes: int
    """Peak of saved tensors if all stayed in memory."""
    peak_nbytes: int
    """Predicted peak."""
    compute_seconds: float
    """Step time when nothing waits."""
    stall_seconds: float
    """Predicted wait per step."""
    step_seconds: float
    """Both together."""
    disk_nbytes: int
    """Written to the drive per step."""
    daily_nbytes: float
    """Written if training went on day and night."""
    num_records: int
    """Tensors that the step saves."""
    num_moved: int
    """Of these, that leave memory."""
    drive_life_years: float | None
    """Null where nothing is written, or `--tbw` is not given."""


class DemoRun(TypedDict):
    """One of the two runs; what it did not get to is null."""

    outcome: str
    """`finished`, or what went wrong and in which step."""
    peak_rss_nbytes: int | None
    """Resident memory above the level before the first step."""
    peak_saved_nbytes: int | None
    """Saved tensors in memory, with ssdtrain's own buffers."""
    step_seconds: float | None
    """Median of the timed steps."""
    all_step_seconds: list[float]
    """Each of them."""
    warm_up_loss: float | None
    losses: list[float]
    """Of the timed steps."""


class Compared(TypedDict):
    """Both runs; what was not reached is null."""

    step_time_ratio: float | None
    """Median step time with ssdtrain over that without."""
    losses_equal: bool | None
    """Whether every loss that both runs got to is the same to the bit."""
    parameters_equal: bool | None
    """Whether the trained parameters are the same to the bit."""
    stall_seconds: float | None
    """What training waited, in all steps; this and the next three are also in `stats`."""
    written_nbytes: int | None
    """To the drive, in all steps."""
    read_nbytes: int | None
    """From the drive, in all steps."""
    engine: str | None
    """What moved the bytes."""
    memory_limit_nbytes: int | None
    """Of private memory, that each run could add; null without `--memory-limit`."""
    settings: DemoSettings
    plain: DemoRun
    ssdtrain: DemoRun
    stats: dict[str, Any]
    """Fields of [`Stats`](statistics.md); empty where the run failed."""


OUTPUTS = MappingProxyType(
    {
        "report RUN": (Described,),
        "report RUN RUN": (TwoRuns,),
        "doctor": (Examined,),
        "bench": (Report, Advice, Measured),
        "plan": (Asked, Estimate, Choices),
        "plan --record RUN": (Replayed,),
        "demo": (Compared,),
    }
)
"""By command: the classes whose fields, taken together, are those of the object that it prints."""
