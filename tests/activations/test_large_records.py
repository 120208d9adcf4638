"""Records larger than the bounds on what is under way: one may always be, and bounds of accelerators grow with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from conftest import mlp

import ssdtrain
from ssdtrain.devices.simulated import SimulatedDevice
from ssdtrain.policy import ActivationPolicy
from ssdtrain.store.record import SavedRecord

KIB, MIB = 1 << 10, 1 << 20
RECORD_NBYTES = 256 * KIB  # 1024 rows of 64 numbers


def spied(offload: ssdtrain.ActivationOffload) -> list[tuple[int, bool]]:
    """Bytes that are prefetched after every wish to prefetch, and whether it was granted."""
    seen: list[tuple[int, bool]] = []
    prefetch = inside.reloads(offload).prefetch

    def watched(record: SavedRecord) -> bool:
        seen.append((0, prefetch(record)))
        seen[-1] = inside.counters(offload).prefetched_nbytes, seen[-1][1]
        return seen[-1][1]

    inside.reloads(offload).prefetch = watched  # type: ignore[method-assign]
    return seen


def train(model: torch.nn.Module, context: Any) -> list[torch.Tensor]:
    x = torch.linspace(-1, 1, 1024 * 64).reshape(1024, 64)
    with context:
        loss = model(x).square().mean()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return grads


@pytest.mark.parametrize("prefetch_nbytes", [0, 64 * KIB, RECORD_NBYTES])
def test_one_record_may_always_come_ahead_of_need(tmp_path: Path, prefetch_nbytes: int) -> None:
    """Records larger than `prefetch_nbytes` were never prefetched: backward stood still for each of them."""
    policy = {"mode": "all", "min_nbytes": 64 * KIB, "staging_nbytes": MIB, "prefetch_nbytes": prefetch_nbytes}
    model = mlp(layers=6, width=64)
    expected = train(model, torch.enable_grad())
    offload = ssdtrain.offload_activations(tmp_path, policy)
    seen = spied(offload)
    for _ in range(3):
        assert all(map(torch.equal, train(model, offload), expected))
    is_on = bool(prefetch_nbytes)
    assert (offload.stats.num_prefetched > 0) == is_on
    assert any(is_begun and nbytes for nbytes, is_begun in seen) == is_on
    assert max(nbytes for nbytes, _ in seen) == is_on * RECORD_NBYTES
    offload.close()


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    with SimulatedDevice() as device:
        yield device
    device.close()


def bounds_after(path: Path, device: SimulatedDevice, nbytes: int, **policy: Any) -> tuple[int, int, str]:
    """Bounds in MiB once so large a record is known, which never leaves, and what the statistics say."""
    chosen = ActivationPolicy(**policy)
    offload = ssdtrain.ActivationOffload([str(path)], chosen, None, device)
    with offload:
        inside.pack(offload, torch.empty(nbytes, dtype=torch.uint8))
    stats = offload.stats
    offload.close()
    return stats.staging_limit_nbytes // MIB, stats.prefetch_limit_nbytes // MIB, str(stats)


def test_bounds_of_an_accelerator_follow_its_largest_record(tmp_path: Path, device: SimulatedDevice) -> None:
    device.free_nbytes = lambda: 64 << 30  # type: ignore[method-assign]
    *bounds, text = bounds_after(tmp_path, device, 80 * MIB)
    assert bounds == [160, 160]
    assert "160.0 MiB on their way out, 160.0 MiB on their way back" in text
    assert bounds_after(tmp_path, device, 40 * MIB)[:2] == (128, 128), "never below the policy's"


def test_bounds_that_were_set_stay(tmp_path: Path, device: SimulatedDevice) -> None:
    device.free_nbytes = lambda: 64 << 30  # type: ignore[method-assign]
    assert bounds_after(tmp_path, device, 80 * MIB, staging_nbytes="64MiB")[:2] == (64, 160)
    assert bounds_after(tmp_path, device, 80 * MIB, prefetch_nbytes="64MiB")[:2] == (160, 64)
    assert bounds_after(tmp_path, device, 80 * MIB, memory_budget="1GiB")[:2] == (128, 128)


def test_bounds_leave_most_of_the_memory_alone(tmp_path: Path, device: SimulatedDevice) -> None:
    device.free_nbytes = lambda: 8 * 140 * MIB  # type: ignore[method-assign]
    assert bounds_after(tmp_path, device, 80 * MIB)[:2] == (140, 140)


def test_host_memory_has_the_bounds_of_the_policy(tmp_path: Path) -> None:
    with ssdtrain.offload_activations(tmp_path) as offload:
        inside.pack(offload, torch.empty(80 * MIB, dtype=torch.uint8))
    assert offload.stats.staging_limit_nbytes == offload.stats.prefetch_limit_nbytes == 128 * MIB
    offload.close()
