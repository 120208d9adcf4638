"""Saved activations on their way out: what is written together, what waits, what stays, and how much may be under way.

Called under the lock of `ssdtrain.activations.activation_store`, except for what waits. Knows neither why a record
is offloaded nor which one is next.

[Note: the queue]
What a plan sends joins the engine's queue also beyond `staging_nbytes`: a plan knows how fast the drive is, not to the
millisecond when a write is over. It costs no memory, as slabs bound what is copied, and what waits for a slab would
else be kept for good; if backward wants it first, its write is cancelled. The queue has an end too, which only a drive
gets to see that is much slower than planned. Without a plan what the drive has no time for is kept at once.

[Note: waiting for an accelerator]
The bytes in flight are bounded. When the bound is reached because the drive is behind, mode "auto" keeps the tensor.
When it is reached because training runs ahead of an accelerator, which has not even computed what is to be copied, it
waits until the accelerator is there: the accelerator has work meanwhile, and memory could not fall otherwise.

[Note: what is put off]
While so little is saved that moving it takes more memory than it frees, nothing sets out. When a step turns out to save
more, what was put off follows, the oldest first, as far as there is room on the way: it is needed last.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator

from ssdtrain.activations.open_drive import DriveSource
from ssdtrain.io.engine import Fence
from ssdtrain.io.spill_space import Growth
from ssdtrain.stats import Counters
from ssdtrain.store.pending import PendingWrite
from ssdtrain.store.poisonable_lock import PoisonableLock
from ssdtrain.store.record import Residency, SavedRecord
from ssdtrain.store.saved_tensors import is_resized
from ssdtrain.store.tensor_store import Origin, TensorStore, make_wait
from ssdtrain.tracing.spans import span
from ssdtrain.verdict import TOO_LITTLE

_MAX_QUEUE = 256  # writes that a plan may have under way
_HELD_SHARE = 4  # of staging: sources that an accelerator is yet to copy, before they are let go in stream order


KEPT_LAST = "among the last saved"
PLANNED_TO_STAY = "planned to stay"

Batch = list[SavedRecord]
Wait = int | Fence | Growth
"""What a batch waits for: room for so many bytes, an accelerator, or a longer file."""


class Writeback:
    """Records that leave memory, of one offload context."""

    def __init__(self, source: DriveSource, lock: PoisonableLock) -> None:
        """Nothing is gathered yet. `lock` is that of the records, for what waits without it."""
        self._source, self._lock, self._counters = source, lock, source.counters
        self.is_patient = source.policy.is_patient
        """Whether training waits for the drive rather than keep a tensor."""
        self._planned_to_stay: dict[SavedRecord, None] = {}  # under a budget, the oldest first
        self._has_budget = source.policy.memory_budget is not None
        self._batch: Batch = []
        self.gathered_nbytes = 0
        self._last: deque[SavedRecord] = deque()  # held back, until as many others are saved
        self.put_off_records: dict[SavedRecord, None] = {}
        """What has not set out, the oldest first; see [Note: what is put off]."""
        self._num_last = source.policy.keep_last if source.policy.memory_budget is None else 0

    # -- out -----------------------------------------------------------------------------------------------------

    def start(self, records: Iterable[SavedRecord], *, is_planned: bool = False) -> list[Batch]:
        """Starts the trip down, small neighbours together; may decide to keep a record instead. Under the lock.

        Returns batches that have to wait first, for `finish`. `is_planned`: see [Note: the queue].
        """
        if self.put_off_records:
            self.put_off(records)
            records = self._take_put_off()
        blocked: list[Batch] = []
        for record in records if is_planned or not self._num_last else self._hold_back(records):
            if not may_leave(record):
                continue
            for batch in [[record]] if record.nbytes * 2 >= self._source.slab_nbytes else self._gather(record):
                if blocked or self.try_submit(batch, is_planned=is_planned) is not None:
                    blocked.append(batch)
        return blocked

    def put_off(self, records: Iterable[SavedRecord]) -> None:
        """Has records wait until it is known that moving them pays, or until there is room. Under the lock."""
        self.put_off_records.update(dict.fromkeys(records))

    @property
    def has_reserve(self) -> bool:
        """Whether there are records that stay, and may still be sent."""
        return bool(self.put_off_records or self._planned_to_stay)

    def drop(self, record: SavedRecord, *, is_declining: bool) -> None:
        """A record is released, which may have been put off to its end."""
        self._planned_to_stay.pop(record, None)
        if record in self.put_off_records:
            del self.put_off_records[record]
            self._counters.keep(TOO_LITTLE if is_declining else "drive behind", record.nbytes)

    def _take_put_off(self) -> Iterator[SavedRecord]:
        """What may set out now, as long as there is room for it."""
        while self.put_off_records and self._source.store is not None:
            record = next(iter(self.put_off_records))
            if not self._source.store.pending.has_room(record.nbytes + self.gathered_nbytes):
                return
            del self.put_off_records[record]
            if not is_resized(record):
                yield record

    def _hold_back(self, records: Iterable[SavedRecord]) -> Batch:
        """What is not among the last any more, and was not wanted meanwhile."""
        out: Batch = []
        self._last.extend([record for record in records if may_leave(record)])
        while len(self._last) > self._num_last:
            record = self._last.popleft()
            if is_resized(record):
                continue
            if may_leave(record):
                out.append(record)
            else:
                self._counters.keep(KEPT_LAST, record.nbytes)
        return out

    def add_held_back(self, counters: Counters) -> None:
        """Counts what stayed for being among the last, and was not counted yet."""
        for record in self._last:
            if not may_leave(record):
                counters.keep(KEPT_LAST, record.nbytes)

    def _gather(self, record: SavedRecord) -> list[Batch]:
        """Batches that are full now that a small one has joined."""
        batches = []
        if self._batch and not _go_alike(record, self._batch[0]):
            batches.append(self._take_batch())
        self._batch.append(record)
        self.gathered_nbytes += record.nbytes
        if self.gathered_nbytes >= self._source.slab_nbytes:
            batches.append(self._take_batch())
        return batches

    def send_gathered(self) -> Wait | None:
        """Sends what waits for company; or returns what to wait for first."""
        store = self._source.store
        if not self._batch or store is None:
            return None
        if not store.pending.has_room(self.gathered_nbytes):
            return self.gathered_nbytes
        batch = self._take_batch()
        wait = self.try_submit(batch, is_planned=False)
        if wait is not None:
            self._batch, self.gathered_nbytes = batch, sum([record.nbytes for record in batch])
        return wait

    def send_kept(self, nbytes: int, used: Iterable[SavedRecord]) -> Wait | None:
        """Sends at least `nbytes` that a plan would keep, the oldest first, then of what was `used` and stays for more.

        Returns what to wait for first, if anything.
        """
        for record in [*self._planned_to_stay, *used]:
            if nbytes <= 0:
                break
            if not record.epoch and is_resized(record):
                continue
            if record.residency is Residency.DEVICE and (record.is_unpacked or record in self._planned_to_stay):
                record.is_wanted = False
                wait = self.try_submit([record], is_planned=False)
                if wait is not None:
                    record.is_wanted = True
                    return wait
                nbytes -= record.nbytes
            if self._planned_to_stay.pop(record, self) is None:
                self._counters.keep(PLANNED_TO_STAY, -record.nbytes, count=-1)
        return None

    def _take_batch(self) -> Batch:
        batch, self._batch, self.gathered_nbytes = self._batch, [], 0
        return [record for record in batch if may_leave(record) and not is_resized(record)]

    def try_submit(self, batch: Batch, *, is_planned: bool) -> Wait | None:
        """Submits or keeps a batch; or returns what to wait for before trying again."""
        store = self._source.store
        if store is None or not batch:
            return None
        need = batch[0].nbytes if len(batch) == 1 else sum([record.nbytes for record in batch])
        if store.pending.has_room(need):
            return self._submit(store, batch)
        if self.is_patient:
            return need
        point = store.next_point()
        if point is not None:
            return point
        if store.pending.retire_silent():
            self._keep(batch, "drive stuck")
        elif is_planned and len(store.pending.writes) < _MAX_QUEUE:
            return self._submit(store, batch)
        else:
            self._keep(batch, "drive behind")
        return None

    def _submit(self, store: TensorStore, batch: Batch) -> Growth | None:
        first, counters = batch[0], self._counters
        assert first.storage is not None
        sources = [first.storage] if len(batch) == 1 else [r.storage for r in batch if r.storage is not None]
        with span("offload", first):
            is_begun = store.write(batch, sources, Origin(first.device, first.stream, first.prefers_host))
        if is_begun is True:
            counters.num_offloaded += len(batch)
            for record in batch:
                counters.offloaded_nbytes += record.nbytes
            return None
        if is_begun is False:
            full = "no spill space" if self._source.has_directories else "host tier full"
            self._keep(batch, "no directory left" if store.host is None and store.space.is_exhausted else full)
            return None
        return is_begun

    def wait_for_room(self, wait: Wait, record: SavedRecord) -> None:
        """See [Note: waiting for an accelerator]."""
        begin = time.perf_counter()
        with span("wait", record):
            is_for_drive = self._wait(wait)
        seconds = time.perf_counter() - begin
        if is_for_drive:
            self._source.stall("write", seconds, record)
        else:
            self._counters.ahead_seconds += seconds

    def _wait(self, wait: Wait) -> bool:
        """Whether it was for the drive, not for an accelerator."""
        if isinstance(wait, Growth):
            wait.wait()
        elif isinstance(wait, int):
            self._wait_for_drive(wait)
        else:
            wait.synchronize()
            return False
        return True

    def _wait_for_drive(self, nbytes: int) -> None:
        store = self._source.store
        if store is None or store.pending.wait_for_room(nbytes):
            return
        with self._lock.mutex, self._lock:
            store.pending.retire_silent()
        self.is_patient = False
        self._source.note_fallback("the drive is stuck: mode 'all' keeps tensors like mode 'auto' from here on")

    def keep_as_planned(self, records: Iterable[SavedRecord]) -> None:
        """Keeps records in memory that have not left. Under the lock."""
        batch = [record for record in records if may_leave(record)]
        if self._has_budget:
            self._planned_to_stay.update(dict.fromkeys(batch))
        self._keep(batch, PLANNED_TO_STAY)

    def _keep(self, batch: Batch, reason: str) -> None:
        for record in batch:
            record.is_wanted = True
            self._counters.keep(reason, record.nbytes)

    # -- what the engine has done ------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Takes note of what the engine finished: lets sources go, frees extents."""
        store = self._source.store
        if store is None:
            return
        news = store.reap()
        if news:
            self._note_news(news, store)
        if store.pending.has_accelerators:
            held_nbytes = self._counters.staging_limit_nbytes // _HELD_SHARE
            for pending in store.let_go(held_nbytes, only_if_behind=not self.is_patient):
                self._let_go_of(pending)

    def _note_news(self, news: Iterable[SavedRecord], store: TensorStore) -> None:
        """Records are copied, or written, or back in memory because they could not be copied."""
        counters, freed_nbytes = self._counters, 0
        for record in news:
            residency = record.residency
            if residency is Residency.DEVICE:
                record.is_wanted = True
                counters.forwarded_nbytes += record.nbytes
                continue
            if record.storage is not None:
                record.storage = None
                freed_nbytes += record.nbytes
            if residency is Residency.HOST:
                counters.hosted_nbytes += record.nbytes
        counters.hold(0, store.engine.staging_in_use_nbytes)
        counters.hold(-freed_nbytes)
        if freed_nbytes and not store.pending.has_accelerators:
            self._source.heap.note(freed_nbytes, self._source.buffers.saved_nbytes)

    def _let_go_of(self, pending: PendingWrite) -> None:
        """Lets sources go in stream order; the time it costs an accelerator belongs to the step."""
        first: SavedRecord = pending.records[0]
        step = first.pass_.step
        began = step.mark() if first.device.current_stream() == pending.stream else None
        make_wait(pending)
        if began is not None:
            step.note_wait(began, is_for_reload=False)
        pending.sources = []
        for record in pending.records:
            if record.storage is not None and record.residency is Residency.OFFLOADING:
                record.storage = None
                self._counters.hold(-record.nbytes)

    def forget_engine(self) -> None:
        """What was gathered stays where it is."""
        self._batch, self.gathered_nbytes = [], 0
        self.put_off_records.clear()
        self._planned_to_stay.clear()
        self.add_held_back(self._counters)
        self._last.clear()


def may_leave(record: SavedRecord) -> bool:
    """Whether nobody has asked for it yet, and it has not left."""
    return record.residency is Residency.DEVICE and not record.is_wanted and record.num_handles > 0


def _go_alike(record: SavedRecord, other: SavedRecord) -> bool:
    """Whether two records can be one request."""
    mine = (record.device, record.stream, record.prefers_host)
    return mine == (other.device, other.stream, other.prefers_host)
