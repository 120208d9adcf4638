"""A plan that sends a little to the drive only to learn how fast it is by now."""

from __future__ import annotations

import math
from dataclasses import replace

from ssdtrain.planner.decide import make_plan
from ssdtrain.planner.plan import Goal, Plan
from ssdtrain.planner.recorded_step import Machine, Step, Tier, Where

_LEAD = 0.25  # of the time away, for the reload: the drive may be slow


def make_probe(step: Step, goal: Goal, nbytes: int) -> Plan | None:
    """Sends records of at least `nbytes` in all, where there are so many: those that are away the longest.

    A drive that would lower the peak if it were perfect is worth asking; of any other nothing is to be learned, and
    then there is no probe.
    """
    ideal = make_plan(step, Machine(Tier(math.inf, math.inf)), goal)
    records = step.records
    sent = [i for i, where in enumerate(ideal.placement) if where and records[i].needed < math.inf]
    sent.sort(key=lambda i: records[i].saved - records[i].needed)
    total, chosen = 0, list[int]()
    while total < nbytes and len(chosen) < len(sent):
        chosen.append(sent[len(chosen)])
        total += records[chosen[-1]].nbytes
    if not chosen:
        return None
    placement, starts = [int(Where.KEEP)] * len(records), [-math.inf] * len(records)
    for i in chosen:
        placement[i] = int(Where.DISK)
        starts[i] = records[i].needed - _LEAD * (records[i].needed - records[i].saved)
    return replace(
        ideal,
        placement=tuple(placement),
        starts=tuple(starts),
        statement="a probe: is the drive faster by now?",
        is_patient=False,
        peak_nbytes=ideal.kept_peak_nbytes,
        stall_seconds=0.0,
        disk_nbytes=total,
        host_nbytes=0,
    )
