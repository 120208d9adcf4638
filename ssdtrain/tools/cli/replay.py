"""`ssdtrain plan --trace`: the plan of a recorded step for other drives or another budget."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ssdtrain.planner import Goal, Machine, Plan, Tier, make_plan
from ssdtrain.policy import ActivationPolicy
from ssdtrain.run_log import read_run
from ssdtrain.run_log.replay import latest_detail, step_of
from ssdtrain.tools.estimate import Drives


def plan_of(trace: Path, drives: Drives, read_gbs: float, memory_budget: str | None) -> Plan:
    """Plans the latest ordinary step of a record.

    Raises:
        ValueError: it is no record, has no timeline, or the budget is no size.
        OSError: it cannot be read.
    """
    run = read_run(trace)
    detail = latest_detail(run)
    if detail is None:
        raise ValueError(
            f"Expected a record with the timeline of a step, got one without: {trace}; record a longer run"
        )
    policy = ActivationPolicy.of({**run.policy, "memory_budget": memory_budget, "recompute": "never", "record": None})
    machine = Machine(
        Tier(drives.write_bandwidth, drives.num * read_gbs * 1e9),
        staging_nbytes=policy.staging_nbytes,
        prefetch_nbytes=policy.prefetch_nbytes,
    )
    endurance = math.inf if drives.tbw is None else drives.num * drives.tbw * 1e12 * drives.wear_factor
    return make_plan(step_of(detail), machine, Goal(policy.memory_budget, endurance_nbytes=endurance))


def as_values(plan: Plan) -> dict[str, Any]:
    """Every number of the plan, for JSON."""
    names = "statement kept_peak_nbytes peak_nbytes compute_seconds stall_seconds step_seconds disk_nbytes daily_nbytes"
    life = plan.drive_life_years
    values = {name: getattr(plan, name) for name in names.split()}
    num_moved = sum(1 for where in plan.placement if where)
    return values | {
        "num_records": len(plan.placement),
        "num_moved": num_moved,
        "drive_life_years": None if math.isinf(life) else life,
    }
