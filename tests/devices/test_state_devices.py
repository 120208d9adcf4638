"""Parameters, gradients and optimizer state of every kind of device: the simulated one checks every wait and reuse."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from state_tools import EAGER_STATE, adamw, check_same, check_same_state, model_of, train, trainable, values

import ssdtrain
from ssdtrain.devices.simulated import SimulatedDevice
from ssdtrain.optimizer.optimizer import OffloadedOptimizer
from ssdtrain.parameters.offload import ParameterOffload
from ssdtrain.policy import OptimizerPolicy, ParameterPolicy
from ssdtrain.store.record import Record
from ssdtrain.store.state_store import StateStore


@pytest.mark.parametrize("engine", ["io_uring", "threads", "python", "host"])
@pytest.mark.parametrize("how", ["after backward", "step_in_backward", "offload_gradients"])
@pytest.mark.parametrize("kind", ["mlp", "tied", "lora"])
def test_equal_to_the_bit(
    kind: str, how: str, engine: str, device: SimulatedDevice | None, tmp_path: Path, device_kind: str
) -> None:
    """Three steps; memory of a parameter serves others while operators that use it are still queued."""
    plain = model_of(kind)
    expected = adamw(trainable(plain))
    losses = train(plain, expected, 3)
    model = model_of(kind)
    policy: dict[str, Any] = EAGER_STATE | {"engine": "auto" if engine == "host" else engine}
    store = StateStore(
        [] if engine == "host" else [str(tmp_path)], ParameterPolicy(**policy, prefetch_nbytes=40_000), device
    )
    owner = ParameterOffload(model, lambda: store, ParameterPolicy(**policy, prefetch_nbytes=40_000), None)
    more = {how: True} if "_" in how else {}
    optimizer = OffloadedOptimizer(
        adamw(trainable(model)), store.share, OptimizerPolicy(**policy, chunk_nbytes=40_000, **more)
    )
    check_same(train(model, optimizer, 3), losses)
    check_same_state(optimizer.state_dict(), expected.state_dict())
    state = {name: value.to(device_kind) if device_kind == "cuda" else value for name, value in values(model).items()}
    check_same(state, values(plain))
    assert (owner.stats.peak_host_nbytes > 0) == (engine == "host"), str(owner.stats)
    optimizer.close()
    owner.close()
    check_same(values(model), values(plain))
    assert isinstance(ssdtrain.offload_parameters(model, tmp_path, policy), torch.nn.Module)


@pytest.mark.cpu_only
def test_host_memory_is_no_place_for_host_memory(device_kind: str) -> None:
    model = model_of("mlp")
    with pytest.raises(ValueError, match="got in host memory already"):
        ssdtrain.offload_parameters(model, None, EAGER_STATE)
    with pytest.raises(ValueError, match="memory of an accelerator, got in host memory already"):
        ssdtrain.offload_optimizer(adamw(model.parameters()), None, EAGER_STATE)


@pytest.mark.accelerator_only
def test_an_engine_for_host_memory_alone_is_refused_at_once(
    device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    """Not in the middle of the first step, with some parameters updated."""
    model = model_of("mlp")
    policy = OptimizerPolicy(**EAGER_STATE, engine="python")
    inner = adamw(model.parameters())
    with pytest.raises(RuntimeError, match="Expected host memory, got an accelerator's"):
        OffloadedOptimizer(inner, lambda: StateStore([str(tmp_path)], policy, device), policy)
    train(model, inner, 1)


@pytest.mark.accelerator_only
def test_the_host_tier_first_then_the_drive(device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    """A host tier too small for all of it: the rest is on the drive."""
    plain = model_of("mlp")
    losses = train(plain, adamw(plain.parameters()), 3)
    model = model_of("mlp")
    policy = OptimizerPolicy(**EAGER_STATE, host_nbytes=100_000, chunk_nbytes=40_000)
    store = StateStore([str(tmp_path)], policy, device)
    optimizer = OffloadedOptimizer(adamw(model.parameters()), lambda: store, policy)
    check_same(train(model, optimizer, 3), losses)
    stats = optimizer.stats
    assert 50_000 < stats.peak_host_nbytes <= 102_400 and stats.written_nbytes > 0, str(stats)
    optimizer.close()


@pytest.mark.accelerator_only
@pytest.mark.parametrize("has_host_tier", [False, True])
def test_host_memory_reads_what_has_been_copied(
    has_host_tier: bool, device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    """What a stream is yet to copy out is not there to be read by the CPU, which waits for no stream."""
    if device is None:
        pytest.skip("the stream of a real device is not held")
    policy = OptimizerPolicy(**EAGER_STATE, host_nbytes=1 << 20 if has_host_tier else None)
    store = StateStore([str(tmp_path)], policy)
    record = Record("x")
    device.hold(device.current_stream())
    source = torch.arange(4000.0) * 2
    store.write(record, source.untyped_storage(), device)
    timer = threading.Timer(0.2, device.release, [device.current_stream()])
    timer.start()
    storage = store.wait(store.read(record, store.host))
    timer.join()
    found = torch.frombuffer(bytearray(ctypes.string_at(storage.data_ptr(), 16000)), dtype=torch.float32)
    assert torch.equal(found, torch.arange(4000.0) * 2)
    store.close()
