"""What a planner reads: one recorded step, and what the machine can do meanwhile. Plain numbers only.

Seconds count from the beginning of the step and are compute time: nothing in them waited for a drive. Sizes are bytes,
bandwidths bytes per second.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass


class Where(enum.IntEnum):
    """Where a record spends the time between its save and its use."""

    KEEP = 0
    HOST = 1
    DISK = 2


@dataclass(frozen=True)
class Lifetime:
    """One record of a step."""

    nbytes: int
    """Size."""
    saved: float
    """When it was complete: a write may begin."""
    needed: float
    """When backward first asked for it: a reload must be over. Infinite when backward never did."""
    released: float
    """When the graph let it go."""
    micro_batch: int = 0
    """Which forward pass of the step saved it."""
    module: str = ""
    """Where in the model, for people."""
    num_aliases: int = 1
    """Saved tensors that share it."""


@dataclass(frozen=True)
class Step:
    """One recorded step: its records in the order they were saved."""

    records: tuple[Lifetime, ...]
    seconds: float
    """Compute time of the step."""
    other: tuple[tuple[float, int], ...] = ()
    """Memory that no placement changes: from each of these seconds on, so many bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return sum(record.nbytes for record in self.records)


@dataclass(frozen=True)
class Tier:
    """One place to send records to, with a channel of its own in each direction."""

    write_bandwidth: float
    read_bandwidth: float
    capacity_nbytes: float = math.inf
    """Room; a record takes it from its save to its release."""


@dataclass(frozen=True)
class Machine:
    """The tiers there are and the bounds within which they are used."""

    disk: Tier | None
    host: Tier | None = None
    staging_nbytes: float = math.inf
    """Bound on bytes on their way to the drive; a larger record may go alone."""
    prefetch_nbytes: float = math.inf
    """Bound on bytes reloaded, or being reloaded, and not asked for yet; but for 0, one record may be alone beyond."""
    idle_nbytes: float = 0.0
    """Most memory of released reloads that is kept for later ones of the same size."""
    max_written_nbytes: float = math.inf
    """What the drive's endurance allows to write per step."""

    def tiers(self) -> dict[Where, Tier]:
        """The tiers by place."""
        found = {Where.HOST: self.host, Where.DISK: self.disk}
        return {where: tier for where, tier in found.items() if tier is not None}
