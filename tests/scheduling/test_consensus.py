"""Ranks plan with the lowest bandwidth that any of them measured."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed

from ssdtrain.planner import Goal, Lifetime, Machine, Step, Tier
from ssdtrain.scheduling.consensus import Consensus, consensus_of_job
from ssdtrain.scheduling.replanner import Measured, Replanner
from ssdtrain.stats import Counters

MIB = 1 << 20
NO_HOST = (0.0, 0.0)  # speeds of a host tier


@pytest.fixture
def store() -> torch.distributed.HashStore:
    return torch.distributed.HashStore()


def test_the_lowest_counts(store: torch.distributed.HashStore) -> None:
    ranks = [Consensus(store, rank, 3) for rank in range(3)]
    assert ranks[0].lowest((3e9, 6e9, *NO_HOST)) == (3e9, 6e9, *NO_HOST), "nobody else has measured: nobody waits"
    assert ranks[1].lowest((1e9, 8e9, *NO_HOST)) == (1e9, 6e9, *NO_HOST)
    assert ranks[2].lowest((2e9, 5e9, *NO_HOST)) == (1e9, 5e9, *NO_HOST)
    assert ranks[0].lowest((3e9, 6e9, *NO_HOST)) == (1e9, 5e9, *NO_HOST)


def test_only_changes_are_sent(store: torch.distributed.HashStore) -> None:
    one, other = (Consensus(store, rank, 2) for rank in range(2))
    one.lowest((1e9, 1e9, *NO_HOST))
    assert other.lowest((2e9, 2e9, *NO_HOST)) == (1e9, 1e9, *NO_HOST)
    one.lowest((1.05e9, 0.95e9, *NO_HOST))
    assert other.lowest((2e9, 2e9, *NO_HOST)) == (1e9, 1e9, *NO_HOST), "a twentieth is noise"
    one.lowest((0.5e9, 1e9, *NO_HOST))
    assert other.lowest((2e9, 2e9, *NO_HOST)) == (0.5e9, 1e9, *NO_HOST)


def test_contexts_do_not_mix(store: torch.distributed.HashStore) -> None:
    """The second one of a rank belongs to the second one of the others."""
    first = [Consensus(store, rank, 2) for rank in range(2)]
    second = [Consensus(store, rank, 2) for rank in range(2)]
    first[0].lowest((1e9, 1e9, *NO_HOST))
    assert second[1].lowest((2e9, 2e9, *NO_HOST)) == (2e9, 2e9, *NO_HOST)
    assert first[1].lowest((2e9, 2e9, *NO_HOST)) == (1e9, 1e9, *NO_HOST)


class Broken(torch.distributed.HashStore):
    def set(self, key: str, value: str) -> None:
        raise RuntimeError("connection reset by peer")


def test_a_store_that_is_gone_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    rank = Consensus(torch.distributed.HashStore(), 0, 2)
    rank._store = Broken()
    assert rank.lowest((1e9, 2e9, *NO_HOST)) == (1e9, 2e9, *NO_HOST)
    assert len(caplog.records) == 1 and "connection reset" in caplog.text


@contextlib.contextmanager
def job(folder: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_nobody_to_agree_with(tmp_path: Path) -> None:
    assert consensus_of_job() is None
    with job(tmp_path):
        assert consensus_of_job() is None


def step() -> Step:
    saved = [0.1 * i for i in range(8)]
    return Step(tuple(Lifetime(10 * MIB, at, 2.4 - 2 * at - 0.1, 2.4 - 2 * at) for at in saved), 2.5)


def review(replanner: Replanner, bandwidth: float, number: int) -> None:
    totals = Counters()
    totals.written_nbytes = totals.read_nbytes = number * 100 * MIB
    totals.write_busy_seconds = totals.read_busy_seconds = number * 100 * MIB / bandwidth
    replanner.review(step(), Measured(80 * MIB, 2.5, 0.0), totals)


def test_replicas_make_one_plan(store: torch.distributed.HashStore) -> None:
    """One drive is a hundred times slower: both ranks plan for that one."""
    machine = Machine(Tier(1.0, 1.0, math.inf))
    alone = Replanner(machine, Goal(), join=lambda: None)
    ranks = [Replanner(machine, Goal(), join=lambda rank=rank: Consensus(store, rank, 2)) for rank in range(2)]
    for number in range(1, 9):
        review(alone, 5e9, number)
        review(ranks[0], 5e9, number)
        review(ranks[1], 5e7, number)
        for replanner in (alone, *ranks):
            replanner._no_plan_before = 0.0  # steps of a test follow each other faster than any training's
    plans = [replanner.latest.plan for replanner in (alone, *ranks) if replanner.latest is not None]
    assert plans[1] == plans[2]
    assert plans[0].disk_nbytes > plans[1].disk_nbytes


def test_two_processes(tmp_path: Path) -> None:
    """Over the store of a real job, whose processes end at different times."""
    code = """if True:
        import sys, time, torch.distributed
        from ssdtrain.scheduling.consensus import consensus_of_job
        rank = int(sys.argv[2])
        meeting = f"file://{sys.argv[1]}/meeting"
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
        consensus = consensus_of_job()
        own = (1e9, 4e9, 0.0, 7e9) if rank == 0 else (2e9, 3e9, 5e9, 0.0)
        deadline = time.monotonic() + 60
        while consensus.lowest(own) != (1e9, 3e9, 5e9, 7e9):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        print("agreed")
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["agreed\n", "agreed\n"]
