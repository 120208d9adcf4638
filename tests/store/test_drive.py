"""One engine for saved activations, parameters and optimizer state: room, bounds, order and accounts of both users."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from conftest import SLAB_NBYTES, STAGING_NBYTES
from drives import Drive as SmallDrive
from engine_tools import KINDS
from fault_tools import Lab
from state_tools import EAGER_STATE, adamw, batch, check_same, model_of, trainable, values

import ssdtrain
from ssdtrain.activations.offload import ActivationOffload
from ssdtrain.devices.simulated import SimulatedDevice
from ssdtrain.io.drive import Drive
from ssdtrain.io.host_space import HostShare, HostSpace
from ssdtrain.io.open_engine import open_engine
from ssdtrain.policy import ActivationPolicy, OptimizerPolicy
from ssdtrain.store.state_store import StateStore

KIB = 1024
EAGER = {"mode": "all", "min_nbytes": 1, "staging_nbytes": STAGING_NBYTES, "decline_below_nbytes": 0}


def noted(text: str) -> None:
    raise AssertionError(f"unexpected: {text}")


def drive_in(directory: Path, engine: str = "threads", **options: Any) -> Drive:
    choice = open_engine(engine, [str(directory)], STAGING_NBYTES, SLAB_NBYTES, is_shared=True, **options)
    return Drive(choice, noted)


# -- the drive ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", KINDS)
def test_two_users_have_files_of_their_own(tmp_path: Path, engine: str) -> None:
    first = drive_in(tmp_path, engine)
    second = first.attach(noted, disk_nbytes=1 << 20)
    assert first.engine is second.engine
    (mine,), (theirs,) = first.allocate(4096, prefers_host=False), second.allocate(4096, prefers_host=False)
    assert mine.file != theirs.file
    assert second.allocate(1 << 20, prefers_host=False) == [], "more than its own bound"
    assert first.allocate(1 << 20, prefers_host=False)
    source = torch.arange(512)
    write = first.engine.write(theirs.file, theirs.offset, theirs.nbytes, [(source.data_ptr(), 4096, 0)])
    assert second.wait(write.wait, 10)
    assert (first.totals().written_nbytes, first.totals().shared_written_nbytes) == (0, 4096)
    assert (second.totals().written_nbytes, second.totals().shared_written_nbytes) == (4096, 0)
    assert second.totals().write_busy_seconds > 0.0 == first.totals().write_busy_seconds
    assert second.close(10)
    assert first.close(10)
    assert first.engine.is_closed


@pytest.mark.parametrize("engine", KINDS)
def test_room_is_given_back_by_whoever_goes(tmp_path: Path, engine: str) -> None:
    """The first to go frees its own files; the last one ends the engine; another may join in between."""
    first = drive_in(tmp_path, engine)
    second = first.attach(noted)
    second.allocate(4096, prefers_host=False)
    with pytest.raises(RuntimeError, match="shared one"):
        first.attach(noted)
    assert second.close(10)
    assert second.close(10)
    assert os.fstat(second.files[0].fd).st_size == 0 < os.fstat(first.files[0].fd).st_size
    third = first.attach(noted)
    assert first.close(10)
    with pytest.raises(RuntimeError, match="after close"):
        first.attach(noted)
    assert not third.engine.is_closed and third.allocate(4096, prefers_host=False)
    assert third.close(10)
    assert third.engine.is_closed


def test_an_engine_for_one_cannot_be_joined(tmp_path: Path) -> None:
    drive = Drive(open_engine("threads", [str(tmp_path)], STAGING_NBYTES, SLAB_NBYTES), noted)
    with pytest.raises(RuntimeError, match="single user"):
        drive.attach(noted)
    assert drive.close(10)


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
    owner = ssdtrain.parameter_offload(model)
    return owner, ssdtrain.offload_optimizer(adamw(trainable(model)), owner, EAGER_STATE)


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, num: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + num):
        loss = model(batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("engine", KINDS)
@pytest.mark.parametrize("kind", ["gpt", "moe", "encoder-decoder"])
def test_everything_on_one_drive_equals_plain_training(tmp_path: Path, kind: str, engine: str) -> None:
    plain = model_of(kind)
    expected = steps(plain, adamw(trainable(plain)), 6)
    model = model_of(kind)
    owner, optimizer = offloaded(tmp_path, model, engine=engine)
    with ssdtrain.offload_activations(owner, EAGER, model) as offload:
        assert steps(model, optimizer, 6) == expected
    owner.store.engine.drain()
    own, theirs = offload.stats, owner.stats
    assert own.written_nbytes > 0 and own.shared_written_nbytes > 0 and own.engine == engine
    assert "for parameters and optimizer state wrote" in str(own)
    engine_now = owner.store.engine
    assert own.written_nbytes + theirs.written_nbytes == engine_now.written_nbytes, "nothing is counted twice"
    assert own.read_nbytes + theirs.read_nbytes == engine_now.read_nbytes
    offload.close()
    with owner.gathered():
        check_same(values(model), values(plain))
    optimizer.close()  # type: ignore[attr-defined]
    owner.close()
    assert engine_now.is_closed and os.listdir(tmp_path) == []


def test_entered_again_and_closed_in_any_order(tmp_path: Path) -> None:
    """Activations come and go while parameters stay; they also outlive them, and then end the engine."""
    plain = model_of("mlp")
    expected = steps(plain, adamw(trainable(plain)), 4)
    model = model_of("mlp")
    owner, optimizer = offloaded(tmp_path, model)
    offload = ssdtrain.offload_activations(owner, EAGER, model)
    losses = []
    for step in range(4):
        with offload:
            losses += steps(model, optimizer, 1, step)
    assert losses == expected
    engine = owner.store.engine
    with offload:
        loss = model(batch(9))
        optimizer.close()  # type: ignore[attr-defined]
        assert not engine.is_closed
        loss.backward()
    with owner.gathered():
        check_same(values(model), values(plain))
    owner.close()
    assert not engine.is_closed, "activations are not done with it"
    del loss
    offload.close()
    assert engine.is_closed and os.listdir(tmp_path) == []


def test_left_and_entered_again_nothing_is_counted_twice(tmp_path: Path) -> None:
    """Optimizer steps outside the context count too; another offload starts from nothing."""
    model = model_of("gpt")
    owner, optimizer = offloaded(tmp_path, model)
    owner.store.engine.drain()
    before = optimizer.stats.written_nbytes  # type: ignore[attr-defined]
    offload = ssdtrain.offload_activations(owner, EAGER, model)
    for step in range(4):
        with offload:
            model(batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    stats, engine = offload.stats, owner.store.engine
    engine.drain()
    stats = offload.stats
    assert stats.written_nbytes + optimizer.stats.written_nbytes == engine.written_nbytes  # type: ignore[attr-defined]
    assert stats.shared_written_nbytes == optimizer.stats.written_nbytes - before  # type: ignore[attr-defined]
    offload.close()
    assert offload.stats.written_nbytes == stats.written_nbytes
    another = ssdtrain.offload_activations(owner, EAGER, model)
    assert another.stats.written_nbytes == another.stats.shared_written_nbytes == 0
    another.close()
    optimizer.close()  # type: ignore[attr-defined]
    owner.close()


def test_a_join_that_was_interrupted_locks_nobody_out(tmp_path: Path) -> None:
    first = drive_in(tmp_path)
    first.attach(noted)  # nobody keeps it
    gc.collect()
    second = first.attach(noted)
    assert first.close(10) and second.close(10) and first.engine.is_closed


def test_requests_that_nobody_listed_are_over_before_their_room_is_another_s(lab: Lab, tmp_path: Path) -> None:
    """An interrupt came between a write and the note of it; the drive takes its time."""
    lab.run(close_with_an_unlisted_write, tmp_path, seconds=60)


def close_with_an_unlisted_write(directory: str) -> None:
    first = drive_in(Path(directory))
    second = first.attach(noted)
    (place,) = second.allocate(4096, prefers_host=False)
    source = torch.arange(512)
    reader, writer = os.pipe()
    os.environ["FAKE_GATE"] = str(reader)
    write = first.engine.write(place.file, place.offset, place.nbytes, [(source.data_ptr(), 4096, 0)])
    assert not second.close(0.2) and second.files[0].nbytes > 0
    threading.Timer(0.2, os.write, (writer, b".")).start()
    assert second.close(10) and write.is_done and second.files[0].nbytes == 0
    assert first.close(10)


def test_a_host_tier_only_is_shared_up_to_a_bound(tmp_path: Path) -> None:
    """Of a simulated accelerator: the other offload has no directory."""
    with SimulatedDevice(seed=0) as device:
        store = StateStore([], OptimizerPolicy(staging_nbytes=64 * KIB, host_nbytes=1 << 20), device)
        drive = store.drive.attach(noted, host_nbytes=64 * KIB)
        assert drive.host is not None
        assert drive.allocate(32 * KIB, prefers_host=True) and drive.allocate(32 * KIB, prefers_host=True)
        assert drive.allocate(32 * KIB, prefers_host=True) == []
        assert store.drive.allocate(32 * KIB, prefers_host=True)
        assert drive.close(10)
        offload = ActivationOffload(
            None, ActivationPolicy(**EAGER), None, device, store.drive.attach, store.known_devices
        )
        with offload:
            x = torch.randn(64, 64, requires_grad=True)
            loss = x.exp().exp().sum()
            device.synchronize()
            assert inside.transport(offload) is not None
            inside.transport(offload).engine.drain()
            assert offload.stats.hosted_nbytes > 0
            loss.backward()
        del loss
        offload.close()
        store.close()
    device.close()


def test_what_a_shared_drive_cannot_give_is_said(tmp_path: Path) -> None:
    model = model_of("mlp")
    owner, optimizer = offloaded(tmp_path, model, engine="threads", checksum=False)
    with pytest.raises(ValueError, match="checksum=True"):
        ssdtrain.offload_activations(owner, {**EAGER, "checksum": True})
    offload = ssdtrain.offload_activations(owner, {**EAGER, "engine": "io_uring"})
    assert any("its engine is threads" in text for text in offload.stats.fallbacks)
    offload.close()
    optimizer.close()  # type: ignore[attr-defined]
    owner.close()


def test_a_host_tier_that_was_interrupted_gives_no_place_twice() -> None:
    said: list[str] = []
    space = HostSpace(0, 64 * KIB, lambda nbytes: "", said.append)
    kept = space.allocate(8 * KIB)
    missing, space._extents.missing_nbytes = space._extents.missing_nbytes, interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        [space.allocate(32 * KIB) for _ in range(3)]
    space._extents.missing_nbytes = missing  # type: ignore[method-assign]
    assert kept is not None
    space.release(kept)
    assert space.allocate(512) is None and any("host tier takes no more" in text for text in said)


def interrupted(nbytes: int) -> int:
    raise KeyboardInterrupt


def test_a_drive_that_is_closed_or_taken_is_refused(tmp_path: Path) -> None:
    model = model_of("mlp")
    owner, optimizer = offloaded(tmp_path, model)
    offload = ssdtrain.offload_activations(optimizer, EAGER)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="shared one"):
        ssdtrain.offload_activations(owner, EAGER)
    offload.close()
    ssdtrain.offload_activations(owner, EAGER).close()
    optimizer.close()  # type: ignore[attr-defined]
    owner.close()
    with pytest.raises(RuntimeError, match="after close"):
        ssdtrain.offload_activations(owner, EAGER)


def test_a_failed_write_of_an_activation_is_no_matter_of_flush(small_ext4: SmallDrive) -> None:
    """Each answers for its own bytes."""
    model = model_of("mlp")
    owner, optimizer = offloaded(small_ext4.directory, model)
    offload = ssdtrain.offload_activations(owner, {**EAGER, "disk_nbytes": "64KiB"}, model)
    with offload:
        loss = model(batch(0))
        assert offload.stats.skipped["no spill space"].nbytes > 0
        owner.flush()
        loss.backward()
    assert offload.stats.peak_disk_nbytes <= 64 * KIB
    del loss
    offload.close()
    optimizer.close()  # type: ignore[attr-defined]
    owner.close()


def test_optimizer_state_counts_for_the_endurance_of_the_drive(tmp_path: Path) -> None:
    """What the optimizer writes leaves less for activations: here nothing."""
    model = model_of("gpt")
    owner, optimizer = offloaded(tmp_path, model)
    auto = {"mode": "auto", "min_nbytes": "4KiB", "staging_nbytes": STAGING_NBYTES, "decline_below_nbytes": 0}
    with ssdtrain.offload_activations(owner, {**auto, "endurance_tbw": 0.1}, model) as offload:
        steps(model, optimizer, 30)
        plan = offload.plan
    assert plan is not None and plan.others_daily_nbytes > 0.1e12 / (5 * 365.25)
    assert plan.is_declined and "endurance" in plan.statement
    offload.close()
    with ssdtrain.offload_activations(tmp_path, {**auto, "endurance_tbw": 0.1}, model) as alone:
        steps(model, optimizer, 30)
        plan = alone.plan
    assert plan is not None and plan.others_daily_nbytes == 0.0
    alone.close()
    optimizer.close()  # type: ignore[attr-defined]
    owner.close()


def test_the_record_of_a_run_counts_what_the_drive_took_for_all(tmp_path: Path) -> None:
    model = model_of("mlp")
    owner, optimizer = offloaded(tmp_path, model)
    record = tmp_path / "run.ssdtrain"
    with ssdtrain.offload_activations(owner, EAGER, model, record=record) as offload:
        steps(model, optimizer, 5)
    offload.close()
    stats = offload.stats
    data = json.loads(subprocess.check_output([sys.executable, "-m", "ssdtrain", "report", str(record), "--json"]))
    assert stats.written_nbytes < data["wear"]["written_nbytes"] <= stats.written_nbytes + stats.shared_written_nbytes
    record.unlink()
    optimizer.close()  # type: ignore[attr-defined]
    owner.close()
