"""One engine for saved activations, parameters and optimizer state: room, bounds, order and accounts of both users."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SLAB_NBYTES, STAGING_NBYTES
from state_tools import EAGER_STATE, MLP, adamw, batch, check_same, model_of, trainable, values

import ssdtrain
from ssdtrain.drive import Drive
from ssdtrain.engines import open_engine
from ssdtrain.space import HostShare, HostSpace

ENGINES = ["io_uring", "threads", "python"]
KIB = 1024
EAGER = {"mode": "all", "min_nbytes": 1, "staging_nbytes": STAGING_NBYTES}


def noted(text: str) -> None:
    raise AssertionError(f"unexpected: {text}")


def drive_in(directory: Path, engine: str = "threads", **options: Any) -> Drive:
    choice = open_engine(engine, [str(directory)], STAGING_NBYTES, SLAB_NBYTES, is_shared=True, **options)
    return Drive(choice, noted)


# -- the drive ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_two_users_have_files_of_their_own(tmp_path: Path, engine: str) -> None:
    first = drive_in(tmp_path, engine)
    second = first.join(noted, disk_nbytes=1 << 20)
    assert first.engine is second.engine
    (mine,), (theirs,) = first.allocate(4096, prefers_host=False), second.allocate(4096, prefers_host=False)
    assert mine.file != theirs.file
    assert second.allocate(1 << 20, prefers_host=False) == [], "more than its own bound"
    assert first.allocate(1 << 20, prefers_host=False)
    source = torch.arange(512)
    write = first.engine.write(theirs.file, theirs.offset, theirs.nbytes, [(source.data_ptr(), 4096, 0)])
    assert second.wait_written([write], 10)
    assert (first.totals().written_nbytes, first.totals().shared_written_nbytes) == (0, 4096)
    assert (second.totals().written_nbytes, second.totals().shared_written_nbytes) == (4096, 0)
    assert second.totals().write_busy_seconds > 0.0 == first.totals().write_busy_seconds
    second.close()
    first.close()
    assert first.engine.is_closed


@pytest.mark.parametrize("engine", ENGINES)
def test_room_is_given_back_by_whoever_goes(tmp_path: Path, engine: str) -> None:
    """The first to go frees its own files; the last one ends the engine; another may join in between."""
    first = drive_in(tmp_path, engine)
    second = first.join(noted)
    second.allocate(4096, prefers_host=False)
    with pytest.raises(RuntimeError, match="shared one"):
        first.join(noted)
    second.close()
    second.close()
    assert os.fstat(second.files[0].fd).st_size == 0 < os.fstat(first.files[0].fd).st_size
    third = first.join(noted)
    first.close()
    with pytest.raises(RuntimeError, match="after close"):
        first.join(noted)
    assert not third.engine.is_closed and third.allocate(4096, prefers_host=False)
    third.close()
    assert third.engine.is_closed


def test_an_engine_for_one_cannot_be_joined(tmp_path: Path) -> None:
    drive = Drive(open_engine("threads", [str(tmp_path)], STAGING_NBYTES, SLAB_NBYTES), noted)
    with pytest.raises(RuntimeError, match="another user"):
        drive.join(noted)
    drive.close()


def test_host_tier_is_shared_and_each_gives_back_what_it_holds(tmp_path: Path) -> None:
    space = HostSpace(7, 64 * KIB, lambda nbytes: "", noted)
    one, other = HostShare(space), HostShare(space)
    kept = other.allocate(16 * KIB)
    extents = [one.allocate(16 * KIB) for _ in range(3)]
    assert kept is not None and all(extents) and other.allocate(512) is None and one.peak_nbytes == 64 * KIB
    middle = extents[1]
    assert middle is not None
    one.release(middle._replace(offset=middle.offset + 4 * KIB, nbytes=4 * KIB))  # a part, and then the end
    one.release(middle._replace(offset=middle.offset + 12 * KIB, nbytes=4 * KIB))
    assert other.allocate(4 * KIB) and other.allocate(4 * KIB) and other.allocate(512) is None
    one.give_back()
    assert other.allocate(16 * KIB) and one.allocate(16 * KIB)


# -- what users do -----------------------------------------------------------------------------------------------------


def offloaded(directory: Path, model: torch.nn.Module, **policy: Any) -> tuple[Any, torch.optim.Optimizer]:
    """What holds the parameters, and the optimizer, on one drive."""
    ssdtrain.offload_parameters(model, directory, {**EAGER_STATE, **policy})
    home = ssdtrain.parameter_offload(model)
    return home, ssdtrain.offload_optimizer(adamw(trainable(model)), home, EAGER_STATE)


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, num: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + num):
        loss = model(batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["gpt", "moe", "encoder-decoder"])
def test_everything_on_one_drive_equals_plain_training(tmp_path: Path, kind: str, engine: str) -> None:
    plain = model_of(kind)
    expected = steps(plain, adamw(trainable(plain)), 6)
    model = model_of(kind)
    home, optimizer = offloaded(tmp_path, model, engine=engine)
    with ssdtrain.offload_activations(home, EAGER, model) as offload:
        assert steps(model, optimizer, 6) == expected
    own, theirs = offload.stats, home.stats
    assert own.written_nbytes > 0 and own.shared_written_nbytes > 0 and own.engine == engine
    assert "for parameters and optimizer state wrote" in str(own)
    engine_now = home.vault.engine
    assert own.written_nbytes + theirs.written_nbytes == engine_now.written_nbytes, "nothing is counted twice"
    assert own.read_nbytes + theirs.read_nbytes == engine_now.read_nbytes
    offload.close()
    with home.gathered():
        check_same(values(model), values(plain))
    optimizer.close()  # type: ignore[attr-defined]
    home.close()
    assert engine_now.is_closed and os.listdir(tmp_path) == []


def test_entered_again_and_closed_in_any_order(tmp_path: Path) -> None:
    """Activations come and go while parameters stay; they also outlive them, and then end the engine."""
    plain = MLP()
    state = plain.state_dict()
    expected = steps(plain, adamw(trainable(plain)), 4)
    model = MLP()
    model.load_state_dict(state) if False else None
    home, optimizer = offloaded(tmp_path, model)
    offload = ssdtrain.offload_activations(home, EAGER, model)
    losses = []
    for step in range(4):
        with offload:
            losses += steps(model, optimizer, 1, step)
    del expected, losses
    with offload:
        loss = model(batch(9))
    engine = home.vault.engine
    optimizer.close()  # type: ignore[attr-defined]
    assert not engine.is_closed
    loss.backward()
    home.close()
    del loss
    offload.close()
    assert engine.is_closed and os.listdir(tmp_path) == []
    with pytest.raises(RuntimeError, match="after close"), offload:
        pass
