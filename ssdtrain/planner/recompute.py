"""Which blocks to recompute instead of keeping what they saved: a step with some of them recomputed is another step.

A block that is recomputed keeps its input only. Its forward runs again when backward comes to it, and what it saves
then is in memory at once, with what is too small to be a record. The input is offloaded like any other record.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

from ssdtrain.planner.decide import make_plan, most_nbytes
from ssdtrain.planner.plan import Goal, Plan
from ssdtrain.planner.recorded_step import Lifetime, Machine, Step, Where

_MAX_PLANS = 24


@dataclass(frozen=True)
class _Run:
    """One forward of one block."""

    block: str
    records: tuple[int, ...]
    seconds: float
    needed: float
    """When backward comes to it."""
    released: float
    nbytes: int
    small_nbytes: int
    """What it saved that no record stands for,"""
    ended: float
    """until so many seconds of the step, and from its first record on."""


def choose(
    step: Step, blocks: Sequence[str], machine: Machine, goal: Goal, kept: frozenset[str] = frozenset()
) -> tuple[frozenset[str], Plan]:
    """Decides which of `blocks` to recompute, for a step in which none was.

    Args:
        step: as recorded; `Lifetime.module` names where each record was saved.
        blocks: names of modules that may be recomputed; every other module's records belong to none.
        machine: measured bandwidths and the bounds in force.
        goal: with a memory budget; without one nothing is recomputed, for it would only cost time.
        kept: what was chosen before: stays when nothing else is better by more than a hundredth.

    Returns:
        The names, and the plan for a step in which they are recomputed: the least step time under the budget, or the
        lowest peak where nothing gets under it.
    """
    plan = make_plan(step, machine, goal)
    budget = goal.memory_budget
    if budget is None or _rank(plan, budget) == (0, plan.compute_seconds):
        return frozenset(), plan
    order = _worth(step, blocks, plan)
    plans = {frozenset[str](): plan}
    for chosen in _options(order, kept):
        least, other = min(_rank(plan, budget) for plan in plans.values()), recomputed(step, chosen)
        if least > (0, other.seconds):  # else it could not even be better if nothing waited
            plans[chosen] = make_plan(other, machine, goal)
    most = most_nbytes(budget, [plan.peak_nbytes for plan in plans.values()])
    best = min(plans, key=lambda chosen: _rank(plans[chosen], most, 1.01 if chosen and chosen == kept else 1.0))
    return best, _explained(plans[best], best, step, len(order)) if best else plan


def _options(order: list[str], kept: frozenset[str]) -> Iterator[frozenset[str]]:
    """What was chosen before, then more and more, of many blocks in strides."""
    kept &= frozenset(order)
    if kept:
        yield kept
    stride = max(1, math.ceil(len(order) / _MAX_PLANS))
    yield from (frozenset(order[:k]) for k in range(stride, len(order) + 1, stride))
    if len(order) % stride:
        yield frozenset(order)


def recomputed(step: Step, blocks: frozenset[str]) -> Step:
    """The step that results when these blocks are recomputed."""
    runs = [run for run in _runs(step, sorted(blocks)) if run.needed < math.inf]
    inputs = {run.records[0]: run for run in runs}
    gone = {i for run in runs for i in run.records}
    delays = sorted((run.needed, run.seconds) for run in runs)

    def later(at: float) -> float:
        return at + sum(seconds for needed, seconds in delays if needed < at)

    records = [
        replace(
            record,
            needed=later(inputs[i].needed if i in inputs else record.needed),
            released=later(inputs[i].released if i in inputs else record.released),
        )
        for i, record in enumerate(step.records)
        if i in inputs or i not in gone
    ]
    return Step(tuple(records), step.seconds + sum(run.seconds for run in runs), _other(step, runs, later))


def _other(step: Step, runs: list[_Run], later: Callable[[float], float]) -> tuple[tuple[float, int], ...]:
    """Memory that no placement changes, and what blocks save when they run again."""
    changes = [(run.ended, -run.small_nbytes) for run in runs]
    changes += [(later(run.needed), run.nbytes + run.small_nbytes) for run in runs]
    changes += [(later(run.released), -run.nbytes - run.small_nbytes) for run in runs]
    before = 0
    for at, nbytes in step.other:
        changes.append((later(at), nbytes - before))
        before = nbytes
    total, levels = 0, []
    for at, change in sorted(change for change in changes if change[0] < math.inf):
        total += change
        levels.append((at, max(0, total)))  # several micro-batches: some of it has been seen to go
    return tuple(levels)


def _runs(step: Step, blocks: Sequence[str]) -> list[_Run]:
    """The forwards of blocks: records of one block and one micro-batch that follow each other."""
    owners = [_owner(record.module, blocks) for record in step.records]
    runs: list[_Run] = []
    begin = 0
    for i in range(1, len(owners) + 1):
        same = i < len(owners) and (owners[i], step.records[i].micro_batch) == (
            owners[begin],
            step.records[begin].micro_batch,
        )
        if not same:
            if owners[begin]:
                runs.append(_run(step, owners[begin], begin, i))
            begin = i
    return runs


def _run(step: Step, block: str, begin: int, end: int) -> _Run:
    records, began = step.records[begin:end], step.records[begin].saved
    first_use = min(record.needed for record in step.records[begin:end])
    after = step.records[end].saved if end < len(step.records) else min(first_use, step.seconds)
    return _Run(
        block,
        tuple(range(begin, end)),
        max(0.0, after - began),
        first_use,
        max(record.released for record in records),
        sum(record.nbytes for record in records),
        max(0, _other_at(step, after) - _other_at(step, began)),
        after,
    )


def _other_at(step: Step, at: float) -> int:
    """Memory that no placement changes."""
    i = bisect_right(step.other, at, key=itemgetter(0))
    return step.other[i - 1][1] if i else 0


def _owner(module: str, blocks: Sequence[str]) -> str:
    return next((block for block in blocks if module == block or module.startswith(f"{block}.")), "")


def _worth(step: Step, blocks: Sequence[str], plan: Plan) -> list[str]:
    """Blocks that hold memory, the one that frees most per second of recomputation first."""
    held: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for run in _runs(step, blocks):
        kept = sum(_held(step.records[i], plan.placement[i], is_input=i == run.records[0]) for i in run.records)
        held[run.block] = held.get(run.block, 0.0) + kept + run.small_nbytes
        seconds[run.block] = seconds.get(run.block, 0.0) + run.seconds
    return sorted((block for block in held if held[block]), key=lambda b: (-held[b] / (seconds[b] or 1e-9), b))


def _held(record: Lifetime, where: int, *, is_input: bool) -> float:
    """Bytes in memory, or the trouble of moving them, that recomputation saves."""
    if is_input:
        return 0.0
    return record.nbytes * (1.0 if where == Where.KEEP else 0.5)


def _rank(plan: Plan, budget: int, slack: float = 1.0) -> tuple[float, float]:
    return max(0, plan.peak_nbytes - budget), plan.step_seconds / slack


def _explained(plan: Plan, chosen: frozenset[str], step: Step, num: int) -> Plan:
    share = (plan.compute_seconds - step.seconds) / step.seconds if step.seconds else 0.0
    text = f"{plan.statement}; {len(chosen)} of {num} blocks are recomputed, which costs {share:.0%} of the step time"
    return replace(plan, statement=text, recomputed=tuple(sorted(chosen)))
