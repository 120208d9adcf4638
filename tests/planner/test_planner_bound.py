"""A bound that no placement gets below, and searches that end at it."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from steps import MIB, layers, pipeline, scattered, some_machine

from ssdtrain.planner import Goal, Lifetime, Machine, Plan, Step, Tier, choose, decide, make_plan, recompute
from ssdtrain.planner.lower_bound import least_at, moments_near_peak
from ssdtrain.planner.search import Search
from ssdtrain.planner.timeline import Timeline


def drive(step: Step, share: float) -> Machine:
    """One that takes a share of what it needs to take everything along."""
    bandwidth = 2.5 * share * step.nbytes / step.seconds
    return Machine(Tier(bandwidth, bandwidth), staging_nbytes=64 * MIB, prefetch_nbytes=64 * MIB)


# -- the bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_no_placement_is_below_it_at_any_moment(seed: int) -> None:
    """Random placements as far as the rules allow them, at both ends of every period between two changes."""
    chance = random.Random(seed)
    step = [pipeline(chance, 12), pipeline(chance, 4, 4, 2), scattered(chance, 16)][seed % 3]
    other = tuple((chance.uniform(0, step.seconds), chance.randint(0, 9 * MIB)) for _ in range(3))
    machine = some_machine(chance, step, has_host=seed % 2 == 1)
    if seed % 5 == 0:
        machine = replace(machine, max_written_nbytes=0.4 * step.nbytes)
    timeline = Timeline(replace(step, other=tuple(sorted(other))), machine)
    num = 0
    for _ in range(30):
        placement = [int(chance.choice([0, *timeline.tiers])) for _ in step.records]
        moves = timeline.moves(placement)
        for _ in range(10):
            if moves.is_clean:
                break
            for i in moves.late + moves.refused:
                placement[i] = 0
            moves = timeline.moves(placement)
        events, level = timeline.events(moves), 0
        for (at, delta), (end, _) in pairwise(events):
            level += delta
            if end > at:
                assert least_at(timeline, (at, True)) <= level
                assert least_at(timeline, (end, False)) <= level
                num += 1
    assert num > 300


def test_what_a_moment_is_made_of() -> None:
    """Ten records of 1 MiB, one saved a second, and 5 MiB of others: by second 9 half a record a second is written.

    Of the 4.5 MiB only whole records count, and the one saved last is there anyway.
    """
    records = [Lifetime(MIB, float(i), 20.0 - i, 20.5 - i) for i in range(10)]
    step = Step(tuple(records), 21.0, other=((0.0, 5 * MIB),))
    timeline = Timeline(step, Machine(Tier(0.5 * MIB, 1000 * MIB)))
    assert least_at(timeline, (9.0, True)) == (5 + 10 - 4) * MIB
    assert least_at(timeline, (9.0, False)) == (5 + 9 - 4) * MIB
    slow_back = Timeline(step, Machine(Tier(1000 * MIB, 0.5 * MIB)))
    assert least_at(slow_back, (14.0, True)) == (5 + 7 - 3) * MIB  # needed from 15 to 20, half of 6 s


def test_bounds_of_the_machine_count() -> None:
    records = [Lifetime(MIB, 0.0, 20.0, 20.5) for _ in range(10)]
    step, tier = Step(tuple(records), 21.0), Tier(1000 * MIB, 1000 * MIB)

    def away(machine: Machine) -> float:
        return 10 - least_at(Timeline(step, machine), (10.0, True)) / MIB

    assert away(Machine(tier)) == 10
    assert away(Machine(replace(tier, capacity_nbytes=3.5 * MIB))) == 3
    assert away(Machine(tier, staging_nbytes=4 * MIB)) == 4
    assert away(Machine(tier, staging_nbytes=MIB // 2)) == 1  # a larger one may go alone
    assert away(Machine(tier, prefetch_nbytes=5 * MIB)) == 5
    assert away(Machine(tier, max_written_nbytes=2 * MIB)) == 2
    assert away(Machine(tier, replace(tier, capacity_nbytes=3 * MIB), max_written_nbytes=2 * MIB)) == 5
    assert away(Machine(tier, tier)) == 10


def test_what_never_comes_back_needs_no_way_back() -> None:
    """Twenty seconds bring two records back, and backward asks for three of the ten."""
    records = [Lifetime(MIB, float(i), math.inf if i < 7 else 30.0, 30.5) for i in range(10)]
    timeline = Timeline(Step(tuple(records), 31.0), Machine(Tier(1000 * MIB, 0.1 * MIB)))
    assert least_at(timeline, (10.0, True)) == MIB


def test_periods_near_the_peak_come_highest_first() -> None:
    records = (Lifetime(4 * MIB, 1.0, 2.0, 3.0), Lifetime(5 * MIB, 4.0, 5.0, 6.0), Lifetime(MIB, 7.0, 8.0, 9.0))
    timeline = Timeline(Step(records, 10.0), Machine(None))
    moments = moments_near_peak(timeline, timeline.moves([0, 0, 0]), 4 * MIB)
    assert moments == [(4.0, True), (6.0, False), (1.0, True), (3.0, False)]


# -- where searches end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, 0.1])
@pytest.mark.parametrize("num", [40, 60])
def test_steps_of_layers_end_at_the_bound(num: int, share: float) -> None:
    """With walks to spare, and the peak is within half a percent of what no placement gets below."""
    step = layers(num)
    timeline = Timeline(step, drive(step, share))
    search = Search(timeline)
    search.run()
    bound = max(least_at(timeline, moment) for moment in moments_near_peak(timeline, timeline.moves(search.best), 0))
    assert search.best_peak <= 1.005 * bound
    assert search.num_walks < 0.6 * search._most_walks


def test_a_search_ends_when_the_budget_is_met() -> None:
    """The bound is out of reach here; a budget that a rule already meets needs no more than it and the pruning."""
    step = scattered(random.Random(0), 60)
    timeline = Timeline(step, some_machine(random.Random(1), step, has_host=True))
    thorough, quick = Search(timeline), Search(timeline)
    thorough.run()
    quick.run(enough=0.9 * quick.kept_peak)
    assert thorough.best_peak < quick.best_peak <= 0.9 * quick.kept_peak
    assert quick.num_walks < thorough.num_walks / 3


def test_shakes_end_when_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six records of a small model: there is no more to find, but the bound lies lower."""
    step = pipeline(random.Random(2), 6)
    search = Search(Timeline(step, some_machine(random.Random(1), step)))
    shaken, shakes = search._shaken, list[int]()
    monkeypatch.setattr(search, "_shaken", lambda *args: shakes.append(1) or shaken(*args))
    search.run()
    assert len(shakes) == 30 and search.num_walks < search._most_walks / 2


# -- plans that wait -------------------------------------------------------------------------------------------------


def played(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every step that is played."""
    calls, predict = list[int](), decide.predict

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return predict(*args, **options)

    monkeypatch.setattr(decide, "predict", counted)
    return calls


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_a_tenth_of_the_plays_finds_about_the_least_wait(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    step = layers(60)
    goal, machine = Goal(memory_budget=int(0.4 * step.nbytes)), drive(step, share)
    calls = played(monkeypatch)
    plan = make_plan(step, machine, goal)
    assert 10 < len(calls) <= 30
    monkeypatch.setattr(decide, "_LONG_STRIDES", 200)
    every = make_plan(step, machine, goal)
    assert len(calls) > 200
    assert plan.stall_seconds > 0 and plan.peak_nbytes <= goal.memory_budget
    assert every.step_seconds <= plan.step_seconds <= 1.02 * every.step_seconds


def test_no_plan_is_made_that_cannot_be_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once some blocks make the step fit without a wait, more of them can only take longer."""
    step, planned = layers(60), list[Step]()

    def noted(step: Step, machine: Machine, goal: Goal) -> Plan:
        planned.append(step)
        return make_plan(step, machine, goal)

    monkeypatch.setattr(recompute, "make_plan", noted)
    goal = Goal(memory_budget=int(0.5 * step.nbytes))
    chosen, plan = choose(step, [f"layer.{i}" for i in range(10)], drive(step, 0.1), goal)
    assert 0 < len(chosen) < 10 and plan.stall_seconds == 0
    assert len(planned) == 1 + len(chosen)
