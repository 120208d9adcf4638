"""A drive that changes while training goes on: slower, then a new plan; faster again, then another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import inside
import pytest
import torch
from conftest import MakeOffload
from drives import throttled
from steps import MIB
from test_adaptive import AUTO, gpt

from ssdtrain.planner import Goal, Lifetime, Machine, Step, Tier, make_probe
from ssdtrain.scheduling.bandwidth import Bandwidth, Rate
from ssdtrain.scheduling.replanner import Measured, Replanner
from ssdtrain.stats import Counters

TOWER = Step(tuple(Lifetime(4 * MIB, float(i), 20.0 - i, 20.5 - i) for i in range(10)), 21.0)
KEPT = Measured(40 * MIB, TOWER.seconds, 0.0)


class Run:
    """Steps of one kind, told to a replanner, on a drive of a bandwidth that is ours to choose."""

    def __init__(self) -> None:
        self.replanner = Replanner(Machine(Tier(1.0, 1.0)), Goal(), join=lambda: None)
        self._totals = Counters()

    def step(self, bandwidth: float, measured: Measured = KEPT) -> int:
        """Writes and reads what the latest plan sends; how many bytes."""
        prepared = self.replanner.latest
        nbytes = TOWER.nbytes if prepared is None else prepared.plan.disk_nbytes
        self._totals.written_nbytes += nbytes
        self._totals.read_nbytes += nbytes
        self._totals.write_busy_seconds += nbytes / bandwidth
        self._totals.read_busy_seconds += nbytes / bandwidth
        if prepared is not None:
            self.replanner.note_followed(prepared.plan)
            measured = replace(measured, followed=prepared.plan)
        inside.plan_at_once(self.replanner)
        self.replanner.review(TOWER, measured, self._totals)
        return nbytes

    def until_probe(self, bandwidth: float, limit: int = 3000) -> int:
        """Steps with nothing written before one with something."""
        return next(num for num in range(limit) if self.step(bandwidth) > 0)


SLOW, FAST = 0.01 * MIB, 100 * MIB


def test_a_declined_plan_asks_again() -> None:
    """Without probes the drive's bandwidth would be that of the first steps for as long as training lasts."""
    run = Run()
    for _ in range(2):
        run.step(SLOW)
    assert run.replanner.latest is not None and run.replanner.latest.plan.is_declined
    waits = [run.until_probe(SLOW) for _ in range(7)]
    assert waits[:3] == sorted(waits[:3]) and 16 <= waits[0] <= 64 and max(waits) <= 1024, waits
    assert run.replanner.latest.plan.is_declined, "the drive is as slow as before"
    run.until_probe(FAST)
    assert not run.replanner.latest.plan.is_declined
    assert run.step(FAST) > TOWER.nbytes // 2


def test_a_probe_that_waits_is_not_held_against_the_plan() -> None:
    """It is there to find out; the plan it stands in for goes on, and is not made anew."""
    run = Run()
    for _ in range(2):
        run.step(SLOW)
    declined = run.replanner.latest
    for _ in range(100):
        if (latest := run.replanner.latest) is not declined:
            break
        run.step(SLOW)
    assert latest is not None and "probe" in latest.plan.statement
    run.step(SLOW, Measured(KEPT.peak_nbytes, KEPT.seconds + 5, 5.0))
    assert run.replanner.latest is declined


def test_a_probe_whose_plan_is_replaced_does_not_end_all_probes() -> None:
    run = Run()
    for _ in range(2):
        run.step(SLOW)
    declined = run.replanner.latest
    while run.replanner.latest is declined:
        run.step(SLOW)
    run.replanner._no_plan_before = 0.0
    slower = replace(TOWER, seconds=2 * TOWER.seconds)
    for _ in range(4):
        run.replanner.review(slower, KEPT, run._totals)
    assert run.replanner.latest is not declined and "probe" not in str(run.replanner.latest)
    assert run.until_probe(SLOW) < 200


def test_a_moment_without_a_processor_is_no_slow_drive() -> None:
    """Of a gigabyte a step, 40 MiB took half a second once: what everything took together is counted on."""
    bandwidth = Bandwidth()
    bandwidth.note(1024 * MIB, 1.5, 40 * MIB, 0.5)
    assert bandwidth.average == pytest.approx(1024 * MIB / 1.5)
    for i in range(2, 20):
        bandwidth.note(1024 * i * MIB, 1.5 * i, 40 * i * MIB, 0.5 * i)
    assert bandwidth.average == pytest.approx(1024 * MIB / 1.5), "many of them are not one long period"
    bandwidth.note(1024 * 20 * MIB, 1.5 * 20, 40 * 19 * MIB + 512 * MIB, 0.5 * 19 + 5)
    assert bandwidth.average == pytest.approx(512 * MIB / 5), "half of the traffic is"


def test_a_burst_says_less_than_a_long_period() -> None:
    """Counted on is what a drive keeps up, until nothing was known of that for a while, each time a longer one."""
    bandwidth, burst, sustained = Bandwidth(), Rate(), Rate()

    def step(*, is_long: bool) -> None:
        """A burst at 1000 MiB/s, or a period of 0.9 s at 100."""
        rate, nbytes, seconds = (sustained, 90 * MIB, 0.9) if is_long else (burst, 100 * MIB, 0.1)
        rate.nbytes, rate.seconds = rate.nbytes + nbytes, rate.seconds + seconds
        nbytes, seconds = burst.nbytes + sustained.nbytes, burst.seconds + sustained.seconds
        bandwidth.note(nbytes, seconds, sustained.nbytes, sustained.seconds)

    step(is_long=False)
    assert bandwidth.average == pytest.approx(1000 * MIB)
    step(is_long=True)
    assert bandwidth.average == pytest.approx(100 * MIB)
    waits = []
    for _ in range(3):
        waits.append(0)
        while bandwidth.average < 500 * MIB:
            step(is_long=False)
            waits[-1] += 1
        step(is_long=True)
        assert bandwidth.average == pytest.approx(100 * MIB), "asked again, it answered"
    assert waits == [32, 64, 128]


def test_a_probe_is_small_and_early() -> None:
    probe = make_probe(TOWER, Goal(), 6 * MIB)
    assert probe is not None and probe.disk_nbytes == 8 * MIB and not probe.is_declined
    assert [i for i, where in enumerate(probe.placement) if where] == [0, 1], "those that are away the longest"
    assert all(record.saved < probe.starts[i] < record.needed for i, record in enumerate(TOWER.records[:2]))
    assert probe.peak_nbytes == probe.kept_peak_nbytes


def test_no_probe_where_no_drive_would_help() -> None:
    """The peak is elsewhere, or the budget is kept anyway: nothing is worth a write."""
    peak = ((0.0, 0), (20.9, 1000 * MIB), (21.0, 0))
    assert make_probe(Step(TOWER.records, TOWER.seconds, peak), Goal(), MIB) is None
    assert make_probe(TOWER, Goal(memory_budget=1000 * MIB), MIB) is None


@pytest.mark.cpu_only
def test_a_drive_that_slows_down_and_recovers(
    make_offload: MakeOffload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A throttled drive brings a plan that sends less than a megabyte; once it is fast, another one that sends more.

    Counted in steps, not in seconds, and far from what a busy machine does to plans by itself: every wait makes them
    send less for a while. Plans may take any part of the time here: these steps are short.
    """
    monkeypatch.setattr("ssdtrain.scheduling.replanner._PLANNING_SHARE", 1.0)
    _, step = gpt(128)
    expected = step()

    with make_offload(**AUTO) as offload:

        def until_planned_nbytes(is_reached: Callable[[int], bool]) -> None:
            seen = []
            for _ in range(600):
                for mine, plain in zip(step(), expected, strict=True):
                    assert torch.equal(mine, plain)
                plan = offload.plan
                if plan is not None and "probe" not in plan.statement:
                    seen.append(plan.disk_nbytes)
                    if is_reached(plan.disk_nbytes):
                        return
            pytest.fail(f"the plans sent {seen}")

        until_planned_nbytes(lambda nbytes: nbytes > 2 * MIB)
        with throttled(tmp_path, 2e6):
            until_planned_nbytes(lambda nbytes: nbytes < MIB)
        until_planned_nbytes(lambda nbytes: nbytes > 2 * MIB)
