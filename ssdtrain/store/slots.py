"""What a vault keeps account of: where bytes are, and what is on its way in or out.

Knows requests, extents and storages; moves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ssdtrain.devices.base import Allocation, Device
from ssdtrain.io.engine import Read, Write
from ssdtrain.io.space import Extent


@dataclass(frozen=True)
class Part:
    """Bytes [`start`, ...) of a slot: one write, and the extent it went to."""

    write: Write
    extent: Extent
    start: int


@dataclass(eq=False)
class Slot:
    """Where the bytes of one tensor are."""

    name: str
    nbytes: int = 0
    parts: list[Part] = field(default_factory=list)
    kept: torch.UntypedStorage | None = None  # the drive has no room: the bytes stay in memory

    @property
    def is_filled(self) -> bool:
        """Whether it was ever written."""
        return bool(self.parts) or self.kept is not None

    @property
    def is_copied(self) -> bool:
        """Whether the memory it was written from may be changed."""
        return self.kept is None and all([part.write.is_copied for part in self.parts])


@dataclass(eq=False)
class Arrival:
    """A slot on its way back."""

    slot: Slot
    device: Device
    memory: Allocation | None  # None: the slot never left
    stream: int
    parts: tuple[Part, ...] = ()  # what is read
    reads: list[Read] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether nothing is being read to its memory."""
        return len(self.reads) >= len(self.parts) and all([read.is_done for read in self.reads])


@dataclass(eq=False)
class Departure:
    """Memory an engine may be reading."""

    source: torch.UntypedStorage | None
    extent: Extent
    write: Write | None = None
    dead: Extent | None = None  # not needed any more, free when the write is over

    @property
    def is_done(self) -> bool:
        """Whether the write is over."""
        return self.write is not None and self.write.is_done
