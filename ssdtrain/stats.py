"""Counters of one offload context and the readable snapshot users print.

`Counters` is written by the hooks and the store; `Stats` is a frozen copy. Sizes are bytes, times seconds.
"""

from __future__ import annotations

import copy
import html
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Protocol


@dataclass(frozen=True)
class Skipped:
    """Saved tensors left alone for one reason."""

    count: int
    nbytes: int


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

    def skip(self, reason: str, nbytes: int) -> None:
        """Counts a saved tensor that was left alone."""
        entry = self.skips.get(reason)
        if entry is None:
            entry = self.skips.setdefault(reason, [0, 0])
        entry[0] += 1
        entry[1] += nbytes

    def keep(self, reason: str, nbytes: int) -> None:
        """Counts a tensor that could have travelled and stays in memory."""
        self.skip(reason, nbytes)
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

    def begin_step(self) -> None:
        """Looks for the peak of another step."""
        self.step_peak_nbytes = self.step_device_peak_nbytes = self.held_nbytes
        self.num_steps += 1
        self.last_memory_nbytes, self.step_memory_nbytes = self.step_memory_nbytes, 0

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

    def compute_seconds(self) -> float:
        """A clock that stands still while training waits for a drive."""
        return time.perf_counter() - self.stalled_seconds

    def stall(self, tier: str, seconds: float) -> None:
        """Charges waiting time to the tier that was waited for."""
        self.stalls[tier] = self.stalls.get(tier, 0.0) + seconds
        self.stalled_seconds += seconds


@dataclass(frozen=True)
class Stats:
    """What an offload context did and what it cost, up to the moment of the snapshot."""

    num_saved: int
    """Tensors autograd saved while the hooks were on."""
    num_offloaded: int
    """Records (storages or parts of storages) that left memory."""
    offloaded_nbytes: int  # of those records
    deduplicated_nbytes: int
    """Bytes that did not travel because the same storage range was already saved."""
    forwarded_nbytes: int
    """Bytes backward got from memory although they were on their way to the drive."""
    cancelled_write_nbytes: int
    """Bytes whose write was called off because they were needed or dropped first."""
    written_nbytes: int
    """Bytes written to the spill files, padding included."""
    read_nbytes: int  # and read back
    shared_written_nbytes: int
    """Bytes written meanwhile for parameters or optimizer state that share the engine."""
    shared_read_nbytes: int  # and read for them
    kept_nbytes: int
    """Bytes that could have travelled and were kept, reasons in `skipped`."""
    num_prefetched: int
    """Reloads begun before backward asked."""
    num_demand_reloads: int
    """Reloads begun when backward asked: each one is a wait."""
    stall_seconds: float
    """Time the training thread waited for the drive, both directions."""
    stalls: Mapping[str, float]  # the same by what was waited for
    num_live_records: int  # that autograd still holds
    peak_staging_nbytes: int
    """Most staging memory in use at once."""
    peak_disk_nbytes: int
    """Most spill space in use at once."""
    hosted_nbytes: int
    """Bytes of records that went to the host tier instead of the drive."""
    host_read_nbytes: int  # that came back from there
    peak_host_nbytes: int
    """Most bytes in the host tier at once."""
    peak_saved_nbytes: int
    """Most bytes of saved tensors in memory at once: on the device, in staging and prefetched together."""
    peak_device_nbytes: int
    """The same without staging: what was in the memory that training computes in."""
    ahead_seconds: float
    """Time the training thread, far ahead of an accelerator, waited for it: no loss, the accelerator had work."""
    predicted_peak_nbytes: int
    """Of the latest finished step that followed a plan: its peak of saved tensors in memory, staging included,"""
    measured_peak_nbytes: int
    """and what it was,"""
    predicted_step_seconds: float
    """the time from its beginning to that of the next step,"""
    measured_step_seconds: float
    """and what it was. All are 0 while no step has followed a plan."""
    write_busy_seconds: float
    """Time with at least one write at the drive."""
    read_busy_seconds: float
    """Time with at least one read at the drive."""
    device_step_seconds: float = 0.0
    """An accelerator's latest step that was timed, by its own clock."""
    device_wait_seconds: float = 0.0
    """Time in which it waited there for bytes on their way back."""
    copied_out_nbytes: int = 0  # from accelerators to host memory
    copy_out_seconds: float = 0.0  # in which there were such copies
    copied_in_nbytes: int = 0  # from host memory to accelerators
    copy_in_seconds: float = 0.0  # in which there were such copies
    peak_memory_nbytes: int = 0
    """The peak over the run: saved tensors in memory, staging that was ever in use (an accelerator's: of the host) and
    memory kept for later reloads."""
    peak_memory_step: int = 0  # in which that was, counted from 1
    last_memory_nbytes: int = 0  # the same in the last step that is over
    held_nbytes: int = 0  # in memory now
    num_steps: int = 0  # that are over
    without_nbytes: int = 0
    """An estimate of the peak of saved tensors without ssdtrain: most bytes of them alive at once."""
    peak_process_nbytes: int = 0
    """Most resident memory of this process since it began, as the system reports."""
    peak_allocated_nbytes: int = 0
    """What PyTorch reports of the current CUDA device, `max_memory_allocated`; 0 without one."""
    peak_reserved_nbytes: int = 0  # and `max_memory_reserved`
    staging_limit_nbytes: int = 0
    """Bound on bytes on their way out: the policy's, or more where records of an accelerator are large,"""
    prefetch_limit_nbytes: int = 0
    """and on those on their way back. One record may always be alone beyond it."""
    host_limit_nbytes: int = 0
    """The most the host tier may hold, by the memory there is now."""
    skipped: Mapping[str, Skipped] = field(default_factory=lambda: MappingProxyType({}))
    """Saved tensors left alone, by reason."""
    engine: str = ""  # who executes the file requests
    engine_reason: str = ""  # why this engine
    plan: str = ""
    """What the plan in force does, or why nothing moves; empty while there is none."""
    fallbacks: tuple[str, ...] = ()
    """Everything that did not go the best way, with its reason."""

    @classmethod
    def of(cls, totals: Counters) -> Stats:
        """The public view of the counters."""
        special = {"skipped", "stalls", "stall_seconds", "fallbacks"}
        plain = {f.name: getattr(totals, f.name) for f in fields(cls) if f.name not in special}
        return cls(
            **plain,
            skipped=MappingProxyType({reason: Skipped(*entry) for reason, entry in totals.skips.items()}),
            stalls=MappingProxyType(totals.stalls),
            stall_seconds=sum(totals.stalls.values()),
            fallbacks=tuple(totals.fallbacks),
        )

    def as_dict(self) -> dict[str, Any]:
        """The same as plain types, for JSON."""
        skipped = {reason: vars(entry).copy() for reason, entry in self.skipped.items()}
        return vars(self) | {"skipped": skipped, "stalls": dict(self.stalls), "fallbacks": list(self.fallbacks)}

    def _now_lines(self) -> list[str]:
        return [
            f"  now       saved tensors in memory {nbytes_text(self.held_nbytes)}; bounds"
            f" {nbytes_text(self.staging_limit_nbytes)} on their way out,"
            f" {nbytes_text(self.prefetch_limit_nbytes)} on their way back",
            f"  engine    {self.engine or 'not opened'}{': ' + self.engine_reason if self.engine_reason else ''}",
            *([f"  plan      {self.plan}"] if self.plan else []),
        ]

    def _last_step_lines(self) -> list[str]:
        lines = [f"  last step peak {nbytes_text(self.last_memory_nbytes)}"] if self.num_steps else []
        if self.measured_step_seconds:
            lines.append(
                f"  step      peak {nbytes_text(self.predicted_peak_nbytes)} predicted,"
                f" {nbytes_text(self.measured_peak_nbytes)} measured; {self.predicted_step_seconds:.3f} s predicted,"
                f" {self.measured_step_seconds:.3f} s measured"
            )
        if self.device_step_seconds:
            lines.append(
                f"  device    {self.device_step_seconds:.3f} s in the latest step that was timed,"
                f" {self.device_wait_seconds:.3f} s of it waiting for bytes on their way back"
            )
        return lines

    def _peak_lines(self) -> list[str]:
        allocated, reserved = nbytes_text(self.peak_allocated_nbytes), nbytes_text(self.peak_reserved_nbytes)
        device = f"; the device had {allocated} allocated, {reserved} reserved" if self.peak_reserved_nbytes else ""
        return [
            f"  the run   peak {nbytes_text(self.peak_memory_nbytes)} of saved tensors and our buffers, in step"
            f" {max(1, self.peak_memory_step)}; {nbytes_text(self.without_nbytes)} without ssdtrain (estimated)",
            f"            saved tensors alone {nbytes_text(self.peak_device_nbytes)},"
            f" staging {nbytes_text(self.peak_staging_nbytes)}, spill space {nbytes_text(self.peak_disk_nbytes)};"
            f" the process took {nbytes_text(self.peak_process_nbytes)} at most{device}",
        ]

    def __repr__(self) -> str:
        did = f"{self.num_steps} steps, {nbytes_text(self.offloaded_nbytes)} offloaded"
        return f"Stats({did}, {self.stall_seconds:.3f} s stalled)"

    def _repr_html_(self) -> str:
        """For notebooks."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def _other_lines(self) -> list[str]:
        shared = (
            f"            and for parameters and optimizer state wrote {nbytes_text(self.shared_written_nbytes)},"
            f" read {nbytes_text(self.shared_read_nbytes)}"
        )
        host = (
            f"  host tier took {nbytes_text(self.hosted_nbytes)}, gave {nbytes_text(self.host_read_nbytes)} back;"
            f" peak {nbytes_text(self.peak_host_nbytes)}"
        )
        has_shared = self.shared_written_nbytes or self.shared_read_nbytes
        return [shared] * bool(has_shared) + [host] * bool(self.peak_host_nbytes)

    def __str__(self) -> str:
        """One screen: what is now, what the last step took, and what the whole run did, cost and left alone."""
        lines = [
            f"ssdtrain: {nbytes_text(self.offloaded_nbytes)} of {self.num_offloaded} records offloaded"
            f" ({self.num_saved} tensors saved, {nbytes_text(self.deduplicated_nbytes)} of them shared)",
            *self._now_lines(),
            *self._last_step_lines(),
            *self._peak_lines(),
            f"  drive     wrote {rate_text(self.written_nbytes, self.write_busy_seconds)},"
            f" read {rate_text(self.read_nbytes, self.read_busy_seconds)}"
            f"; {nbytes_text(self.forwarded_nbytes)} forwarded,"
            f" {nbytes_text(self.cancelled_write_nbytes)} of writes cancelled",
            *self._other_lines(),
            f"  cost      {self.stall_seconds:.3f} s stalled"
            + "".join(f", {tier} {seconds:.3f} s" for tier, seconds in self.stalls.items())
            + f"; {self.num_prefetched} reloads prefetched, {self.num_demand_reloads} on demand",
        ]
        for reason, skipped in sorted(self.skipped.items(), key=lambda item: -item[1].nbytes):
            lines.append(f"  left      {skipped.count} x {reason} ({nbytes_text(skipped.nbytes)}), over the run")
        lines += [f"  fallback  {text}" for text in self.fallbacks]
        return "\n".join(lines)


def nbytes_text(nbytes: float) -> str:
    """``"1.5 GiB"`` for a human."""
    for unit in ("B", "KiB", "MiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def rate_text(nbytes: int, seconds: float) -> str:
    """``"1.5 GiB at 2.10 GB/s"``."""
    rate = f" at {nbytes / seconds / 1e9:.2f} GB/s" if seconds > 0 else ""
    return nbytes_text(nbytes) + rate
