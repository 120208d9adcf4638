"""PyTorch gives freed memory to the stream that allocated it: every other stream that uses it is named before.

The programs here are right without ssdtrain. Somebody allocates on stream A, somebody else works on stream B, and A is
ordered after B only at the end: until then the graph, or the module, keeps the memory from being anybody else's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from torch import nn

import ssdtrain
from ssdtrain.devices import cuda
from ssdtrain.devices.simulated import SimulatedDevice
from ssdtrain.policy import ActivationPolicy, OptimizerPolicy
from ssdtrain.store.record import Record
from ssdtrain.store.state_store import StateStore

pytest.importorskip("ssdtrain._C", reason="an accelerator needs the extension")

KIB = 1024
SIZE = 4096
TIERS: dict[str, dict[str, Any]] = {"drive": {}, "host": {"host_nbytes": 1 << 20}}


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    simulated = SimulatedDevice(seed=3)
    yield simulated
    simulated.close()


def offload_on(device: SimulatedDevice, directory: Path | None, mode: str = "all", **fields: Any) -> Any:
    policy = ActivationPolicy(
        **{"min_nbytes": 0, "staging_nbytes": 512 * KIB, "mode": mode, "decline_below_nbytes": 0} | fields
    )
    return ssdtrain.ActivationOffload([str(directory)] if directory is not None else None, policy, None, device)


def order(device: SimulatedDevice, late: int, early: int) -> None:
    """What is queued on `late` from here on comes after what is queued on `early` by now."""
    device.driver.wait(late, device.driver.record(early))


@pytest.mark.parametrize("mode", ["all", "auto"])
@pytest.mark.parametrize("tier", TIERS)
def test_saved_on_another_stream_than_allocated(device: SimulatedDevice, tmp_path: Path, tier: str, mode: str) -> None:
    """Sources are let go in the order of the stream that saved them, while that stream is far behind; the one that
    allocated them goes on allocating, and gets their memory only when the copies are over."""
    offload = offload_on(device, tmp_path, mode, **TIERS[tier])
    with device:
        a, b = device.current_stream(), device.new_stream()
        w = torch.ones(()).requires_grad_()
        with offload:
            xs = [torch.full((SIZE,), float(i + 1)) for i in range(16)]
            order(device, b, a)
            device.hold(b)
            with device.stream(b):
                loss = torch.stack([(x * w).sum() for x in xs]).sum()
            del xs
            device.hold(device.driver.out_stream())
            offload.stats  # noqa: B018  takes note of what the engine did
            junk = [torch.full((SIZE,), -7.0) for _ in range(32)]
            device.release(device.driver.out_stream())
            device.release(b)
            with device.stream(b):
                loss.backward()
            order(device, a, b)
            device.synchronize()
    assert junk and w.grad is not None and w.grad.item() == SIZE * sum(range(1, 17))
    assert offload.stats.num_offloaded > 0
    del loss
    offload.close()


def test_saved_on_two_streams(device: SimulatedDevice, tmp_path: Path) -> None:
    """One record, saved by operators of two streams: the second one is busy when the record's copy is over."""
    offload = offload_on(device, tmp_path)
    with device:
        a, b = device.current_stream(), device.new_stream()
        w = torch.ones(()).requires_grad_()
        with offload:
            x = torch.full((SIZE,), 3.0)
            first = (x * w).sum()
            order(device, b, a)
            device.hold(b)
            with device.stream(b):
                second = (x * w).sum()
            del x
            for _ in range(8):
                first = first + (torch.full((SIZE,), 1.0) * w).sum()
            device.driver.synchronize(device.driver.record(a))
            inside.transport(offload).engine.drain()
            offload.stats  # noqa: B018  takes note of what the engine did
            junk = [torch.full((SIZE,), -7.0) for _ in range(4)]
            device.release(b)
            order(device, a, b)
            (first + second).backward()
            device.synchronize()
    assert junk and w.grad is not None and w.grad.item() == SIZE * (2 * 3 + 8)
    del first, second
    offload.close()


def test_parameters_that_two_streams_use(device: SimulatedDevice, tmp_path: Path) -> None:
    """A block is gathered on stream A and used on stream B too, which is far behind when it leaves. Neither does B
    wait for A, nor A for B: a parameter is in memory all the time, as far as the program knows."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64)) for _ in range(4)))
    x = torch.randn(8, 64)
    with torch.no_grad():
        expected = [model(x), model[0](x)]
    store = StateStore([str(tmp_path)], OptimizerPolicy(staging_nbytes=64 * KIB, min_nbytes=0))
    with device, torch.no_grad():
        a, b = device.current_stream(), device.new_stream()
        weight = model[0][0].weight.detach() * 1
        device.synchronize()
        record = Record("weight")
        store.write(record, weight.untyped_storage(), device)
        store.flush()
        del weight
        device.hold(device.driver.in_stream())
        with gathered(store, record, device) as parameter:
            on_a = x @ parameter.parameter.t()
            device.hold(b)
            with device.stream(b):
                parameter.use()
                on_b = x @ parameter.parameter.t()
        junk = [torch.full((64, 64), -7.0) for _ in range(4)]
        device.release(device.driver.in_stream())
        device.release(b)
        order(device, a, b)
        device.synchronize()
        assert junk and torch.equal(on_a, on_b)
        assert torch.allclose(on_a + model[0][0].bias, expected[1])
    store.close()


@contextlib.contextmanager
def gathered(store: StateStore, record: Record, device: SimulatedDevice) -> Iterator[Any]:
    """A parameter in memory that a record was read to."""
    from ssdtrain.parameters.parameter import ParameterRecord

    made = ParameterRecord("weight", nn.Parameter(torch.empty(64, 64), requires_grad=False), device, None)  # type: ignore[arg-type]
    made.evict()
    pending = store.read(record, device)
    made.materialize(store.wait(pending), pending)
    made.use()
    yield made
    made.evict()


def test_handle_0_is_the_default_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.cuda.ExternalStream(0)` is a stream of PyTorch's pool: memory shared with it is shared with nobody."""
    default, external = object(), object()
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: default)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: external)
    device = cuda.CudaDevice.__new__(cuda.CudaDevice)
    device._device = torch.device("cuda", 0)
    assert device._stream(0) is default
    assert device._stream(7) is external
