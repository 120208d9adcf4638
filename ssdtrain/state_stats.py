"""Counters of offloaded parameters or optimizer state, and the readable snapshot users print.

Sizes are bytes, times seconds. Nothing here knows where the numbers come from.
"""

from __future__ import annotations

import copy
import html
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from ssdtrain.stats import EngineTotals, Skipped, nbytes_text, rate_text


class StateCounters:
    """Running totals of a user of a store, or of the store; attributes are the fields of `StateStats`."""

    def __init__(self, what: str) -> None:
        """`what`: the word for what is away, such as ``"parameters"``."""
        self.what = what
        self.away_nbytes = self.num_away = 0
        self.num_prefetched = self.num_demand_reads = self.num_steps = 0
        self.written_nbytes = self.read_nbytes = 0
        self.write_busy_seconds = self.read_busy_seconds = 0.0
        self.peak_memory_nbytes = self.peak_disk_nbytes = self.peak_host_nbytes = 0
        self.waits: dict[str, float] = {}
        self.stays: dict[str, list[int]] = {}
        self.fallbacks: list[str] = []
        self.engine = self.engine_reason = ""

    def copy(self) -> StateCounters:
        """A snapshot."""
        other = copy.copy(self)
        other.waits, other.fallbacks = dict(self.waits), list(self.fallbacks)
        other.stays = {reason: list(entry) for reason, entry in self.stays.items()}
        return other

    def add_engine(self, engine: EngineTotals) -> None:
        """Adds what one engine did from open to close."""
        self.written_nbytes += engine.written_nbytes
        self.read_nbytes += engine.read_nbytes
        self.write_busy_seconds += engine.write_busy_seconds
        self.read_busy_seconds += engine.read_busy_seconds

    def add_drive(self, drive: StateCounters) -> None:
        """Takes over what a store has counted for all of its users."""
        for name in ("written_nbytes", "read_nbytes", "write_busy_seconds", "read_busy_seconds"):
            setattr(self, name, getattr(self, name) + getattr(drive, name))
        self.peak_memory_nbytes, self.peak_disk_nbytes = drive.peak_memory_nbytes, drive.peak_disk_nbytes
        self.peak_host_nbytes = drive.peak_host_nbytes
        self.waits, self.fallbacks = dict(drive.waits), list(drive.fallbacks)
        self.engine, self.engine_reason = drive.engine, drive.engine_reason

    def offload(self, nbytes: int, num: int = 1) -> None:
        """Counts a tensor whose place is the drive from now on, or, negative, is not any more."""
        self.num_away += num
        self.away_nbytes += nbytes

    def keep(self, reason: str, nbytes: int, num: int = 1) -> None:
        """Counts a tensor that stays in memory, or, negative, does not any more."""
        entry = self.stays.setdefault(reason, [0, 0])
        entry[0] += num
        entry[1] += nbytes
        if not entry[0]:
            del self.stays[reason]

    def wait(self, direction: str, seconds: float) -> None:
        """Charges waiting time to reads or writes."""
        self.waits[direction] = self.waits.get(direction, 0.0) + seconds

    def saw(self, *, memory_nbytes: int = 0, disk_nbytes: int = 0, host_nbytes: int = 0) -> None:
        """Moves the peaks."""
        self.peak_host_nbytes = max(self.peak_host_nbytes, host_nbytes)
        self.peak_memory_nbytes = max(self.peak_memory_nbytes, memory_nbytes)
        self.peak_disk_nbytes = max(self.peak_disk_nbytes, disk_nbytes)

    def fall_back(self, text: str) -> bool:
        """Notes once why something did not go the best way; whether it is news."""
        is_news = text not in self.fallbacks
        if is_news:
            self.fallbacks.append(text)
        return is_news


@dataclass(frozen=True)
class StateStats:
    """What an offload of parameters or optimizer state did and cost, up to the moment of the snapshot."""

    what: str
    """What it is about: ``"parameters"`` or ``"optimizer state"``."""
    num_away: int
    """Tensors whose place is the drive."""
    away_nbytes: int
    """Their bytes."""
    num_steps: int
    """Optimizer steps, or forward passes of the module."""
    num_prefetched: int
    """Reads begun before they were needed."""
    num_demand_reads: int
    """Reads begun when they were needed: each one is a wait."""
    written_nbytes: int
    """Bytes written to the spill files, padding included."""
    read_nbytes: int
    """Bytes read back."""
    write_busy_seconds: float
    """Time with at least one write at the drive."""
    read_busy_seconds: float
    """Time with at least one read at the drive."""
    wait_seconds: float
    """Time the training thread waited for the drive, both directions."""
    waits: Mapping[str, float]
    """The same by direction."""
    peak_memory_nbytes: int
    """Most memory of bytes on their way at once, staging included."""
    peak_disk_nbytes: int
    """Most spill space in use at once."""
    peak_host_nbytes: int
    """Most bytes in the host tier at once."""
    stays: Mapping[str, Skipped] = field(default_factory=lambda: MappingProxyType({}))
    """Tensors that stay in memory, by reason; of optimizer state since the last step."""
    engine: str = ""
    """Who executes the file requests."""
    engine_reason: str = ""
    """Why this engine."""
    fallbacks: tuple[str, ...] = ()
    """Everything that did not go the best way, with its reason."""

    @classmethod
    def of(cls, totals: StateCounters) -> StateStats:
        """The public view of the counters."""
        special = {"stays", "waits", "wait_seconds", "fallbacks"}
        plain = {f.name: getattr(totals, f.name) for f in fields(cls) if f.name not in special}
        return cls(
            **plain,
            stays=MappingProxyType({reason: Skipped(*entry) for reason, entry in totals.stays.items()}),
            waits=MappingProxyType(totals.waits),
            wait_seconds=sum(totals.waits.values()),
            fallbacks=tuple(totals.fallbacks),
        )

    def as_dict(self) -> dict[str, Any]:
        """The same as plain types, for JSON."""
        stays = {reason: vars(entry).copy() for reason, entry in self.stays.items()}
        return vars(self) | {"stays": stays, "waits": dict(self.waits), "fallbacks": list(self.fallbacks)}

    def __repr__(self) -> str:
        away = f"{nbytes_text(self.away_nbytes)} of {self.what} offloaded in {self.num_away} tensors"
        return f"StateStats({away}, {self.num_steps} steps, {self.wait_seconds:.3f} s waited)"

    def _repr_html_(self) -> str:
        """For notebooks."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        """One screen: what it did, what it cost, what stayed."""
        lines = [
            f"ssdtrain: {nbytes_text(self.away_nbytes)} of {self.what} on the drive, {self.num_away} tensors",
            f"  memory    at most {nbytes_text(self.peak_memory_nbytes)} on its way,"
            f" spill space {nbytes_text(self.peak_disk_nbytes)}"
            + (f", host tier {nbytes_text(self.peak_host_nbytes)}" if self.peak_host_nbytes else ""),
            f"  drive     wrote {rate_text(self.written_nbytes, self.write_busy_seconds)},"
            f" read {rate_text(self.read_nbytes, self.read_busy_seconds)}",
            f"  cost      {self.wait_seconds:.3f} s waited"
            + "".join(f", {direction} {seconds:.3f} s" for direction, seconds in self.waits.items())
            + f"; {self.num_prefetched} reads prefetched, {self.num_demand_reads} on demand",
            f"  engine    {self.engine or 'not opened'}{': ' + self.engine_reason if self.engine_reason else ''}",
        ]
        for reason, stayed in sorted(self.stays.items(), key=lambda item: -item[1].nbytes):
            lines.append(f"  in memory {stayed.count} x {reason} ({nbytes_text(stayed.nbytes)})")
        lines += [f"  fallback  {text}" for text in self.fallbacks]
        return "\n".join(lines)
