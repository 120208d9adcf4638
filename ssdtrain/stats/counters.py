"""What one offload context counts while it runs; `stats` makes the readable snapshot of it.

`Counters` is written by the hooks, the schedule and the store. Sizes are bytes, times seconds.
"""

from __future__ import annotations

import copy
import time
from typing import Protocol


class EngineTotals(Protocol):
    """What an engine says of itself."""

    @property
    def written_nbytes(self) -> int:
        """Bytes written to the files."""

    @property
    def read_nbytes(self) -> int:
        """Bytes read from the files."""

    @property
    def write_busy_seconds(self) -> float:
        """Time with a write at the drive."""

    @property
    def read_busy_seconds(self) -> float:
        """Time with a read at the drive."""

    @property
    def peak_staging_nbytes(self) -> int:
        """Most slab memory in use."""

    @property
    def sustained_written_nbytes(self) -> int:
        """What was written in long periods without a pause."""

    @property
    def sustained_write_seconds(self) -> float:
        """Length of these periods."""

    @property
    def sustained_read_nbytes(self) -> int:
        """What was read in long periods without a pause."""

    @property
    def sustained_read_seconds(self) -> float:
        """Length of these periods."""

    @property
    def shared_written_nbytes(self) -> int:
        """Bytes written for another user of the engine."""

    @property
    def shared_read_nbytes(self) -> int:
        """Bytes read for it."""

    @property
    def copied_out_nbytes(self) -> int:
        """Bytes copied from accelerators to host memory."""

    @property
    def copy_out_seconds(self) -> float:
        """Time in which the stream of these copies was busy."""

    @property
    def copied_in_nbytes(self) -> int:
        """Bytes copied from host memory to accelerators."""

    @property
    def copy_in_seconds(self) -> float:
        """Time in which the stream of these copies was busy."""


_OF_ENGINE = (
    "written_nbytes read_nbytes write_busy_seconds read_busy_seconds sustained_written_nbytes sustained_write_seconds "
    "sustained_read_nbytes sustained_read_seconds shared_written_nbytes shared_read_nbytes "
    "copied_out_nbytes copy_out_seconds copied_in_nbytes copy_in_seconds"
).split()


class Counters:
    """Running totals; one instance per offload context. Attributes are the fields of `Stats`, plus two gauges."""

    def __init__(self) -> None:
        """All zero."""
        self.num_saved = self.num_offloaded = self.num_prefetched = self.num_demand_reloads = 0
        self.offloaded_nbytes = self.deduplicated_nbytes = self.forwarded_nbytes = self.kept_nbytes = 0
        self.cancelled_write_nbytes = self.written_nbytes = self.read_nbytes = 0
        self.shared_written_nbytes = self.shared_read_nbytes = 0
        self.sustained_written_nbytes = self.sustained_read_nbytes = 0
        self.sustained_write_seconds = self.sustained_read_seconds = 0.0
        self.write_busy_seconds = self.read_busy_seconds = 0.0
        self.peak_staging_nbytes = self.peak_disk_nbytes = self.peak_host_nbytes = 0
        self.hosted_nbytes = self.host_read_nbytes = 0
        self.copied_out_nbytes = self.copied_in_nbytes = 0
        self.copy_out_seconds = self.copy_in_seconds = 0.0
        self.ahead_seconds = 0.0
        self.num_live_records = 0
        self.live_nbytes = 0  # gauge: their bytes, wherever they are
        self.staging_nbytes = 0  # gauge: slabs that were ever in use, which stay in memory
        self.without_nbytes = self.peak_memory_nbytes = self.peak_memory_step = self.peak_process_nbytes = 0
        self.peak_allocated_nbytes = self.peak_reserved_nbytes = self.num_steps = 0
        self.other_process_nbytes = 0  # most of the process, but for saved tensors and our buffers
        self.step_memory_nbytes = self.last_memory_nbytes = 0  # of the step that runs, and of the last one
        self.held_nbytes = 0  # gauge: bytes of saved tensors in memory now, staging excluded
        self.prefetched_nbytes = 0  # gauge: bytes reloaded, or being reloaded, and not asked for yet
        self.staging_limit_nbytes = self.prefetch_limit_nbytes = self.host_limit_nbytes = 0
        self.peak_saved_nbytes = self.peak_device_nbytes = 0
        self.step_device_peak_nbytes = 0  # the same as `peak_device_nbytes` since `begin_step`
        self.resident_nbytes = 0  # gauge: those of the held bytes that no record stands for
        self.step_peak_nbytes = 0  # the same as `peak_saved_nbytes` since `begin_step`
        self.stalled_seconds = 0.0
        self.plan = ""
        self.is_declining = False  # too little is saved for moving to pay, which it does from here on:
        self.pays_at_nbytes = 0
        self.predicted_peak_nbytes = self.measured_peak_nbytes = 0  # of the latest step that followed a plan
        self.predicted_step_seconds = self.measured_step_seconds = 0.0
        self.device_step_seconds = self.device_wait_seconds = 0.0
        self.skips: dict[str, list[int]] = {}
        self.stalls: dict[str, float] = {}
        self.fallbacks: list[str] = []
        self.engine = self.engine_reason = ""

    def copy(self) -> Counters:
        """A snapshot; `skips`, `stalls` and `fallbacks` are copied too."""
        other = copy.copy(self)
        other.skips = {reason: list(entry) for reason, entry in list(self.skips.items())}
        other.stalls, other.fallbacks = dict(self.stalls), list(self.fallbacks)
        return other

    def add_engine(self, engine: EngineTotals, peak_disk_nbytes: int) -> None:
        """Adds what one engine did from open to close."""
        for name in _OF_ENGINE:
            setattr(self, name, getattr(self, name) + getattr(engine, name))
        self.peak_staging_nbytes = max(self.peak_staging_nbytes, engine.peak_staging_nbytes)
        self.peak_disk_nbytes = max(self.peak_disk_nbytes, peak_disk_nbytes)

    def skip(self, reason: str, nbytes: int, count: int = 1) -> None:
        """Counts a saved tensor that was left alone; with -1 and -`nbytes` it left after all."""
        entry = self.skips.get(reason)
        if entry is None:
            entry = self.skips.setdefault(reason, [0, 0])
        entry[0] += count
        entry[1] += nbytes

    def keep(self, reason: str, nbytes: int, count: int = 1) -> None:
        """Counts a tensor that could have been offloaded and stays in memory."""
        self.skip(reason, nbytes, count)
        self.kept_nbytes += nbytes

    def fall_back(self, text: str) -> bool:
        """Notes once why something did not go the best way; whether it is news."""
        is_news = bool(text) and text not in self.fallbacks
        if is_news:
            self.fallbacks.append(text)
        return is_news

    def hold(self, nbytes: int, staging_nbytes: int = 0, idle_nbytes: int = 0) -> None:
        """Moves the gauge of held bytes and its peaks; slabs hold `staging_nbytes` now, later reloads `idle_nbytes`."""
        self.held_nbytes += nbytes
        self.staging_nbytes = max(self.staging_nbytes, staging_nbytes)
        memory = self.held_nbytes + self.staging_nbytes + idle_nbytes
        if memory > self.peak_memory_nbytes:
            self.peak_memory_nbytes, self.peak_memory_step = memory, self.num_steps + 1
        self.step_memory_nbytes = max(self.step_memory_nbytes, memory)
        staging_nbytes += idle_nbytes
        if self.held_nbytes > self.step_device_peak_nbytes:
            self.step_device_peak_nbytes = self.held_nbytes
            self.peak_device_nbytes = max(self.peak_device_nbytes, self.held_nbytes)
        if self.held_nbytes + staging_nbytes > self.step_peak_nbytes:
            self.step_peak_nbytes = self.held_nbytes + staging_nbytes
            self.peak_saved_nbytes = max(self.peak_saved_nbytes, self.step_peak_nbytes)

    def committed_nbytes(self, *, is_on_host: bool) -> int:
        """What is held now in the memory that tensors are saved in: an accelerator's, or the host's, then with slabs.

        Of those as much as may come to be in use.
        """
        return self.held_nbytes + (self.staging_limit_nbytes if is_on_host else 0)

    def end_step(self) -> None:
        """A step is over, whether another follows or not."""
        self.num_steps += 1
        self.last_memory_nbytes, self.step_memory_nbytes = self.step_memory_nbytes, 0

    def begin_step(self) -> None:
        """Looks for the peak of another step."""
        self.step_peak_nbytes = self.step_device_peak_nbytes = self.held_nbytes

    def save(self, nbytes: int) -> None:
        """A record more is alive."""
        self.num_live_records += 1
        self.live_nbytes += nbytes
        self._note_without()

    def stay(self, nbytes: int) -> None:
        """Bytes more are in memory that no record stands for."""
        self.hold(nbytes)
        self.resident_nbytes += nbytes
        self._note_without()

    def _note_without(self) -> None:
        self.without_nbytes = max(self.without_nbytes, self.live_nbytes + self.resident_nbytes)

    def note_process(self, nbytes: int) -> None:
        """So much of the process is resident, with no freed memory in it."""
        other_nbytes = nbytes - self.held_nbytes - self.staging_nbytes
        self.other_process_nbytes = max(self.other_process_nbytes, other_nbytes)

    @property
    def without_process_nbytes(self) -> int:
        """What the process would take without us; 0 where that is not known."""
        return self.other_process_nbytes + self.without_nbytes if self.other_process_nbytes else 0

    def compute_seconds(self) -> float:
        """A clock that stands still while training waits for a drive."""
        return time.perf_counter() - self.stalled_seconds

    def stall(self, tier: str, seconds: float) -> None:
        """Charges waiting time to the tier that was waited for."""
        self.stalls[tier] = self.stalls.get(tier, 0.0) + seconds
        self.stalled_seconds += seconds
