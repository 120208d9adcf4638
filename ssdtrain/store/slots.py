"""What a vault keeps account of: where the bytes of a tensor are, and a tensor on its way back.

Knows segments and storages; moves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ssdtrain.devices.base import Device
from ssdtrain.store.pending import PendingRead, Segment, hand_out


@dataclass(eq=False)
class Slot:
    """Where the bytes of one tensor are."""

    name: str
    nbytes: int = 0
    parts: Sequence[Segment] = field(default_factory=list)
    kept: torch.UntypedStorage | None = None  # the drive has no room, or not the bytes: they stay in memory

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
    pending: PendingRead | None  # None: the slot never left

    def use(self) -> None:
        """The current stream uses the memory from here on, after the copies into it."""
        if self.pending is not None and self.device.driver is not None:
            hand_out(self.pending.memory.storage, self.device, self.pending.stream, self.pending.reads)
