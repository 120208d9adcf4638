"""A drive that is slow is not stuck; and while one thread waits for it, others go on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ssdtrain
from ssdtrain.devices.simulated import SimulatedDevice
from ssdtrain.policy import OptimizerPolicy
from ssdtrain.store.pending import PendingRead
from ssdtrain.store.record import Record
from ssdtrain.store.state_store import StateStore

MIB = 1 << 20
TIMEOUT_SECONDS = 0.6
SLOW = {"engine": "python", "staging_nbytes": MIB, "io_timeout_seconds": TIMEOUT_SECONDS, "min_nbytes": 0}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on every request takes a third of the timeout."""

    def begin() -> None:
        for name in ("pwrite", "preadv"):
            right = getattr(os, name)

            def late(*arguments: Any, right: Any = right) -> int:
                time.sleep(TIMEOUT_SECONDS / 3)
                return right(*arguments)

            monkeypatch.setattr(os, name, late)

    return begin


def some(seed: float) -> torch.UntypedStorage:
    return torch.full((MIB // 4,), seed).untyped_storage()


def as_tensor(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0).set_(storage)


def unhappy(fallbacks: Any) -> list[str]:
    return [text for text in fallbacks if "stuck" in text or "not used" in text or "stays in memory" in text]


def test_a_slow_drive_takes_all_activations(tmp_path: Path, slow: Callable[[], None]) -> None:
    """Eight requests of a record, one after the other, take longer than the timeout of one."""
    offload = ssdtrain.offload_activations(tmp_path, SLOW | {"mode": "all"})
    slow()
    with offload:
        x = torch.linspace(0, 1, MIB // 4, requires_grad=True)
        y = x
        for _ in range(3):
            y = y.exp().mul(1e-2)
    y.sum().backward()
    assert unhappy(offload.stats.fallbacks) == []
    assert not {"drive stuck", "drive behind"} & set(offload.stats.skipped)
    del y
    offload.close()
    assert unhappy(offload.stats.fallbacks) == []


def test_a_slow_drive_takes_and_gives_all_state(tmp_path: Path, slow: Callable[[], None]) -> None:
    """Writes, a flush, reads and the end: each waits for more requests than fit into the timeout of one."""
    store, records = StateStore([str(tmp_path)], OptimizerPolicy(**SLOW)), [Record(f"record {i}") for i in range(3)]
    slow()
    for i, record in enumerate(records):
        store.write(record, some(float(i)))
    store.flush()
    for i, pending in enumerate([store.read(record) for record in records]):
        assert torch.equal(as_tensor(store.wait(pending)), as_tensor(some(float(i))))
    store.write(records[0], some(7.0))
    store.close()
    assert store.is_closed and unhappy(store.counters.fallbacks) == []


class Gate:
    """Keeps writes from reaching the drive until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_come, self._open, right = threading.Event(), threading.Event(), os.pwrite

        def held(*arguments: Any) -> int:
            self.has_come.set()
            assert self._open.wait(60)
            return right(*arguments)

        monkeypatch.setattr(os, "pwrite", held)

    def open(self) -> None:
        self._open.set()


@pytest.mark.parametrize("waits", ["write", "flush"])
def test_other_bytes_are_read_while_a_thread_waits_for_the_drive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: str
) -> None:
    """The drive does not answer for now. One thread waits for room, or until all is written; what another thread needs
    begins to come meanwhile, so that backward is not held up by an update."""
    store = StateStore([str(tmp_path)], OptimizerPolicy(engine="python", staging_nbytes=MIB, min_nbytes=0))
    small, big = Record("small"), [Record(f"big {i}") for i in range(3)]
    store.write(small, torch.arange(1024.0).untyped_storage())
    store.flush()
    gate = Gate(monkeypatch)
    store.write(big[0], some(0.0))
    assert gate.has_come.wait(60)
    read_beside(store, small, store.flush if waits == "flush" else lambda: store.write(big[1], some(1.0)), gate.open)
    assert torch.equal(as_tensor(store.wait(store.read(big[0]))), as_tensor(some(0.0)))
    store.close()


def test_other_bytes_are_read_while_a_thread_waits_for_an_accelerator(tmp_path: Path) -> None:
    """Host memory is to get what an accelerator has not copied yet."""
    pytest.importorskip("ssdtrain._C", reason="an accelerator needs the extension")
    store, device = StateStore([str(tmp_path)], OptimizerPolicy(staging_nbytes=MIB)), SimulatedDevice()
    small, far = Record("small"), Record("far")
    store.write(small, torch.arange(1024.0).untyped_storage())
    with device:
        device.hold(device.driver.out_stream())
        store.write(far, torch.full((1024,), 3.0).untyped_storage(), device)
        storages: list[torch.UntypedStorage] = []

        def prefetch() -> None:
            storages.append(store.wait(store.read(far, store.host)))

        read_beside(store, small, prefetch, lambda: device.release(device.driver.out_stream()))
    assert torch.equal(as_tensor(storages[0]), torch.full((1024,), 3.0))
    store.close()
    device.close()


def read_beside(store: StateStore, record: Record, wait: Callable[[], object], end: Callable[[], object]) -> None:
    """Begins to read a record while another thread is in `wait`, which returns only after `end`."""
    is_over, reads = threading.Event(), list[PendingRead]()
    waiting = threading.Thread(target=lambda: (wait(), is_over.set()))
    reading = threading.Thread(target=lambda: reads.append(store.read(record, store.host)))
    waiting.start()
    waiting.join(0.2)  # it is in the middle of it, or will be: either way the read may not wait for it
    reading.start()
    reading.join(20)
    has_begun, is_late = bool(reads), is_over.is_set()
    end()
    waiting.join(60)
    reading.join(60)
    assert has_begun and not is_late and is_over.is_set()
    assert torch.equal(as_tensor(store.wait(reads[0])), torch.arange(1024.0))
