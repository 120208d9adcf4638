"""An extent is free when its write and all its readers are over, copies that a device has only queued included."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from engine_tools import eventually

import ssdtrain
from ssdtrain.devices.simulated import SimulatedDevice
from ssdtrain.policy import ActivationPolicy, OptimizerPolicy
from ssdtrain.store.record import Record
from ssdtrain.store.state_store import StateStore

pytest.importorskip("ssdtrain._C", reason="an accelerator needs the extension")

KIB = 1024
SIZE = 4096


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    simulated = SimulatedDevice(seed=3)
    yield simulated
    simulated.close()


def offload_to_host(device: SimulatedDevice) -> Any:
    policy = ActivationPolicy(
        min_nbytes=0, mode="all", staging_nbytes=64 * KIB, prefetch_nbytes=64 * KIB, host_nbytes=1 << 20
    )
    return ssdtrain.ActivationOffload(None, policy, None, device)


def model(leaf: torch.Tensor) -> torch.Tensor:
    a = leaf * 1
    z = a.sin().sum()  # saves `a`, which nobody else has
    del a
    return (z * 1e-6).exp().exp().exp()  # what saves after it sends it off


def leaf_from(start: float) -> torch.Tensor:
    return torch.linspace(start, start + 1, SIZE).requires_grad_()


def send_gathered(offload: ssdtrain.ActivationOffload) -> None:
    """What waits for company leaves alone."""
    store = inside.store(offload)
    with store.lock.mutex, store.lock:
        assert store.writeback.try_submit(store.writeback._take_batch(), is_planned=False) is None


def test_a_record_that_is_copied_back_keeps_its_place_in_the_host_tier(device: SimulatedDevice) -> None:
    """Backward of one graph has queued its copies back, on a stream that is busy, and the graph is gone. Forward of
    another model, on a stream of its own, fills the host tier: what has yet to be read there is not written over, or
    the gradient would be that of the other model's tensor."""
    offload = offload_to_host(device)
    with device:
        one, two, side = leaf_from(0), leaf_from(2), device.new_stream()
        device.synchronize()
        with offload:
            loss = model(one)
            send_gathered(offload)
        device.synchronize()
        eventually(lambda: offload.stats.hosted_nbytes >= SIZE * 4)
        device.hold(device.current_stream())
        loss.backward()
        del loss
        gc.collect()
        assert offload.stats.num_live_records == 0
        with device.stream(side), offload:
            other = model(two)
            send_gathered(offload)
        eventually(lambda: offload.stats.hosted_nbytes >= 2 * SIZE * 4)
        device.release(device.current_stream())
        device.synchronize()
    expected = leaf_from(0)
    model(expected).backward()
    assert torch.equal(one.grad, expected.grad)  # type: ignore[arg-type]
    del other
    drained(offload)
    assert in_use(offload) == 0
    offload.close()


def drained(offload: Any) -> None:
    inside.transport(offload).engine.drain()
    offload.stats  # noqa: B018  takes note of what the engine did


def in_use(offload: Any) -> int:
    nbytes: int = inside.transport(offload).host._space._extents.in_use_nbytes
    return nbytes


@pytest.mark.parametrize("kind", ["host", "drive"])
def test_state_that_is_copied_back_keeps_its_place(device: SimulatedDevice, tmp_path: Path, kind: str) -> None:
    """The same for parameters and optimizer state: read, taken, and written anew while the copy back is queued."""
    host_nbytes = 1 << 20 if kind == "host" else 0
    store = StateStore([str(tmp_path)], OptimizerPolicy(staging_nbytes=64 * KIB, host_nbytes=host_nbytes))
    record, others = Record("read"), [Record(f"other {i}") for i in range(4)]
    with device:
        store.write(record, torch.full((SIZE,), 1.0).untyped_storage(), device)
        device.synchronize()
        store.flush()
        device.hold(device.driver.in_stream())
        pending = store.read(record, device)
        back = torch.empty(0).set_(store.wait(pending), 0, (SIZE,), (1,)) * 1
        store.release(record)
        assert inside.space(store).in_use_nbytes + in_host(store) == SIZE * 4
        for i, other in enumerate(others):
            store.write(other, torch.full((SIZE,), 2.0 + i).untyped_storage(), device)
        device.release(device.driver.in_stream())
        device.synchronize()
        assert torch.equal(back, torch.full((SIZE,), 1.0))
        store.flush()
        assert inside.space(store).in_use_nbytes + in_host(store) == 4 * SIZE * 4
    store.close()


def in_host(store: StateStore) -> int:
    return sum(nbytes for _, nbytes in store.drive.host._held) if store.drive.host is not None else 0


def test_state_that_a_device_could_not_copy_out_stays_where_it_is(device: SimulatedDevice, tmp_path: Path) -> None:
    """Nothing is lost: the record holds the memory itself, as where the drive has no room."""
    store, record = StateStore([str(tmp_path)], OptimizerPolicy(staging_nbytes=64 * KIB)), Record("exp_avg")

    def broken(*_: int) -> None:
        raise RuntimeError("the device is gone")

    right, device.driver.copy_out = device.driver.copy_out, broken  # type: ignore[method-assign]
    with device:
        store.write(record, torch.arange(float(SIZE)).untyped_storage(), device)
        store.engine.drain()
        device.driver.copy_out = right  # type: ignore[method-assign]
        back = torch.empty(0).set_(store.wait(store.read(record, device)), 0, (SIZE,), (1,)) * 1
    assert torch.equal(back, torch.arange(float(SIZE)))
    store.close()
