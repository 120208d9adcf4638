"""The bound of `memory_budget` on what one offload context holds, in every step: the first, and those unlike a plan.

Knows what is held, what can leave and what comes next; not why a plan would do something else.

[Note: room for what comes]
A tensor is in memory before autograd shows it to us. So after each one that is saved there is to be room for the next,
and any step may turn out to be unlike its plan: as much as the largest tensor so far stays free, or, where no plan is
followed, a quarter of the budget. While there is less, training waits for the drive. What a plan keeps is sent after
all where nothing else would bring memory down: the drive is slower than planned, or the step another one. No step is
over the budget unless a single tensor takes more than a quarter of it, or what cannot leave does.
"""

from __future__ import annotations

import torch

from ssdtrain.activations.activation_store import ActivationStore
from ssdtrain.activations.writeback import Wait
from ssdtrain.devices.base import Device
from ssdtrain.planner import reserve_nbytes
from ssdtrain.scheduling.schedule import Schedule
from ssdtrain.stats import nbytes_text
from ssdtrain.store.record import Residency, SavedRecord


class Budget:
    """Keeps the saved tensors of one offload context, with our buffers where they are in the same memory, under it."""

    def __init__(self, nbytes: int, store: ActivationStore, schedule: Schedule) -> None:
        """Bounds what `store` holds to `nbytes`."""
        self._nbytes, self._store, self._schedule = nbytes, store, schedule
        self._largest_nbytes = self._largest_resident_nbytes = 0
        self._last: SavedRecord | None = None
        self._is_over = False

    @classmethod
    def of(cls, nbytes: int | None, store: ActivationStore, schedule: Schedule) -> Budget | None:
        """None where nothing is to be bounded."""
        return cls(nbytes, store, schedule) if nbytes is not None else None

    def make_room(self, record: SavedRecord) -> None:
        """Waits until there is room for what is saved after `record`. Without the lock."""
        self._last, self._largest_nbytes = record, max(self._largest_nbytes, record.nbytes)
        self._store.limits.note_plan(self._schedule.needed_nbytes)
        reserve, coming = reserve_nbytes(self._nbytes, self._largest_nbytes), self._schedule.next_nbytes
        is_unplanned = coming is None and self._allowed(record.device) <= self._nbytes
        self._free(reserve_nbytes(self._nbytes) if is_unplanned else max(coming or 0, reserve), record)

    def stay(self, nbytes: int) -> None:
        """Bytes more are in memory that no record stands for; waits until there is room for as many. Without the lock.

        What does not leave may follow the last record, after which nobody else looks.
        """
        self._store.counters.stay(nbytes)
        self._largest_resident_nbytes = max(self._largest_resident_nbytes, nbytes)
        if nbytes and self._last is not None:
            self._free(reserve_nbytes(self._nbytes, self._largest_resident_nbytes), self._last)

    def make_room_for(self, record: SavedRecord) -> None:
        """Waits until there is room for a record that backward asks for. Without the lock."""
        if record.storage is None and record.residency is not Residency.RELOADING:
            self._free(record.nbytes, record)

    def _free(self, nbytes: int, record: SavedRecord) -> None:
        store, most = self._store, self._allowed(record.device) - nbytes
        if self._used(record.device) <= most:
            self._note_excess(record.device)  # where more than the budget is allowed
            return
        used: list[SavedRecord] | None = None
        while self._used(record.device) > most:
            with store.lock.mutex, store.lock:
                store.settle()
                store.reloads.drop_expired()
                excess = self._used(record.device) - most
                used = self._used_before() if used is None else used
                wait = self._send(excess, used) if excess > 0 else None
                is_helpless = excess > 0 and wait is None and not store.reloads.drop_prefetched(excess)
            if is_helpless:
                break
            if wait is not None:
                store.writeback.wait_for_room(wait, record)
        self._note_excess(record.device)

    def _allowed(self, device: Device) -> int:
        return int(self._store.limits.allowed_nbytes(is_on_host=device.driver is None))

    def _used(self, device: Device) -> int:
        return self._store.counters.committed_nbytes(is_on_host=device.driver is None)

    def _send(self, excess: int, used: list[SavedRecord]) -> Wait | None:
        """Sends what can be sent; what to wait for to have `excess` bytes less, or None when nothing is under way."""
        store = self._store.source.store
        writeback = self._store.writeback
        if store is None or not writeback.is_patient:
            return None
        wait = writeback.send_gathered()
        if wait is None and not store.pending.writes:
            wait = writeback.send_kept(excess, used)
            if wait is None:
                used.clear()  # once: what cannot be copied comes back
        if wait is not None:
            return wait
        if not store.pending.writes:
            return None
        return store.next_point() or store.pending.room_after(excess)

    def _used_before(self) -> list[SavedRecord]:
        """What an earlier backward through a graph that is retained has used."""
        task = torch._C._current_graph_task_id()
        return [record for record in self._store.index.all_records() if record.is_unpacked and record.task != task]

    def _note_excess(self, device: Device) -> None:
        used = self._used(device)
        if used > self._nbytes and not self._is_over:
            self._is_over = True
            self._store.note_fallback(
                f"memory_budget={self._nbytes}: {nbytes_text(used)} are held, of which nothing can leave now: what one "
                "operator saves leaves after it is over, and `print(stats)` says what stays and why; raise the budget: "
                "once there is a plan, it says to how much"
            )
