"""Plans of steps small enough to work out by hand, and what must hold for all."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from steps import MIB, pipeline, scattered, some_machine, ten_thousand

from ssdtrain.planner import Goal, Lifetime, Machine, Plan, Step, Tier, Where, make_plan, reserve_nbytes
from ssdtrain.planner.predict import predict
from ssdtrain.planner.timeline import Timeline
from ssdtrain.policy import parse_nbytes, staging_under

FAST = Machine(Tier(1000 * MIB, 1000 * MIB))


def tower(num: int = 10, nbytes: int = MIB) -> Step:
    """A forward that saves one record a second and a backward that needs one a second, the last first."""
    records = [Lifetime(nbytes, float(i), 2.0 * num - i, 2.0 * num - i + 0.5) for i in range(num)]
    return Step(tuple(records), 2.0 * num + 1)


def disk(write: float, read: float | None = None, **bounds: float) -> Machine:
    return Machine(Tier(write * MIB, (write if read is None else read) * MIB), **bounds)


def moved(plan: Plan) -> list[int]:
    return [i for i, where in enumerate(plan.placement) if where]


# -- lowest peak -----------------------------------------------------------------------------------------------------


def test_with_a_fast_drive_little_is_ever_in_memory() -> None:
    """Two: the one being saved or used, and the one that comes back before the other is released."""
    plan = make_plan(tower(), FAST, Goal())
    assert plan.peak_nbytes <= 2 * MIB and plan.kept_peak_nbytes == 10 * MIB and plan.stall_seconds == 0
    assert plan.disk_nbytes == len(moved(plan)) * MIB and plan.host_nbytes == 0 and not plan.is_patient


def test_a_write_frees_memory_only_when_it_is_done() -> None:
    """A drive that writes half of what forward saves: 9 s until the peak are enough for 4 of 10, the fifth is late."""
    plan = make_plan(tower(), disk(0.5, 1000), Goal())
    assert plan.peak_nbytes == 6 * MIB and len(moved(plan)) == 4


def test_what_is_saved_last_stays() -> None:
    assert {8, 9}.isdisjoint(moved(make_plan(tower(), disk(0.5, 0.5), Goal())))


def test_a_slow_way_back_limits_what_leaves() -> None:
    """A tenth of a record a second: 20 s of step bring one back, and it starts 10 s before it is needed."""
    plan = make_plan(tower(), disk(1000, 0.1), Goal())
    assert plan.stall_seconds == 0 and moved(plan) in ([0], [1], [])


def test_starts_end_just_before_they_are_needed() -> None:
    plan, step = make_plan(tower(), disk(10, 10), Goal()), tower()
    for i in moved(plan):
        assert plan.starts[i] == pytest.approx(step.records[i].needed - 0.1)
    assert all(start == -math.inf for i, start in enumerate(plan.starts) if i not in moved(plan))


def test_what_does_not_lower_the_peak_is_not_written() -> None:
    """One huge record between small ones: only those alive with it can help, later ones leave for nothing."""
    early = [Lifetime(MIB, float(i), 100.0 - i, 100.5 - i) for i in range(4)]
    huge = Lifetime(50 * MIB, 10.0, 11.0, 12.0)
    late = [Lifetime(MIB, 20.0 + i, 60.0 - i, 60.5 - i) for i in range(10)]
    plan = make_plan(Step((*early, huge, *late), 101.0), disk(10, 10), Goal())
    assert moved(plan) == [0, 1, 2, 3] and plan.peak_nbytes == 50 * MIB


def test_micro_batches_in_flight() -> None:
    """1F1B keeps three micro-batches alive; each gives a part."""
    step = pipeline(random.Random(0), 8, 6, 3)
    plan = make_plan(step, some_machine(random.Random(4), step), Goal())
    assert {step.records[i].micro_batch for i in moved(plan)} >= {1, 2, 3, 4}
    assert plan.stall_seconds == 0 and plan.peak_nbytes < plan.kept_peak_nbytes


def test_the_peak_may_lie_in_backward() -> None:
    """A gradient of 20 MiB in mid-backward makes the peak: what is in use then, or was before, cannot help."""
    step = replace(tower(), other=((0.0, 0), (14.2, 20 * MIB), (14.8, 0)))
    plan = make_plan(step, FAST, Goal())
    assert plan.kept_peak_nbytes == 27 * MIB and plan.peak_nbytes == 21 * MIB
    assert set(moved(plan)) == {0, 1, 2, 3, 4, 5}


def test_a_record_that_is_never_needed_leaves_and_does_not_come_back() -> None:
    step = Step((Lifetime(5 * MIB, 0.0, math.inf, 20.0), *tower().records), 21.0)
    plan = make_plan(step, FAST, Goal())
    assert 0 in moved(plan) and plan.starts[0] == -math.inf


# -- bounds ----------------------------------------------------------------------------------------------------------


def test_what_is_larger_than_the_prefetch_bound_comes_back_alone() -> None:
    """A reload takes longer than the second between two needs: it would begin before the last one was asked for, so
    every other record leaves. With a bound that is not there at all nothing does."""
    slow = disk(1000, 0.75)
    plan = make_plan(tower(), replace(slow, prefetch_nbytes=MIB - 1), Goal())
    step, back = tower().records, moved(plan)
    assert back and plan.stall_seconds == 0
    assert all(plan.starts[i] >= step[j].needed for i, j in itertools.pairwise(back))
    assert len(moved(make_plan(tower(), replace(slow, prefetch_nbytes=2 * MIB), Goal()))) > len(back)
    assert make_plan(tower(), replace(FAST, prefetch_nbytes=0), Goal()).is_declined


def test_staging_bounds_what_is_on_its_way() -> None:
    """Two saved at once, room for one: the second would be refused, so it is not planned."""
    pair = [Lifetime(MIB, 1.0, 20.0, 21.0), Lifetime(MIB, 1.0, 30.0, 31.0)]
    last = Lifetime(4 * MIB, 10.0, 11.0, 12.0)
    step = Step((*pair, last), 32.0)
    assert len(moved(make_plan(step, disk(1, 1, staging_nbytes=MIB), Goal()))) == 1
    assert len(moved(make_plan(step, disk(1, 1, staging_nbytes=2 * MIB), Goal()))) == 2


def test_capacity_of_a_tier() -> None:
    room = Machine(Tier(1000 * MIB, 1000 * MIB, capacity_nbytes=3 * MIB))
    assert len(moved(make_plan(tower(), room, Goal()))) == 3


def test_the_host_tier_takes_what_the_drive_cannot() -> None:
    """The drive keeps half of the pace, host memory holds three records: together they move more."""
    slow = disk(0.5, 1000)
    both = replace(slow, host=Tier(1000 * MIB, 1000 * MIB, 3 * MIB))
    plan = make_plan(tower(), both, Goal())
    assert plan.placement.count(Where.HOST) == 3 and plan.placement.count(Where.DISK) >= 3
    assert plan.peak_nbytes < make_plan(tower(), slow, Goal()).peak_nbytes


def test_endurance_caps_what_is_written() -> None:
    """Three records per step of 21 s, and what that means for the drive's life."""
    per_day = 3 * MIB * 86400 / 21
    plan = make_plan(tower(), FAST, Goal(daily_nbytes=per_day * 1.01, endurance_nbytes=365.25 * 10 * per_day))
    assert plan.disk_nbytes == 3 * MIB
    assert plan.drive_life_years == pytest.approx(10) and "drive life 10.0 years" in str(plan)


def test_what_others_write_counts_for_the_endurance() -> None:
    per_day = 3 * MIB * 86400 / 21
    goal = Goal(daily_nbytes=per_day * 1.01, endurance_nbytes=365.25 * 10 * per_day, others_daily_nbytes=per_day / 3)
    plan = make_plan(tower(), FAST, goal)
    assert plan.disk_nbytes == 2 * MIB
    assert plan.drive_life_years == pytest.approx(10) and "TB for others)" in str(plan)
    plan = make_plan(tower(), FAST, replace(goal, others_daily_nbytes=2 * per_day))
    assert plan.is_declined and plan.statement == "declined: the drive's endurance allows no writes"


# -- a budget --------------------------------------------------------------------------------------------------------


def test_nothing_moves_when_everything_fits() -> None:
    plan = make_plan(tower(), FAST, Goal(memory_budget=10 * MIB))
    assert plan.is_declined and "everything fits the budget of 10.0 MiB" in plan.statement


def test_no_more_moves_than_the_budget_asks_for() -> None:
    plan = make_plan(tower(), FAST, Goal(memory_budget=7 * MIB))
    assert plan.peak_nbytes <= 7 * MIB and plan.disk_nbytes == 3 * MIB and plan.stall_seconds == 0


def test_endurance_that_allows_too_little_says_so() -> None:
    """One small record a step may be written, and the peak is the others'."""
    step = tower()
    small = replace(step.records[0], nbytes=1024)
    step = replace(step, records=(small, *step.records[1:]))
    plan = make_plan(step, FAST, Goal(daily_nbytes=2048 * 86400 / step.seconds))
    assert plan.is_declined and "endurance allows 2.0 KiB of the" in plan.statement


def test_a_gain_that_endurance_bounds_says_so() -> None:
    step = tower()
    plan = make_plan(step, FAST, Goal(daily_nbytes=3 * MIB * 86400 / step.seconds))
    assert not plan.is_declined and 0 < plan.disk_nbytes <= 3 * MIB
    assert "nothing waits; the drive's endurance allows 3.0 MiB of the" in plan.statement
    assert "endurance" not in make_plan(step, FAST, Goal()).statement


def test_a_budget_that_costs_time() -> None:
    plan = make_plan(tower(), disk(0.5, 1000, staging_nbytes=2 * MIB), Goal(memory_budget=4 * MIB))
    assert plan.peak_nbytes <= 4 * MIB and plan.is_patient and plan.stall_seconds > 0
    assert "under the budget of 4.0 MiB at a cost of" in plan.statement


def test_a_budget_that_cannot_be_met() -> None:
    plan = make_plan(replace(tower(), other=((0.0, 5 * MIB),)), disk(0.5, 1000), Goal(memory_budget=4 * MIB))
    assert "the budget of 4.0 MiB cannot be met: the lowest peak is" in plan.statement
    assert 5 * MIB < plan.peak_nbytes < plan.kept_peak_nbytes


@pytest.mark.parametrize("is_set", [True, False])
@pytest.mark.parametrize("step", [tower(), replace(tower(), other=((0.0, 50 * MIB),)), tower(30, 2 * MIB)])
def test_the_smallest_budget_that_can_be_met_is_said(step: Step, is_set: bool) -> None:
    """With the buffers that the context would have under it; a tenth less does not do."""
    machine, text = disk(0.5, 1000, staging_nbytes=2 * MIB), ""

    def plan_under(budget: int) -> Plan:
        buffers = reserve_nbytes(budget, step.records[0].nbytes) + (MIB if is_set else staging_under(budget))
        goal = Goal(memory_budget=budget, buffers_nbytes=buffers, is_staging_set=is_set)
        return make_plan(step, machine, goal)

    plan = plan_under(2 * MIB)
    (text,) = re.findall(r'memory_budget="(\w+)" can be met', plan.statement)
    smallest = parse_nbytes(text)
    assert plan.needed_nbytes <= smallest < plan.needed_nbytes + MIB
    assert "cannot be met" not in plan_under(smallest).statement
    assert "cannot be met" in plan_under(smallest * 9 // 10).statement


def test_a_budget_that_cannot_be_met_is_not_waited_for_in_vain() -> None:
    """Sending the last hundredth of what is in memory would take longer than the step."""
    large = replace(tower(), other=((0.0, 1000 * MIB),))
    plan = make_plan(large, disk(0.1, 1000, staging_nbytes=MIB), Goal(memory_budget=4 * MIB))
    lowest = make_plan(large, disk(1000, 1000), Goal()).peak_nbytes
    assert plan.peak_nbytes <= 1.02 * lowest and plan.stall_seconds == 0


# -- statements ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step, machine, statement",
    [
        (replace(tower(), other=((0.0, 0), (25.0, 900 * MIB))), FAST, "the peak is not in saved activations"),
        (Step((), 1.0), FAST, "nothing that could move was saved"),
        (tower(), Machine(None), "nowhere to move to"),
        (tower(), disk(0.05, 1000, staging_nbytes=MIB), r"moving everything would cost \d+% of the step time"),
    ],
)
def test_why_it_declines(step: Step, machine: Machine, statement: str) -> None:
    plan = make_plan(step, machine, Goal())
    assert plan.is_declined and plan.peak_nbytes == plan.kept_peak_nbytes

    assert re.search(f"declined: .*{statement}", plan.statement), plan.statement


def test_a_plan_is_readable() -> None:
    text = str(make_plan(tower(), FAST, Goal()))
    assert "the peak falls by" in text and "if everything stayed" in text and "written a day" in text


# -- for all ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_the_two_ways_to_evaluate_a_plan_agree(seed: int) -> None:
    """The timeline knows no waits, the prediction does: without any they are equal to the byte."""
    chance = random.Random(seed)
    step = [pipeline(chance, 20), pipeline(chance, 6, 4, 2), scattered(chance, 20)][seed % 3]
    machine = some_machine(chance, step, has_host=seed % 2 == 1)
    plan = make_plan(step, machine, Goal())
    played = predict(Timeline(step, machine), plan.placement, is_patient=False)
    assert (played.peak_nbytes, played.stall_seconds, played.refused) == (plan.peak_nbytes, 0.0, ())


def test_a_slower_drive_than_planned_for_is_predicted_to_stall() -> None:
    plan = make_plan(tower(), disk(1, 1), Goal())
    slower = predict(Timeline(tower(), disk(1, 0.2)), plan.placement, is_patient=False, starts=plan.starts)
    assert slower.stall_seconds > 0 and slower.num_late > 0
    behind = predict(Timeline(tower(), disk(0.2, 1, staging_nbytes=2 * MIB)), plan.placement, is_patient=False)
    assert behind.refused and behind.peak_nbytes > plan.peak_nbytes


def test_idle_memory_of_reloads_is_predicted() -> None:
    """What a finished reload leaves for the next one of its size is in memory too, unless it is reused at once."""
    plan = make_plan(tower(), replace(FAST, idle_nbytes=4 * MIB), Goal())
    assert make_plan(tower(), FAST, Goal()).placement == plan.placement
    assert plan.peak_nbytes >= make_plan(tower(), FAST, Goal()).peak_nbytes


def test_it_is_deterministic() -> None:
    step = scattered(random.Random(1), 50)
    machine = some_machine(random.Random(2), step, has_host=True)
    assert make_plan(step, machine, Goal()) == make_plan(step, machine, Goal())


@pytest.mark.parametrize("shape", ["tower", "1f1b", "scattered"])
def test_the_work_is_bounded_through_the_number_of_records(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand records are walked along a dozen times; the seconds are for recipes/benchmarks/planning.py."""
    walks: list[str] = []
    for name in ("moves", "levels_of"):
        monkeypatch.setattr(Timeline, name, counting(getattr(Timeline, name), name, walks))
    plan = make_plan(*ten_thousand(shape), Goal())
    assert plan.peak_nbytes < plan.kept_peak_nbytes
    assert 0 < len(walks) <= 12


def counting(function: Callable[..., Any], name: str, calls: list[str]) -> Callable[..., Any]:
    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return function(*arguments, **options)

    return counted
