"""The readable snapshot of one offload context's counters, which users print.

Sizes are bytes, times seconds.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from ssdtrain.stats.counters import Counters
from ssdtrain.stats.units import nbytes_text, rate_text


@dataclass(frozen=True)
class Skipped:
    """Saved tensors left alone for one reason."""

    count: int
    nbytes: int


@dataclass(frozen=True)
class Stats:
    """What an offload context did and what it cost, up to the moment of the snapshot."""

    num_saved: int
    """Tensors autograd saved while the hooks were on."""
    num_offloaded: int
    """Records (storages or parts of storages) that left memory."""
    offloaded_nbytes: int
    """Bytes of those records."""
    deduplicated_nbytes: int
    """Bytes that were not offloaded because the same storage range was already saved."""
    forwarded_nbytes: int
    """Bytes backward got from memory although they were on their way to the drive."""
    cancelled_write_nbytes: int
    """Bytes whose write was cancelled because they were needed or dropped first."""
    written_nbytes: int
    """Bytes written to the spill files, padding included."""
    read_nbytes: int
    """Bytes read back."""
    shared_written_nbytes: int
    """Bytes written meanwhile for parameters or optimizer state that share the engine."""
    shared_read_nbytes: int
    """Bytes read for them."""
    kept_nbytes: int
    """Bytes that could have been offloaded and were kept, reasons in `skipped`."""
    num_prefetched: int
    """Reloads begun before backward asked."""
    num_demand_reloads: int
    """Reloads begun when backward asked: each one is a wait."""
    stall_seconds: float
    """Time the training thread waited for the drive, both directions."""
    stalls: Mapping[str, float]
    """The same by what was waited for."""
    num_live_records: int
    """Records that autograd still holds."""
    peak_staging_nbytes: int
    """Most staging memory in use at once."""
    peak_disk_nbytes: int
    """Most spill space in use at once."""
    hosted_nbytes: int
    """Bytes of records that went to the host tier instead of the drive."""
    host_read_nbytes: int
    """Bytes that came back from there."""
    peak_host_nbytes: int
    """Most bytes in the host tier at once."""
    peak_saved_nbytes: int
    """Most bytes of saved tensors in memory at once: on the device, in staging and prefetched together."""
    peak_device_nbytes: int
    """The same without staging: what was in the memory that training computes in."""
    ahead_seconds: float
    """Time the training thread, far ahead of an accelerator, waited for it: no loss, the accelerator had work."""
    predicted_peak_nbytes: int
    """Of the latest finished step that followed a plan: its peak of saved tensors and our buffers in memory,"""
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
    copied_out_nbytes: int = 0
    """Bytes copied from accelerators to host memory,"""
    copy_out_seconds: float = 0.0
    """and the time in which there were such copies."""
    copied_in_nbytes: int = 0
    """Bytes copied from host memory to accelerators,"""
    copy_in_seconds: float = 0.0
    """and the time in which there were such copies."""
    peak_memory_nbytes: int = 0
    """The peak over the run: saved tensors in memory, staging that was ever in use (an accelerator's: of the host) and
    memory kept for later reloads."""
    peak_memory_step: int = 0
    """The step in which that was, counted from 1."""
    last_memory_nbytes: int = 0
    """The same in the last step that is over."""
    held_nbytes: int = 0
    """Bytes of saved tensors in memory now."""
    num_steps: int = 0
    """Steps that are over."""
    without_nbytes: int = 0
    """An estimate of the peak of saved tensors without ssdtrain: most bytes of them alive at once."""
    peak_process_nbytes: int = 0
    """Most resident memory of this process since it began, as the system reports,"""
    without_process_nbytes: int = 0
    """and an estimate of what it would be without ssdtrain, where tensors are saved in host memory: what is not saved
    tensors, looked at whenever freed memory was given back to the system (`trim_memory`), and `without_nbytes`. 0
    before that was done."""
    peak_allocated_nbytes: int = 0
    """What PyTorch reports of the current CUDA device, `max_memory_allocated`; 0 without one."""
    peak_reserved_nbytes: int = 0
    """The same of `max_memory_reserved`."""
    staging_limit_nbytes: int = 0
    """Bound on bytes on their way out: the policy's, or more where records of an accelerator are large,"""
    prefetch_limit_nbytes: int = 0
    """and on those on their way back. One record may always be alone beyond it."""
    host_limit_nbytes: int = 0
    """The most the host tier may hold, by the memory there is now."""
    skipped: Mapping[str, Skipped] = field(default_factory=lambda: MappingProxyType({}))
    """Saved tensors left alone, by reason."""
    engine: str = ""
    """Who executes the file requests,"""
    engine_reason: str = ""
    """and why this engine."""
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
        process = nbytes_text(self.without_process_nbytes)
        without = f" (estimated without ssdtrain: {process})" if self.without_process_nbytes else ""
        device = f"; the device had {allocated} allocated, {reserved} reserved" if self.peak_reserved_nbytes else ""
        return [
            f"  the run   peak {nbytes_text(self.peak_memory_nbytes)} of saved tensors and our buffers, in step"
            f" {max(1, self.peak_memory_step)}; {nbytes_text(self.without_nbytes)} without ssdtrain (estimated)",
            f"            saved tensors alone {nbytes_text(self.peak_device_nbytes)},"
            f" staging {nbytes_text(self.peak_staging_nbytes)}, spill space {nbytes_text(self.peak_disk_nbytes)};"
            f" the process took {nbytes_text(self.peak_process_nbytes)} at most{without}{device}",
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
