"""Several users on one small file system: nobody takes what another needs, and what is not needed is given back."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path

import inside
import pytest
import torch
from drives import Drive, tmpfs_drive
from fault_tools import ENGINES, Lab, Trainer, check_equal, drain, plain_steps, policy

import ssdtrain

MIB = 1 << 20
every_engine = pytest.mark.parametrize("engine", ENGINES)


def used_nbytes(directory: str) -> int:
    state = os.statvfs(directory)
    return (state.f_blocks - state.f_bfree) * state.f_frsize


def check_room(stats: ssdtrain.Stats) -> None:
    assert "no spill space" not in stats.skipped and stats.written_nbytes > 0, str(stats)
    assert not any("no room" in text or "is full" in text for text in stats.fallbacks), str(stats)


def everybody_finds_room(directory: str, engine: str) -> None:
    steps = plain_steps(1)
    offloads = [ssdtrain.offload_activations(directory, policy(engine, min_nbytes=1)) for _ in range(4)]
    for offload in offloads:
        offload.__enter__()
    assert used_nbytes(directory) < 16 * MIB, "before anything was saved"
    for offload in offloads:
        offload.__exit__(None, None, None)
    for offload in offloads:
        check_equal(Trainer().step(offload, lambda offload=offload: drain(offload)), steps[0])
        check_room(offload.stats)
        assert offload.stats.read_nbytes > 0


@every_engine
def test_the_first_leaves_room_for_the_others(lab: Lab, tmp_path: Path, engine: str) -> None:
    """On 48 MiB: the first took 64 MiB ahead, as far as there was any, and to the second the drive was full."""
    with tmpfs_drive(tmp_path / "small", 48 * MIB) as drive:
        lab.run(everybody_finds_room, drive.directory, engine)


def growth(directory: str, engine: str) -> None:
    """Takes what it needs, in steps, up to the last of it."""
    offload = ssdtrain.offload_activations(directory, policy(engine, min_nbytes=1))
    x = torch.ones(MIB // 4, requires_grad=True)
    with offload:
        losses, taken = [], used_nbytes(directory)
        while "no spill space" not in offload.stats.skipped:
            y = x.exp()
            losses.append(y.exp())
            drain(offload)
            before, taken = taken, used_nbytes(directory)
            left = os.statvfs(directory).f_bavail * 4096
            assert taken - before <= 2 * MIB + 64 * 1024 + (left + taken - before) // 8
        assert taken > 28 * MIB, "all of it is used"
        for loss in losses:
            loss.sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    del losses, loss, y
    gc.collect()
    inside.source(offload).settle()
    assert used_nbytes(directory) < MIB, "left: given back"
    check_equal(Trainer().step(offload, lambda: drain(offload)), plain_steps(1)[0])


@every_engine
def test_a_file_grows_in_steps_to_the_last_of_the_room(lab: Lab, tmp_path: Path, engine: str) -> None:
    with tmpfs_drive(tmp_path / "small", 32 * MIB) as drive:
        lab.run(growth, drive.directory, engine)


def idle_gives_back(directory: str, engine: str) -> None:
    first = ssdtrain.offload_activations(directory, policy(engine, min_nbytes=1))
    second = ssdtrain.offload_activations(directory, policy(engine, min_nbytes=1))
    x = torch.ones(20 * MIB // 4, requires_grad=True)
    for offload in (first, second, first, second):
        with offload:
            y = x.exp().exp()
            drain(offload)
        check_room(offload.stats)
        y.sum().backward()
        del y
        gc.collect()
        assert offload.stats.num_live_records == 0
        inside.source(offload).settle()
        assert used_nbytes(directory) < 6 * MIB, "what each took ahead when it was made"


@every_engine
def test_who_is_idle_holds_no_room(lab: Lab, tmp_path: Path, engine: str) -> None:
    """Two contexts in turn, each of which needs most of the file system: both keep their files, empty."""
    with tmpfs_drive(tmp_path / "small", 40 * MIB) as drive:
        lab.run(idle_gives_back, drive.directory, engine)


def state_beside_activations(directories: Sequence[str]) -> None:
    (directory,) = directories
    trainer = Trainer()
    optimizer = ssdtrain.offload_optimizer(
        torch.optim.AdamW(trainer.model.parameters()), directory, {"min_nbytes": 0, "staging_nbytes": "1MiB"}
    )
    others = [ssdtrain.offload_activations(directory, policy(min_nbytes=1)) for _ in range(2)]
    trainer.forward().backward()
    optimizer.step()
    for offload in others:
        Trainer().step(offload, lambda offload=offload: drain(offload))
        check_room(offload.stats)
    assert not any("no room" in text or "is full" in text for text in optimizer.stats.fallbacks)  # type: ignore[attr-defined]


def test_state_leaves_room_too(lab: Lab, small_tmpfs: Drive) -> None:
    lab.run(state_beside_activations, [str(small_tmpfs.directory)])
