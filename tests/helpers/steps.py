"""Steps for the planner: made up ones, and recorded ones from `data/steps`."""

from __future__ import annotations

import json
import random
from pathlib import Path

from folders import TESTS

from ssdtrain.planner import Lifetime, Machine, Step, Tier

FOLDER = TESTS / "data" / "steps"
MIB = 1 << 20


def recorded(path: Path) -> Step:
    """A step checked in: rows of nbytes, saved, needed, released, micro-batch, module."""
    data = json.loads(path.read_text())
    return Step(tuple(Lifetime(*row) for row in data["records"]), data["seconds"])


def pipeline(chance: random.Random, num: int, num_passes: int = 1, depth: int = 1) -> Step:
    """1F1B of one stage: `num` records per micro-batch, up to `depth` of them alive; backward takes twice as long."""
    sizes = [int(chance.choice([1, 1, 2, 3, 4, 6]) * chance.uniform(0.9, 1.1) * MIB) for _ in range(num)]
    seconds = [chance.uniform(0.5, 1.5) for _ in range(num)]
    now, begun, done = 0.0, 0, 0
    saved: dict[tuple[int, int], float] = {}
    records = []
    while done < num_passes:
        if begun < num_passes and begun - done < depth:
            for i in range(num):
                now += seconds[i]
                saved[begun, i] = now
            begun += 1
            continue
        for i in reversed(range(num)):
            records.append(Lifetime(sizes[i], saved[done, i], now, now + 2 * seconds[i], done))
            now += 2 * seconds[i]
        done += 1
    return Step(tuple(sorted(records, key=lambda record: record.saved)), now)


def scattered(chance: random.Random, num: int) -> Step:
    """Records that come and go as they like."""
    records = []
    for _ in range(num):
        saved = chance.uniform(0, 10)
        needed = saved + chance.uniform(0.1, 10)
        records.append(Lifetime(int(chance.uniform(0.5, 4) * MIB), saved, needed, needed + chance.uniform(0, 0.5)))
    records.sort(key=lambda record: record.saved)
    return Step(tuple(records), max(record.released for record in records))


def some_machine(chance: random.Random, step: Step, *, has_host: bool = False) -> Machine:
    """Bandwidths from a tenth to four times of what would take everything along; tight and wide bounds."""
    need = step.nbytes / step.seconds * 2.5
    largest = max(record.nbytes for record in step.records)
    disk = Tier(need * chance.choice([0.1, 0.25, 0.5, 1, 2, 4]), need * chance.choice([0.1, 0.25, 0.5, 1, 2, 4]))
    host = Tier(need * chance.choice([1, 4]), need * chance.choice([1, 4]), step.nbytes * chance.choice([0.1, 0.3]))
    return Machine(
        disk,
        host if has_host else None,
        staging_nbytes=largest * chance.choice([1, 2, 4, 100]),
        prefetch_nbytes=largest * chance.choice([1, 2, 4, 100]),
    )


def ten_thousand(shape: str) -> tuple[Step, Machine]:
    """Ten thousand records of a tower, a pipeline's stage, or without order, and a machine."""
    chance = random.Random(3)
    step = {
        "tower": lambda: pipeline(chance, 10_000),
        "1f1b": lambda: pipeline(chance, 1250, 8, 4),
        "scattered": lambda: scattered(chance, 10_000),
    }[shape]()
    return step, some_machine(random.Random(5), step)


def layers(num: int) -> Step:
    """A forward and backward of half a second through layers of six records each, as a transformer saves them."""
    sizes = [[4, 4, 12, 4, 16, 16][i % 6] * MIB for i in range(num)]
    whole = 3 * sum([size + MIB for size in sizes])
    seconds = [0.5 * (size + MIB) / whole for size in sizes]
    now, saved = 0.0, list[float]()
    for took in seconds:
        now += took
        saved.append(now)
    records = []
    for i in reversed(range(num)):
        records.append(Lifetime(sizes[i], saved[i], now, now + 2 * seconds[i], module=f"layer.{i // 6}"))
        now += 2 * seconds[i]
    return Step(tuple(reversed(records)), now)
