"""One object per offloaded range of bytes: where they are, and who still needs them.

The record of a parameter, a gradient or optimizer state lives as long as its owner, and is written anew whenever that
has changed. A `SavedRecord` is created when autograd saves a tensor of a storage range nobody filed yet, is shared by
all saved tensors of that range, and is released when the last of their handles is gone. Only what moves a record
changes its residency.

[Note: the end of a handle]
A handle dies wherever autograd lets go of it, so a signal (Ctrl-C, SIGTERM, an alarm) is often answered just there, by
the first line of Python that the main thread comes to. Whatever a `__del__` raises, Python prints and drops, also what
a signal's handler raises as it begins: the loop would run on. So handles have none. Each owns a generator that waits
within `try`, which Python ends when it is collected: what comes up there is caught, and raised by the next hook. One
that calls nothing there answers no signal.
"""

from __future__ import annotations

import enum
import weakref
from collections import deque
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch

from ssdtrain.store.identity import ViewSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch.multiprocessing.reductions import StorageWeakRef

    from ssdtrain.devices.base import Device
    from ssdtrain.io.engine import Read
    from ssdtrain.stats import Counters
    from ssdtrain.store.pending import PendingRead, Segment
    from ssdtrain.tracing.pass_trace import PassTrace


class Residency(enum.IntEnum):
    """Where a record's bytes are: one at a time."""

    DEVICE = 1
    """In memory of its owner, or held by the record: not sent yet, kept, or back."""
    OFFLOADING = 2
    """With the engine: the source is held until it is copied, after that the bytes are in slabs or in the file."""
    DISK = 4
    """In the spill file (or, after a failed write, rescued by the engine)."""
    HOST = 8
    """In the host tier: pinned memory that holds it until backward wants it."""
    RELOADING = 16
    """A read into fresh memory of the record is under way."""
    RELEASED = 32
    """Nobody needs the bytes any more."""
    SHARED = 64
    """A reload has brought it, and autograd alone holds what that brought; it is in the spill file or host tier too."""


_NEXT: dict[int, int] = {
    Residency.DEVICE: Residency.OFFLOADING | Residency.SHARED | Residency.RELEASED | Residency.DEVICE,
    Residency.OFFLOADING: Residency.DEVICE
    | Residency.OFFLOADING
    | Residency.DISK
    | Residency.HOST
    | Residency.RELOADING
    | Residency.RELEASED,
    Residency.DISK: Residency.DEVICE | Residency.OFFLOADING | Residency.RELOADING | Residency.RELEASED,
    Residency.HOST: Residency.DEVICE | Residency.OFFLOADING | Residency.RELOADING | Residency.RELEASED,
    Residency.RELOADING: Residency.DEVICE | Residency.DISK | Residency.HOST | Residency.RELEASED,
    Residency.SHARED: Residency.DISK | Residency.HOST | Residency.RELEASED,
    Residency.RELEASED: 0,
}


class Record:
    """Bytes that move as one: of a saved activation, a parameter, a gradient, or optimizer state.

    What moves it guards its attributes with its lock.
    """

    __slots__ = ("__weakref__", "_name", "nbytes", "residency", "segments", "start", "storage")

    holds_source = False  # whether it holds what it is written from until that is copied

    def __init__(self, name: str, nbytes: int = 0) -> None:
        """Its bytes are in its owner's memory, and were never written."""
        self._name = name
        self.nbytes = nbytes
        self.start = 0  # its first byte in the storage that it is written from
        self.residency = Residency.DEVICE
        self.storage: torch.UntypedStorage | None = None  # memory of its own that has the bytes
        self.segments: tuple[Segment, ...] = ()  # where they went

    @property
    def name(self) -> str:
        """For messages."""
        return self._name

    @property
    def is_filled(self) -> bool:
        """Whether it was ever written."""
        return bool(self.segments) or self.storage is not None

    @property
    def offset(self) -> int:
        """Where its bytes begin in the memory that holds them."""
        return self.start

    @property
    def is_copied(self) -> bool:
        """Whether the memory it was written from may be changed."""
        return self.storage is None and all([segment.write.is_copied for segment in self.segments])

    @property
    def home(self) -> Residency:
        """Where its segments are."""
        return Residency.HOST if self.segments[0].is_in_host else Residency.DISK

    def move(self, residency: Residency) -> None:
        """Changes the residency; an impossible change is a bug here, never the user's."""
        assert residency & _NEXT[self.residency], f"{self.name}: {self.residency} -> {residency}"
        self.residency = residency


class SavedRecord(Record):
    """One storage range that autograd has saved."""

    holds_source = True

    __slots__ = (
        "device",
        "epoch",
        "identity",
        "index",
        "is_handed_over",
        "is_prefetched",
        "is_unpacked",
        "is_wanted",
        "num_handles",
        "num_unseen",
        "pass_",
        "pending_read",
        "prefers_host",
        "probe",
        "queued_reads",
        "spec",
        "spot",
        "storage_nbytes",
        "stream",
        "task",
        "version",
        "weak",
        "where",
    )

    def __init__(
        self,
        storage: torch.UntypedStorage,
        identity: StorageWeakRef,
        span: tuple[int, int],
        device: Device,
        pass_: PassTrace,
    ) -> None:
        """A record of bytes `span` of `storage`, which it holds until they are safe elsewhere."""
        self.start, end = span  # not by `super`, which costs a call
        self.nbytes = end - self.start
        self.residency = Residency.DEVICE
        self.segments = ()
        self.device = device
        self.stream = (
            0 if device.driver is None else device.current_stream()
        )  # that last allocated, or used first, the memory that holds the bytes
        self.storage = storage
        self.storage_nbytes: int = storage.nbytes()
        self.identity = identity  # of the source, for as long as the record is filed under its address
        self.weak = identity  # of the memory that last held the bytes: the source, or the latest reload
        self.version: int  # at the save, and
        self.probe: torch.Tensor  # a tensor that shares the counter
        self.pending_read: PendingRead | None = None  # under way
        self.queued_reads: Sequence[Read] = ()  # that have brought memory of an accelerator, and may still copy
        self.pass_ = pass_
        self.index = pass_.append(self)
        self.spot = pass_.spot
        self.spec: ViewSpec | None = None  # of the tensor it was made for, and where in the model: for messages
        self.where = ""
        self.num_handles = 0
        self.epoch = 0  # grows with every reload
        self.num_unseen = 0  # handles not unpacked since then
        self.prefers_host = False  # goes to the host tier while there is room
        self.is_wanted = False  # in memory or soon, and is not offloaded any more
        self.is_unpacked = False  # backward has asked for it,
        self.task = -1  # last in this graph task
        self.is_prefetched = False
        self.is_handed_over = False  # its memory is for whoever unpacked it last, who may use it after it is released

    @property
    def offset(self) -> int:
        """Where its bytes begin in the memory that holds them: the source, or what a reload brought."""
        return 0 if self.epoch else self.start

    @property
    def name(self) -> str:
        """``record 3 (float32[8, 512] of h.0.mlp), 16384 bytes``."""
        return f"record {self.index} ({self.spec}{self.where}), {self.nbytes} bytes"


class Resident:
    """Handle of a saved tensor that stays in memory: keeps it, its version, and the account of held bytes."""

    __slots__ = ("life", "tensor", "version")

    def __init__(self, tensor: torch.Tensor, nbytes: int, counters: Counters) -> None:
        """Holds the tensor's memory, `nbytes` of which were added to `counters`."""
        self.life = None
        if nbytes:
            self.life = _held(nbytes, counters)
            next(self.life)
        # The object itself, as without hooks: it may carry attributes, and ZeRO-3 frees a parameter's memory by giving
        # it other data, which an alias would hold. Of what has a node an alias: an operator's own output would keep
        # that node alive, and autograd makes a new object of it anyway.
        self.tensor = tensor if tensor.is_leaf else tensor.detach()
        self.version = tensor._version


def _held(nbytes: int, counters: Counters) -> Iterator[None]:
    """Takes the bytes off the account when the handle dies. See [Note: the end of a handle]."""
    try:
        yield
    finally:
        counters.held_nbytes -= nbytes
        counters.resident_nbytes -= nbytes


class Releases:
    """What handles leave when they die, on any thread. See [Note: the end of a handle]."""

    __slots__ = ("interruptions", "notes")

    def __init__(self) -> None:
        """Nothing yet."""
        self.notes: deque[list[Any]] = deque()  # record, and the reload that the handle was unpacked in last
        self.interruptions: list[tuple[int, BaseException]] = []  # and the thread

    def raise_interruption(self) -> None:
        """Raises what a handler of a signal raised in this thread while a handle died."""
        for entry in self.interruptions:
            if entry[0] == get_ident():
                self.interruptions.remove(entry)
                try:
                    raise entry[1] from None
                finally:
                    del entry  # which the error would hold by this frame, and itself


def _noted(releases: Releases, look_after: Callable[[SavedRecord], None], note: list[Any]) -> Iterator[None]:
    """Leaves a note when the handle dies."""
    try:
        yield
    finally:
        try:
            releases.notes.append(note)
            look_after(note[0])
        except BaseException as error:
            error.__context__ = None  # nor anything else that keeps frames
            releases.interruptions.append((get_ident(), error.with_traceback(None)))


class Handle:
    """What autograd holds for one saved tensor that may be offloaded. When it dies, the record learns of it."""

    __slots__ = ("life", "note", "probe", "record", "source", "spec", "task", "version")

    def __init__(
        self,
        record: SavedRecord,
        tensor: torch.Tensor,
        spec: ViewSpec,
        probe: torch.Tensor,
        version: int,
        releases: Releases,
        look_after: Callable[[SavedRecord], None],
    ) -> None:
        """Keeps nothing of `tensor` alive, and knows the object where autograd gives it back: without grad.

        When autograd lets go `releases` has a note, and `look_after(record)` is called; it must not block.
        """
        self.record = record
        self.spec = spec
        self.probe = probe
        self.version = version
        self.task = -1  # the graph task that it was unpacked in last
        self.note: list[Any] = [record, -1]  # the reload that it was unpacked in last
        self.source = None if tensor.requires_grad else weakref.ref(tensor)
        self.life = _noted(releases, look_after, self.note)
        next(self.life)

    @property
    def epoch(self) -> int:
        """The reload that it was unpacked in last; -1 before the first."""
        epoch: int = self.note[1]
        return epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.note[1] = epoch
