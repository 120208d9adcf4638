"""Host memory for reloads: aligned, reused once its tensor is dead, and given back beyond a bound."""

from __future__ import annotations

import pytest

from ssdtrain.devices.base import Allocation
from ssdtrain.devices.cpu import CpuDevice

KIB = 1024
LARGE = 256 * KIB


def allocate(device: CpuDevice, nbytes: int = LARGE) -> Allocation:
    return device.allocate(nbytes, 512, 4096)


@pytest.mark.parametrize("nbytes", [1, 5000, LARGE, LARGE + 1])
def test_memory_is_aligned_and_as_long_as_asked_for(nbytes: int) -> None:
    memory = allocate(CpuDevice(0), nbytes)
    assert memory.address % 512 == 0 and memory.address == memory.storage.data_ptr()
    assert memory.storage.nbytes() == nbytes <= memory.capacity and memory.capacity % 4096 == 0
    weak = memory.weak
    assert not weak.expired()
    del memory
    assert weak.expired()


def test_memory_serves_again_once_its_tensor_is_dead() -> None:
    device = CpuDevice(LARGE)
    first = allocate(device)
    address = first.address
    second = allocate(device)
    assert second.address != address
    del first
    assert device.idle_nbytes() == LARGE
    assert allocate(device).address == address


def test_what_died_out_of_turn_serves_again() -> None:
    device = CpuDevice(LARGE)
    first, second = allocate(device), allocate(device)
    address = second.address
    del second
    third = allocate(device)
    assert third.address == address and first.storage.nbytes() == LARGE


def test_another_size_does_not_serve() -> None:
    device = CpuDevice(4 * LARGE)
    address = allocate(device, 2 * LARGE).address
    small = allocate(device)
    assert small.address != address and device.idle_nbytes() == 2 * LARGE


def test_idle_memory_is_bounded() -> None:
    """Also when the oldest never dies."""
    device = CpuDevice(3 * LARGE)
    held = allocate(device)
    for _ in range(3):
        several = [allocate(device, LARGE + 4096 * i) for i in range(40)]
        del several
        assert device.idle_nbytes() <= 3 * LARGE
        mapped = sum(len(mapping) for mapping, _ in device._in_use)
        assert mapped <= held.capacity + 32 * 2 * LARGE
    device.trim()
    assert device.idle_nbytes() == 0 and not device._in_use


def test_what_is_larger_than_the_bound_is_not_kept() -> None:
    device = CpuDevice(LARGE)
    allocate(device, 2 * LARGE)
    assert device.idle_nbytes() == 0
