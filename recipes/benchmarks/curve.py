"""Keep, offload, recompute, and what lies between, in 5 minutes on two cores: step time over peak memory of one GPT.

    python recipes/benchmarks/curve.py /mnt/nvme

The SSDTrain paper's figure (arXiv 2408.10013) with memory budgets in between: `plain` keeps all, `offload` sends away
what the budget asks for, `recompute` runs every block again (its inputs stay, or leave too), `mix` lets the planner
choose per block. Budgets are shares of the way from the least that can be had, recomputing, to what plain training
saves. All take their steps in turn, as in `compare.py`, whose options these are; of the first ones, in which ssdtrain
learns what a budget costs, memory does not count either. Where the drive hides all, `mix` is `offload`.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from typing import Any

from compare import MIB, Worker, add_options, as_text, circumstances, job_of, measure
from compare_methods import PLAIN

MODEL, CHECKPOINT = "gpt", "checkpoint per block"
BRANCHES = {"offload": "never", "mix": "auto", "recompute": "all"}
"""Name of each branch of the curve, and its `recompute`."""


def ends(job: dict[str, Any]) -> tuple[int, int]:
    """Bytes of saved tensors at the peak: the fewest that recomputing leaves, and those of plain training."""
    found = []
    for method in ("ssdtrain, recompute all", PLAIN):
        with Worker(method, job) as worker:
            worker.get_ready()
            worker.step()
            found.append(worker.finish()["peak_saved_nbytes"])
    return found[0], found[1]


def points(job: dict[str, Any], shares: list[float]) -> list[dict[str, Any]]:
    """What is measured besides plain training: a branch, a budget, and the policy of both."""
    least, most = ends(job)
    budgets = [round(least + share * (most - least)) for share in shares]
    return [
        {
            "name": f"{branch}, {budget / MIB:.0f} MiB",
            "branch": branch,
            "memory_budget": budget,
            "policy": job["policy"] | {"memory_budget": budget, "recompute": recompute},
        }
        for branch, recompute in BRANCHES.items()
        for budget in (budgets if branch != "recompute" else budgets[:1])  # its inputs all fit the other budgets
    ]


def draw(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per point, plain training first."""
    job = job_of(MODEL, args)
    chosen = points(job, args.shares)
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(method, job)) for method in (PLAIN, CHECKPOINT)]
        for point in chosen:
            workers.append(stack.enter_context(Worker("ssdtrain", job | {"policy": point["policy"]}, point["name"])))
        rows = measure(MODEL, workers, args.steps, is_settled=True)
    marks = [{"branch": branch, "memory_budget": None} for branch in (PLAIN, "recompute")] + chosen
    return [
        row | {key: mark[key] for key in ("branch", "memory_budget")} for row, mark in zip(rows, marks, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Step time over peak memory, from keep to offload to recompute.")
    add_options(parser)
    parser.set_defaults(steps=5)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.0, 0.1, 0.35, 0.7], help="budgets, 0 to 1")
    args = parser.parse_args()
    rows = draw(args)
    print(as_text(MODEL, rows) + "\n")
    print(json.dumps(circumstances(args) | {"model": MODEL, "points": rows}))


if __name__ == "__main__":
    main()
