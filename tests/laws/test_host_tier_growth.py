"""The host tier grows, and each step is pinned by itself: no copy of a device goes beyond one step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssdtrain.devices.simulated import SimulatedDevice
from ssdtrain.io import host_space
from ssdtrain.policy import OptimizerPolicy
from ssdtrain.store.slots import Slot
from ssdtrain.store.tensor_store import Vault

pytest.importorskip("ssdtrain._C", reason="an accelerator needs the extension")

KIB = 1024


def test_bytes_on_both_sides_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 64 KiB and tensors of 20 KiB: some lie across, and CUDA refuses to copy them in one go."""
    monkeypatch.setattr(host_space, "_GROW_NBYTES", 64 * KIB)
    device = SimulatedDevice(seed=1)
    vault = Vault([str(tmp_path)], OptimizerPolicy(staging_nbytes=64 * KIB, host_nbytes=1 << 20, min_nbytes=0))
    slots = [Slot(f"slot {i}") for i in range(12)]
    with device:
        for i, slot in enumerate(slots):
            vault.write(slot, torch.full((5 * KIB,), float(i)).untyped_storage(), device)
        vault.flush()
        assert all(part.is_in_host for slot in slots for part in slot.parts)
        starts = [part.extent.offset for slot in slots for part in slot.parts]
        across = [start for start in starts if start // (64 * KIB) != (start + 20 * KIB - 1) // (64 * KIB)]
        assert across
        for i, slot in enumerate(slots):
            back = torch.empty(0).set_(vault.take(vault.read(slot, device))) * 1
            assert torch.equal(back, torch.full((5 * KIB,), float(i)))
    vault.close()
    device.close()
    assert not list(vault.counters.fallbacks)
