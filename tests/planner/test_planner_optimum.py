"""Plans against the optimum, which a mixed-integer solver finds: see `optimum.py`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from optimum import lowest_peak
from steps import FOLDER, pipeline, recorded, scattered, some_machine

from ssdtrain.planner import Goal, Machine, Step, make_plan
from ssdtrain.planner.predict import predict
from ssdtrain.planner.timeline import Timeline

FILES = sorted(FOLDER.glob("*.json"))
WITHIN = 1.02


def check(step: Step, machine: Machine) -> None:
    plan, optimum = make_plan(step, machine, Goal()), lowest_peak(step, machine)
    assert plan.stall_seconds == 0
    assert optimum.bound_nbytes <= optimum.peak_nbytes * (1 + 1e-9)
    assert plan.peak_nbytes <= max(WITHIN * optimum.bound_nbytes, 0), f"{plan}\n{optimum}\n{machine}"
    played = predict(Timeline(step, machine), plan.placement, is_patient=False)
    assert (played.peak_nbytes, played.stall_seconds, played.refused) == (plan.peak_nbytes, 0, ())


@pytest.mark.parametrize("seed", range(12))
def test_pipelines(seed: int) -> None:
    chance = random.Random(seed)
    step = pipeline(chance, *[(12,), (4, 3, 2), (6, 3, 1), (3, 5, 3)][seed % 4])
    check(step, some_machine(chance, step, has_host=seed % 3 == 2))


@pytest.mark.parametrize("seed", range(8))
def test_scattered_records(seed: int) -> None:
    chance = random.Random(100 + seed)
    step = scattered(chance, 12)
    check(step, some_machine(chance, step, has_host=seed % 4 == 3))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("seed", range(2))
def test_recorded_steps(path: Path, seed: int) -> None:
    chance = random.Random(f"{path.stem} {seed}")
    step = recorded(path)
    check(step, some_machine(chance, step))
