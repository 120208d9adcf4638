"""The records of saved activations: which there are, who holds their bytes, and the engine that moves them.

It does not know why a record is offloaded or which one is next; `offload` and `schedule` do. The way out is
`writeback`, the way back `reload`, and the bytes move with `ssdtrain.store.tensor_store`. Everything it owns (engine,
counters aside) lives and ends with it.

[Note: the lock]
One lock guards records, extents and requests; every change is also bracketed, see [Note: unfinished changes]. It is
never held while bytes move or a thread waits, and nothing that runs in a destructor waits for it: a dying handle leaves
a note in `releases`. If only room on the drive hangs on it the next hook works it off, else who leaves or has the lock.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterable, Sequence

from ssdtrain.activations.open_drive import DriveSource
from ssdtrain.activations.reload import HandedOut, Reloads
from ssdtrain.activations.saved.storage_index import Index
from ssdtrain.activations.writeback import Batch, Writeback, may_leave
from ssdtrain.devices.base import Device
from ssdtrain.devices.memory_report import note_reported
from ssdtrain.devices.registry import Devices
from ssdtrain.scheduling.in_flight import Limits
from ssdtrain.stats import Counters
from ssdtrain.store.poisonable_lock import PoisonableLock
from ssdtrain.store.record import Releases, Residency, SavedRecord
from ssdtrain.tracing.spans import span
from ssdtrain.verdict import why_declined

_MAX_SHARED = 8  # records before looking which of them autograd has dropped
_ON_DRIVE_ONLY = Residency.DISK | Residency.HOST | Residency.SHARED


class ActivationStore:
    """The records of one offload context, and their bytes."""

    def __init__(
        self,
        source: DriveSource,
        index: Index,
        devices: Devices,
        *,
        on_reset: Callable[[], None],
        on_fork: Callable[[], None],
    ) -> None:
        """Has no engine yet; `open` opens one.

        Args:
            source: opens it.
            index: where records are filed.
            devices: whose memory they are from.
            on_reset: is called under the lock when all that is noted is given up.
            on_fork: is called in a forked child.
        """
        self.lock = PoisonableLock(self.reset)
        self.source, self.index, self.devices, self.counters = source, index, devices, source.counters
        self.note_fallback = source.note_fallback
        self.is_release_urgent = False
        """Whether `process_releases` is to be called when the lock is free: see [Note: the lock]."""
        self.writeback = Writeback(source, self.lock)
        self.limits = Limits(source.policy, source.counters, source.buffers)
        self.reloads = Reloads(source, self.limits)
        self._on_reset, self._on_fork = on_reset, on_fork
        self._num_entered = 0  # contexts that are active now
        self._why_closed = ""  # to be said when more is saved
        self._is_inherited = False  # by a forked child that has saved nothing yet
        self._is_resting = False  # closed, while nothing moves
        self._num_rests = 0
        self._has_declined = False  # and said so
        self.releases = Releases()
        _leave_to_parent_in_child(self)

    # -- life ----------------------------------------------------------------------------------------------------

    def why_not(self, device: Device) -> str | None:
        """Why no engine would move tensors of `device` now, or None. Opens one in a forked child that saves."""
        store = self.source.store
        if store is None and (self._is_resting or self._is_inherited):
            if self.counters.is_declining:
                return None
            rests = self._num_rests
            self._open_again(self.open)
            with self.lock.mutex, self.lock:
                if rests == self._num_rests:  # else another thread's step was over meanwhile, and it rests again
                    self._is_resting = self._is_inherited = False  # last: other threads wait for it
                store = self.source.store
        if store is None:
            if self._why_closed:
                self.note_fallback(self._why_closed)
            return "no engine open in this process"
        if device.driver is not None and store.moves_host_memory_only:
            return "engine python moves host memory only"
        return None

    def open(self) -> None:
        """Opens spill files and an engine; nothing to do when they are open.

        Raises:
            OSError: a directory cannot be used; errno and filename say which and why.
            RuntimeError: the engine asked for by name is not available.
        """
        self.source.ensure_open(self.lock)

    def enter(self) -> None:
        """A context becomes active: the engine is open from here on, unless the drive has become unusable meanwhile."""
        with self.lock.mutex, self.lock:
            self._num_entered += 1
        if self._is_resting and self.counters.is_declining:
            return
        try:
            self._open_again(self.open)
        except BaseException:  # Ctrl-C: no `leave` will follow
            with self.lock.mutex, self.lock:
                self._num_entered -= 1
            raise

    def leave(self) -> None:
        """A context ends; the engine lives on while records do."""
        with self.lock.mutex, self.lock:
            self._num_entered -= 1
            self.settle()
            self._close_if_idle()
        self.process_releases()
        self.source.settle()
        self.releases.raise_interruption()

    def close(self) -> None:
        """Ends the engine and frees slabs and spill files. Records whose bytes were only there are lost."""
        self._why_closed = "closed inside its context: nothing that is saved in it from here on moves"
        with self.lock.mutex, self.lock:
            self._is_resting = False
            self._close()
        self.process_releases()
        self.source.close()

    def __del__(self) -> None:
        """The last handle and the context are gone: nobody is left to close it."""
        try:
            self._close()
            self.source.close()
        except Exception:
            pass

    def totals(self) -> Counters:
        """A copy of the counters with what the open engine has done so far."""
        with self.lock.mutex, self.lock:
            self.settle()
            self.reloads.drop_expired()
            totals = self.counters.copy()
            self.source.add_totals(totals)
            self.writeback.add_held_back(totals)
            note_reported(totals)
        self.process_releases()
        return totals

    def _open_again(self, open_engine: Callable[[], None]) -> None:
        try:
            open_engine()
        except (OSError, RuntimeError) as error:
            self.note_fallback(f"the engine could not be opened again, tensors stay in memory: {error}")

    def _close(self) -> None:
        store = self.source.store
        if store is not None:
            for record in [record for pending in store.pending.writes for record in pending.records]:
                if record.residency is Residency.OFFLOADING and record.storage is not None:
                    self.reloads.forward(record)
            store.close()
            self.settle()
            self.source.give_back()
        self._forget_engine()

    def reset(self) -> None:
        """See [Note: unfinished changes]. What is in memory stays with its handles; what only the drive has is lost."""
        store = self.source.store
        if store is not None:
            store.pending.close()
            self.reloads.give_up()
            self.source.give_back()
        self._on_reset()
        self.index.forget_records()
        self.reloads.forget_records()
        self._forget_engine()
        self.counters.num_live_records, self.counters.held_nbytes = 0, self.counters.resident_nbytes
        self.counters.live_nbytes = 0
        self.note_fallback("interrupted in the middle of its bookkeeping: began anew, without what was on the drive")
        if self._num_entered:
            self._open_again(self.source.open_now)

    def leave_to_parent(self) -> None:
        """This is a forked child: the engine is the parent's, and so are its reads under way."""
        self.lock.renew()
        self.source.leave_to_parent()
        self._on_fork()
        self._is_inherited = self._is_inherited or not self._why_closed  # many children save nothing: see `why_not`
        self.reloads.give_up()
        self._forget_engine()

    def _forget_engine(self) -> None:
        """What is in memory stays; the next context opens another engine."""
        self.writeback.forget_engine()
        self.devices.trim()
        self.reloads.forget_engine()

    def _close_if_idle(self) -> None:
        """Closes when no context is active and no record is left; the next context opens again.

        Not with an accelerator: the process would wait for it, and pinning memory anew costs more than a step. Nor when
        the drive is another's: its engine would stay open anyway.
        """
        store = self.source.store
        if store is None or self._num_entered or self.counters.num_live_records:
            return
        if not store.pending.has_accelerators and not self.source.is_shared:
            self._close()

    def note_step_over(self) -> None:
        """A step was reviewed. Where moving does not pay there is no need for an engine, nor for its slabs."""
        if not self.limits.note_step_over():
            if self.source.has_idle_staging:
                self._rest()
            return
        self.counters.plan = f"declined: {why_declined(self.counters)}"
        if not self._has_declined:
            self._has_declined = True
            self.note_fallback(f"{self.counters.plan}; policy decline_below_nbytes=0 has them move anyway")
        if self.source.store is not None:
            self.rest_while_declining()

    def rest_while_declining(self) -> None:
        """Closes the engine if nothing is to move."""
        if self.counters.is_declining:
            self._rest()

    def _rest(self) -> None:
        """Closes the engine, whose slabs take memory, if it has no bytes of ours; `why_not` opens another."""
        with self.lock.mutex, self.lock:
            self.settle()
            store = self.source.store
            if store is None or self.source.is_shared:
                return
            if store.is_idle and not store.pending.has_accelerators:
                put_off, self._is_resting = self.writeback.put_off_records.copy(), True
                self._num_rests += 1
                self._close()
                self.writeback.put_off_records.update(put_off)  # what this step has saved by now
                self.counters.staging_nbytes = 0

    # -- records come and go ---------------------------------------------------------------------------------------

    def adopt(self, record: SavedRecord) -> None:
        """Takes a new record under management. The caller holds the lock."""
        if record.index == 0:  # a forward begins: no reload is near
            self.devices.trim()
        self.index.add(record)
        self.counters.save(record.nbytes)
        store = self.source.store
        self.counters.hold(record.nbytes, store.engine.staging_in_use_nbytes if store is not None else 0)
        if self.limits.note_saved(record):
            self.source.allow_in_flight()
        if store is not None and self.source.is_staging_short and not store.pending.has_accelerators:
            self.source.grow_staging(store.drive)  # nothing is pinned; else see `prepare`

    def work_off(self) -> None:
        """Takes note of handles that died, and raises what a signal's handler raised meanwhile."""
        self.process_releases()
        self.releases.raise_interruption()

    def look_after(self, record: SavedRecord) -> None:
        """A handle of a record died. Called from destructors, on any thread: see [Note: the lock]."""
        is_in_memory = record.storage is not None or not record.residency & _ON_DRIVE_ONLY
        if is_in_memory or len(self.releases.notes) >= self.counters.num_live_records:
            self.is_release_urgent = True
            self.process_releases()

    def process_releases(self) -> None:
        """Works off notes that are not to wait for the next hook: whoever had the lock calls this after."""
        while self.is_release_urgent and not self.lock.mutex.locked():
            with self.lock.mutex, self.lock:  # not acquire(): Ctrl-C could come before the `try` that releases
                self._release_all()
                self._close_if_idle()
            if self.source.heap.is_due:
                self.counters.note_process(self.source.heap.give_back())

    def _release_all(self) -> None:
        self.is_release_urgent = False
        notes = self.releases.notes
        while notes:
            record, epoch = notes.popleft()
            record.num_handles -= 1
            if epoch != record.epoch:
                record.num_unseen -= 1
            if record.num_handles == 0:
                self._release(record)
            elif record.num_unseen <= 0:
                self.reloads.share(record)
        self.is_release_urgent = self.source.heap.is_due

    def _release(self, record: SavedRecord) -> None:
        """The graph let go: everything the record held is free again."""
        pass_ = record.pass_
        if pass_.step.is_abandoned:
            record.storage = None
            return
        if record.storage is not None or record.residency & (Residency.RELOADING | Residency.SHARED):
            self.counters.hold(-record.nbytes)
            if record.device.driver is None and not self.counters.is_declining:
                self.source.heap.note(record.nbytes, self.source.buffers.saved_nbytes)
        self.reloads.release(record)
        if self.writeback.has_reserve:
            self.writeback.drop(record, is_declining=self.counters.is_declining)
        record.storage = None
        record.move(Residency.RELEASED)
        pass_.remove(record.index)
        self.index.forget(record, is_source=self._is_source(record))
        self.counters.num_live_records -= 1
        self.counters.live_nbytes -= record.nbytes

    def _is_source(self, record: SavedRecord) -> bool:
        """Whether the storage that it was made for may be alive by us: handed over, or what the engine copies from."""
        store = self.source.store
        if record.is_handed_over:
            return True
        if store is None or record.identity.expired():
            return False
        return any([s._cdata == record.identity.cdata for pending in store.pending.writes for s in pending.sources])

    # -- out -----------------------------------------------------------------------------------------------------

    def prepare(self, records: Sequence[SavedRecord]) -> None:
        """Has host memory pinned for what an accelerator is about to send: that takes long. Without the lock."""
        store = self.source.store
        if store is None or not records or records[0].device.driver is None or self.counters.is_declining:
            return
        if self.source.is_staging_short:
            self.source.grow_staging(store.drive)
        nbytes = sum([store.space.rounded(record.nbytes) for record in records]) + self.writeback.gathered_nbytes
        store.pending.prepare(records[0].device, nbytes, prefers_host=records[0].prefers_host)

    def start(self, records: Iterable[SavedRecord], *, is_planned: bool = False) -> list[Batch]:
        """Starts the trip down of records, or keeps them; what has to wait first, for `finish`. Under the lock."""
        self.settle()
        if self.counters.is_declining:
            self.writeback.put_off(records)
            return []
        return self.writeback.start(records, is_planned=is_planned)

    def finish(self, blocked: list[Batch], *, is_planned: bool = False) -> None:
        """Sends what had to wait, or keeps it. Called without the lock.

        In mode ``"all"`` it waits for the drive while `staging_nbytes` are in flight.
        """
        for batch in blocked:
            self.prepare(batch)
            while True:
                with self.lock.mutex, self.lock:
                    self.settle()
                    wait = self.writeback.try_submit([r for r in batch if may_leave(r)], is_planned=is_planned)
                if wait is None:
                    break
                self.writeback.wait_for_room(wait, batch[0])

    def settle(self) -> None:
        """Takes note of handles that died and of what the engine finished. The caller holds the lock."""
        if self.releases.notes:
            self._release_all()
        if len(self.reloads.shared) > _MAX_SHARED:
            self.reloads.drop_expired()
        store = self.source.store
        if store is not None:
            pending = store.pending
            if pending.has_accelerators or store.engine.num_events != pending.seen_events:
                self.writeback.settle()
        if self.source.heap.is_due:
            self.is_release_urgent = True

    # -- back ----------------------------------------------------------------------------------------------------

    def wait(self, record: SavedRecord, epoch: int) -> HandedOut:
        """The bytes of a requested record, when they are there. Called without the lock.

        Raises:
            OSError: the bytes could not be read; errno, file, offset and length are in it.
            RuntimeError: the context was closed, or this is a forked child.
        """
        while True:
            with self.lock.mutex, self.lock:
                handed_out = self.reloads.take_or_demand(record, epoch)
                pending = record.pending_read
            if handed_out is not None:
                return handed_out
            assert pending is not None
            begin = time.perf_counter()
            with span("wait", record):
                are_there = pending.wait(self.source.policy.io_timeout_seconds)
            self.source.stall("read", time.perf_counter() - begin, record)
            if not are_there:
                with self.lock.mutex, self.lock:
                    self.reloads.check_stuck(record)

    def prefetch(self, upcoming: Iterable[SavedRecord]) -> None:
        """Begins reloads ahead of need, one after the other, until the budget is used up."""
        with self.lock.mutex, self.lock:
            self.reloads.prefetch_all(upcoming)
        self.process_releases()


def _leave_to_parent_in_child(store: ActivationStore) -> None:
    weak = weakref.ref(store)

    def leave() -> None:
        own = weak()
        if own is not None:
            own.leave_to_parent()

    os.register_at_fork(after_in_child=leave)
