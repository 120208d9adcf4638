"""The host tier grows, and each step is pinned by itself: no copy of a device goes beyond one step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssdtrain.devices.simulated import SimulatedDevice
from ssdtrain.io import host_space
from ssdtrain.policy import OptimizerPolicy
from ssdtrain.store.record import Record
from ssdtrain.store.state_store import StateStore

pytest.importorskip("ssdtrain._C", reason="an accelerator needs the extension")

KIB = 1024


def test_bytes_on_both_sides_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 64 KiB and tensors of 20 KiB: some lie across, and CUDA refuses to copy them in one go."""
    monkeypatch.setattr(host_space, "_GROW_NBYTES", 64 * KIB)
    device = SimulatedDevice(seed=1)
    store = StateStore([str(tmp_path)], OptimizerPolicy(staging_nbytes=64 * KIB, host_nbytes=1 << 20, min_nbytes=0))
    records = [Record(f"record {i}") for i in range(12)]
    with device:
        for i, record in enumerate(records):
            store.write(record, torch.full((5 * KIB,), float(i)).untyped_storage(), device)
        store.flush()
        assert all(part.is_in_host for record in records for part in record.segments)
        starts = [part.extent.offset for record in records for part in record.segments]
        across = [start for start in starts if start // (64 * KIB) != (start + 20 * KIB - 1) // (64 * KIB)]
        assert across
        for i, record in enumerate(records):
            back = torch.empty(0).set_(store.wait(store.read(record, device))) * 1
            assert torch.equal(back, torch.full((5 * KIB,), float(i)))
    store.close()
    device.close()
    assert not list(store.counters.fallbacks)
