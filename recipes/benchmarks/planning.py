"""Seconds to plan a step of ten thousand records: one forward and backward, and records without any order.

    python recipes/benchmarks/planning.py

Processor time of this process, the best of the repeats: what other programs do does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time

import ssdtrain
from ssdtrain.planner import Goal, Lifetime, Machine, Step, Tier, make_plan

MIB = 1 << 20


def tower(chance: random.Random, num: int) -> Step:
    """One forward, and a backward that asks for the last saved first and takes twice as long."""
    ends = [float(i + 1) for i in range(num)]
    lifetimes = []
    for saved in ends:
        needed = ends[-1] + 2 * (ends[-1] - saved)
        lifetimes.append(Lifetime(int(chance.uniform(0.5, 4) * MIB), saved, needed, needed + 2))
    return Step(tuple(lifetimes), 3 * ends[-1])


def scattered(chance: random.Random, num: int) -> Step:
    """Records that come and go as they like."""
    lifetimes = []
    for saved in sorted(chance.uniform(0, 10) for _ in range(num)):
        needed = saved + chance.uniform(0.1, 10)
        lifetimes.append(Lifetime(int(chance.uniform(0.5, 4) * MIB), saved, needed, needed + chance.uniform(0, 0.5)))
    return Step(tuple(lifetimes), max(lifetime.released for lifetime in lifetimes))


def seconds_to_plan(step: Step, share: float, repeats: int) -> float:
    """The least seconds; the drive takes `share` of what would take everything along."""
    need = share * step.nbytes / step.seconds
    machine = Machine(Tier(need, need), staging_nbytes=64 * MIB, prefetch_nbytes=64 * MIB)
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        make_plan(step, machine, Goal())
        seconds.append(time.process_time() - begin)
    return min(seconds)


def main() -> None:
    """Prints a line per step, and everything as JSON last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    rows = []
    for make in (tower, scattered):
        step = make(random.Random(0), options.records)
        for share in (0.3, 1.0, 4.0):
            seconds = seconds_to_plan(step, share, options.repeats)
            rows.append({"step": make.__name__, "drive_share": share, "seconds": seconds})
            print(f"{make.__name__:>10}, a drive of {share:g} of the need: {seconds:.3f} s", flush=True)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    print(json.dumps({"machine": machine, "ssdtrain": ssdtrain.__version__, "records": options.records, "rows": rows}))


if __name__ == "__main__":
    main()
