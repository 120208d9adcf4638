"""Trains the same model in two processes, step by step in turn, and puts their measurements side by side.

The steps of the two runs alternate, and so does the run that goes first in a round, so that whatever else the
machine does hits both alike. It knows neither torch nor how results are shown; `report` shows a `Comparison`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal

from ssdtrain.tools.demo.process import WorkerError, WorkerProcess
from ssdtrain.tools.demo.settings import DemoSettings

Progress = Callable[[str], None]
"""Is told what happens, one line at a time."""

Watcher = Callable[["Standing"], None]
"""Is shown where both runs are, after every step of either."""

ROLES = ("plain", "ssdtrain")


@dataclass(frozen=True)
class Standing:
    """Where both runs are."""

    settings: DemoSettings
    results: Mapping[str, RunResult]
    """By role; they go on changing."""
    so_far: Mapping[str, Mapping[str, Any]]
    """By role: what the latest step told."""


class LimitError(ValueError):
    """There is no memory limit that tells the two runs apart."""


@dataclass
class RunResult:
    """What one run did."""

    role: str
    losses: list[str] = field(default_factory=list)
    """Exact losses as hexadecimal floats, the warm-up step's first."""
    step_seconds: list[float] = field(default_factory=list)
    """Seconds of the timed steps."""
    measurements: dict[str, Any] = field(default_factory=dict)
    """Peaks, statistics and the hash of the parameters; see `worker.Run.finish()`."""
    failure: WorkerError | None = None
    """Why the run ended early."""

    @property
    def median_step_seconds(self) -> float | None:
        """Median over the timed steps, or None when there was none."""
        return median(self.step_seconds) if self.step_seconds else None

    @property
    def outcome(self) -> str:
        """`finished`, or what went wrong and where."""
        if self.failure is None:
            return "finished"
        where = f"step {len(self.losses)}" if self.losses else "the warm-up step"
        return f"{self.failure.kind.replace('_', ' ')} in {where}"

    def get(self, name: str) -> Any:
        """Returns one measurement, or None where the run did not get that far."""
        return self.measurements.get(name)


@dataclass(frozen=True)
class Comparison:
    """Both runs of one demonstration."""

    settings: DemoSettings
    plain: RunResult
    ssdtrain: RunResult
    memory_limit_nbytes: int | None = None
    reference_losses: tuple[str, ...] = ()
    """First losses of a plain run without the limit, for comparison when the plain run under it had none."""

    @property
    def step_time_ratio(self) -> float | None:
        """Median step time with ssdtrain over that without."""
        plain, ours = self.plain.median_step_seconds, self.ssdtrain.median_step_seconds
        return ours / plain if plain and ours else None

    @property
    def losses_equal(self) -> bool | None:
        """Whether every loss that both runs got to is the same to the bit; None when there is none."""
        expected = max(self.plain.losses, self.reference_losses, key=len)
        pairs = list(zip(expected, self.ssdtrain.losses, strict=False))
        return all(a == b for a, b in pairs) if pairs else None

    @property
    def parameters_equal(self) -> bool | None:
        """Whether the trained parameters are the same to the bit; None when one run did not finish."""
        hashes = [run.get("parameters_sha256") for run in (self.plain, self.ssdtrain)]
        return hashes[0] == hashes[1] if all(hashes) else None

    @property
    def problem(self) -> str | None:
        """What is not as promised: equal results and, under a limit, only the plain run out of it."""
        if False in (self.losses_equal, self.parameters_equal):
            return "the two runs learned different things; offloading must not change a bit. Please report it."
        if self.memory_limit_nbytes is None:
            return None
        if self.ssdtrain.failure is not None:
            return f"the ssdtrain run did not finish ({self.ssdtrain.outcome}). Choose a larger limit."
        if self.plain.failure is None:
            return "the plain run finished as well. Choose a smaller limit."
        return None


def compare(
    settings: DemoSettings,
    *,
    memory_limit: int | Literal["auto"] | None,
    progress: Progress,
    watcher: Watcher = lambda standing: None,
) -> Comparison:
    """Runs the demonstration.

    Args:
        settings: What to train and where.
        memory_limit: Private memory, in bytes, that each run may add to what it has before its first step.
            "auto" measures both runs first and takes the middle of their peaks; None is no limit.
        progress: Is told what happens.
        watcher: Is shown where both runs are.

    Returns:
        Both runs; under a limit one of them may have run out of memory.

    Raises:
        WorkerError: A worker failed in any other way. Both are gone by then.
        LimitError: "auto" found no size between the two peaks.
    """
    progress(f"Training a {settings.describe()}.")
    if memory_limit == "auto":
        progress("Measuring the memory of both runs to choose a limit between them.")
        measured = _train(replace(settings, steps=1), progress, watcher, measures_private_memory=True)
        limited = _train(settings, progress, watcher, memory_limit_nbytes=_limit_between(measured))
        return replace(limited, reference_losses=tuple(measured.plain.losses))
    return _train(settings, progress, watcher, memory_limit_nbytes=memory_limit)


def _train(settings: DemoSettings, progress: Progress, watcher: Watcher, **job: Any) -> Comparison:
    with _Pair(settings, progress, watcher) as pair:
        pair.start(**job)
        return pair.train()


def _limit_between(runs: Comparison) -> int:
    plain, ours = (run.get("peak_private_nbytes") for run in (runs.plain, runs.ssdtrain))
    if ours >= plain:
        raise LimitError(
            f"Expected offloading to lower the peak of private memory, got {plain} bytes without and {ours} "
            "with it. Train something larger, or offload smaller tensors (--policy min_nbytes=64KiB)."
        )
    return int(plain + ours) // 2


class _Pair:
    """The two workers of one comparison and what came of them."""

    def __init__(self, settings: DemoSettings, progress: Progress, watcher: Watcher) -> None:
        self._settings = settings
        self._progress = progress
        self._watcher = watcher
        self._so_far: dict[str, Mapping[str, Any]] = {}
        self._stack = ExitStack()
        self._workers: dict[str, WorkerProcess] = {}
        self._results = {role: RunResult(role) for role in ROLES}
        self._limit_nbytes: int | None = None

    def __enter__(self) -> _Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, *, memory_limit_nbytes: int | None = None, measures_private_memory: bool = False) -> None:
        """Starts both workers at once and waits until both are ready."""
        self._limit_nbytes = memory_limit_nbytes
        for role in ROLES:
            self._workers[role] = self._stack.enter_context(WorkerProcess(role, self._settings))
            self._workers[role].start(
                memory_limit_nbytes=memory_limit_nbytes, measures_private_memory=measures_private_memory
            )
        for worker in self._workers.values():
            worker.receive()

    def train(self) -> Comparison:
        """Takes all steps in turn and collects what was measured."""
        for index in range(self._settings.steps + 1):
            for role in ROLES if index % 2 else ROLES[::-1]:
                self._step(role, index)
            self._progress(self._describe(index))
        for role in ROLES:
            answer = self._ask(role, "finish")
            if answer is not None:
                self._results[role].measurements = answer
                self._workers[role].end()
        plain, ours = (self._results[role] for role in ROLES)
        return Comparison(self._settings, plain, ours, memory_limit_nbytes=self._limit_nbytes)

    def _step(self, role: str, index: int) -> None:
        answer = self._ask(role, "step" if index else "warm_up")
        if answer is None:
            return
        self._results[role].losses.append(answer["loss"])
        if index:
            self._results[role].step_seconds.append(answer["seconds"])
        self._so_far[role] = answer["so_far"]
        self._watcher(Standing(self._settings, self._results, self._so_far))

    def _ask(self, role: str, command: str) -> dict[str, Any] | None:
        """Has one worker carry out a command; None when it ran into the memory limit, now or before."""
        result = self._results[role]
        if result.failure is not None:
            return None
        try:
            self._workers[role].send(command=command)
            return self._workers[role].receive()
        except WorkerError as failure:
            if self._limit_nbytes is None or failure.kind != "out_of_memory":
                raise
            result.failure, result.measurements = failure, failure.measurements
            return None

    def _describe(self, index: int) -> str:
        steps = [_describe_step(self._results[role], index) for role in ROLES]
        name = f"step {index}/{self._settings.steps}" if index else "warm-up "
        return f"{name}   " + "   ".join(steps)


def _describe_step(result: RunResult, index: int) -> str:
    if result.failure is not None:
        return f"{result.role}: {result.outcome}"
    loss = float.fromhex(result.losses[index])
    seconds = f"{result.step_seconds[index - 1]:6.2f} s, " if index else ""
    return f"{result.role}: {seconds}loss {loss:.6f}"
