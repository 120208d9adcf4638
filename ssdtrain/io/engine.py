"""What an engine is: it executes file requests between memory and spill files, in the background.

Knows addresses, files and byte counts, no tensors. `ssdtrain.io.open_engine` opens one.

    choice = open_engine("auto", ["/mnt/nvme"], 256 << 20, 4 << 20, False, None)
    choice.files[0].grow(1 << 30)
    write = choice.engine.write(0, 0, nbytes, [(address, nbytes, 0)])      # begins at once, never blocks
    write.wait_copied()                                                    # the source may change now
    read = choice.engine.read(write, 0, other_address, nbytes)             # from memory or from the file
    read.wait()

Memory of an accelerator needs a `Fence` each way, which says after what its bytes may be read or written. Its copies
run on streams: `is_issued` then says that they are queued, and `make_wait(stream)` orders a stream after them.
"""

from __future__ import annotations

from typing import Any, Protocol


class SpillFile(Protocol):
    """One preallocated file in a directory, already unlinked, for this process only.

    Where the file system has direct I/O, transfers bypass the page cache; else pages are dropped after use.
    """

    @property
    def directory(self) -> str:
        """The directory whose file system holds the bytes."""

    @property
    def fd(self) -> int:
        """The open descriptor."""

    @property
    def block_nbytes(self) -> int:
        """Alignment of offsets and lengths in the file."""

    @property
    def memory_alignment(self) -> int:
        """Alignment of the addresses that the file is read into."""

    @property
    def is_direct(self) -> bool:
        """Whether transfers bypass the page cache."""

    @property
    def direct_reason(self) -> str:
        """Why `is_direct` is what it is."""

    @property
    def nbytes(self) -> int:
        """Size so far, in whole blocks, reserved on the file system."""

    @property
    def cap_nbytes(self) -> int | None:
        """What `grow` refuses to exceed."""

    @property
    def fallocate_reason(self) -> str:
        """Empty, or why space is not reserved ahead."""

    def grow(self, nbytes: int) -> None:
        """Makes the file at least `nbytes` long.

        Raises:
            OSError: no space, or more than `cap_nbytes` (EDQUOT); the file is as before.
        """

    @property
    def user(self) -> int:
        """Which of the users of a shared engine it belongs to: 0 or 1."""

    def shrink_to_nothing(self) -> None:
        """Gives the space back; nothing in the file may be needed or in flight.

        Raises:
            OSError: the file cannot be shortened.
        """

    def close(self) -> None:
        """Gives the space back once no engine uses the file. Idempotent."""


class Fence(Protocol):
    """A point in the work of a stream of an accelerator."""

    @property
    def is_complete(self) -> bool:
        """Whether the accelerator has passed it."""

    @property
    def device_index(self) -> int:
        """Which accelerator of its kind."""

    def synchronize(self) -> None:
        """Blocks until the accelerator has passed it, without the GIL."""

    def make_wait(self, stream: int) -> None:
        """Has what is queued on `stream` later wait for it."""


class Write(Protocol):
    """A request to bring pieces of memory to an extent of a file.

    Source memory must stay readable until its piece is copied. The bytes can be read back from then on, whatever
    becomes of the write: from a slab, from memory that was rescued from a failed write, or from the file. An engine
    without slabs copies a piece by writing it; one that it can neither write nor rescue never counts as copied.
    """

    @property
    def is_issued(self) -> bool:
        """Whether every copy is done or queued on a stream: free for whoever waits in stream order."""

    @property
    def is_lost(self) -> bool:
        """Whether some source could not be read: its bytes are only there."""

    @property
    def is_copied(self) -> bool:
        """Whether every source is free."""

    @property
    def is_done(self) -> bool:
        """Whether nothing is queued or in flight: the extent may be reused when its bytes are not needed."""

    @property
    def error(self) -> tuple[int, int, int] | None:
        """(errno, offset in the file, nbytes) of the first chunk that could not be written."""

    @property
    def moments(self) -> tuple[float, float, float, float, float]:
        """When it was queued, its copy began, all was copied, its write began, it was done.

        By `time.monotonic()`; 0.0 for what has not happened, or never does: what is cancelled in time is not written.
        """

    @property
    def written_nbytes(self) -> int:
        """Bytes that went to the file, padding included."""

    @property
    def cancelled_nbytes(self) -> int:
        """Bytes of pieces that were cancelled before they were written."""

    @property
    def rescued_nbytes(self) -> int:
        """Bytes kept in memory because their write failed."""

    def is_piece_copied(self, piece: int) -> bool:
        """Whether source `piece` is not read any more: copied, or cancelled before."""

    def cancel(self, piece: int) -> None:
        """Says that `piece` is not wanted any more. Never blocks; what has begun finishes."""

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Blocks until `is_done`, without the GIL; false when the time is over first."""

    def wait_copied(self, timeout_seconds: float | None = None) -> bool:
        """Blocks until `is_copied` or `is_done`, without the GIL; false when the time is over first."""

    def wait_issued(self, timeout_seconds: float | None = None) -> bool:
        """Blocks until `is_issued` or `is_done`, without the GIL; false when the time is over first."""

    def make_wait(self, stream: int) -> None:
        """Has what is queued on `stream` from now on wait for the copies that are issued."""


class Read(Protocol):
    """A request to bring one piece back."""

    @property
    def is_done(self) -> bool:
        """Whether the destination holds the bytes, or `error` says why not."""

    @property
    def error(self) -> tuple[int, int, int, str] | None:
        """(errno, offset in the file, nbytes, message) of the first part that failed.

        EIO with "end of file", EBADMSG for a checksum that does not match, ECANCELED when the engine closed.
        """

    @property
    def moments(self) -> tuple[float, float, float]:
        """When it was queued, the drive was asked, it was done, as in `Write`; what comes from memory asks no drive."""

    @property
    def read_nbytes(self) -> int:
        """Bytes that came from the file, padding included."""

    @property
    def forwarded_nbytes(self) -> int:
        """Bytes that came from memory."""

    @property
    def is_issued(self) -> bool:
        """Whether the bytes are there for whoever waits in stream order, or `error` says why not."""

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Blocks until `is_done`, without the GIL; false when the time is over first."""

    def wait_issued(self, timeout_seconds: float | None = None) -> bool:
        """Blocks until `is_issued`, without the GIL; false when the time is over first."""

    def expedite(self) -> None:
        """From now on it is served before reads that nobody waits for. Both waits imply it."""

    def make_wait(self, stream: int) -> None:
        """Has what is queued on `stream` from now on wait for the copies that are issued."""


Direction = tuple[int, float, int, float]
"""Bytes; seconds with a transfer at the drive; and the same of periods without a pause in which the drive was busy for
a quarter of a second or more: that was no mere burst."""


Copies = tuple[int, float]
"""Bytes, and seconds in which their stream was copying."""


class Engine(Protocol):
    """Moves bytes between memory and spill files, in the background. Thread-safe; unusable in a forked child."""

    @property
    def kind(self) -> str:
        """One of `KINDS` but ``"auto"``."""

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""

    @property
    def notes(self) -> list[str]:
        """What works less well than it could, as sentences."""

    @property
    def registered_buffers(self) -> bool:
        """Whether the kernel knows the staging memory ahead."""

    @property
    def host_nbytes(self) -> int:
        """Limit of the host tier, for which it has addresses; 0 for an engine without one."""

    @property
    def staging_nbytes(self) -> int:
        """Staging memory: whole slabs; 0 for an engine without them."""

    @property
    def slab_nbytes(self) -> int:
        """Size of a slab, and of the largest file request."""

    @property
    def staging_in_use_nbytes(self) -> int:
        """Slabs on loan now."""

    @property
    def peak_staging_nbytes(self) -> int:
        """The most `staging_in_use_nbytes` so far."""

    @property
    def num_events(self) -> int:
        """Grows whenever a piece is copied, a write is done or a read is done."""

    @property
    def inflight_nbytes(self) -> int:
        """Extent bytes of writes that are not done."""

    @property
    def written_nbytes(self) -> int:
        """Bytes written to the files."""

    @property
    def read_nbytes(self) -> int:
        """Bytes read from the files."""

    @property
    def num_retries(self) -> int:
        """Failed operations that were tried again."""

    @property
    def num_write_errors(self) -> int:
        """Chunks that could not be written."""

    @property
    def num_read_errors(self) -> int:
        """Parts that could not be read."""

    @property
    def rescued_nbytes(self) -> int:
        """Heap memory that holds the bytes of failed writes now."""

    @property
    def write_busy_seconds(self) -> float:
        """Wall time with at least one file write in flight."""

    @property
    def read_busy_seconds(self) -> float:
        """Wall time with at least one file read in flight."""

    def silent_seconds(self, file: int) -> float:
        """How long the drive has owed an answer for files[`file`] and has given none at all; 0.0 while it owes none.

        A drive that is only slow answers now and then, and what waits for its turn is owed nothing yet.
        """

    def traffic(self, user: int) -> tuple[Direction, Direction]:
        """What was written to one user's files, and what was read from them."""

    def copies(self) -> tuple[Copies, Copies]:
        """What was copied out of accelerators to slabs and the host tier, and what was copied in from there."""

    def add_device(self, driver: Any) -> str:
        """Gets ready for fences of an accelerator's driver. Empty, or why its copies are slow.

        Raises:
            RuntimeError: this engine moves host memory only.
        """

    def grow_staging(self, nbytes: int) -> str:
        """Uses at least `nbytes` for slabs, as far as there are. Empty, or why they are not pinned."""

    def grow_host(self, nbytes: int) -> str:
        """Makes the host tier at least `nbytes` long. Empty, or why it is not pinned."""

    def write(
        self,
        file: int,
        offset: int,
        nbytes: int,
        pieces: list[tuple[int, int, int]],
        producer: Fence | None = None,
    ) -> Write:
        """Begins to write `pieces` to bytes [`offset`, `offset` + `nbytes`) of files[`file`]. Never blocks.

        Args:
            file: index of the file; one more than the last is the host tier, where bytes stay in memory.
            offset: start of the extent, in whole blocks.
            nbytes: length of the extent, in whole blocks, inside `SpillFile.nbytes`.
            pieces: (source address, nbytes, offset in the extent), sorted, apart, each offset in whole blocks.
            producer: the fence after which sources in an accelerator's memory may be read.
        """

    def read(self, write: Any, piece: int, address: int, capacity: int, ready: Fence | None = None) -> Read:
        """Begins to bring one issued, not cancelled piece of `write` to `address`. Never blocks.

        Args:
            write: what this engine's `write` returned.
            piece: index of the piece.
            address: a multiple of the file's `memory_alignment`.
            capacity: writable bytes there: the piece in whole blocks, or more.
            ready: the fence after which `address`, in an accelerator's memory, may be written.
        """

    def wait_inflight(self, max_nbytes: int, timeout_seconds: float | None = None) -> bool:
        """Blocks until `inflight_nbytes` <= `max_nbytes`, without the GIL; false when the time is over first."""

    def wait_idle(self, timeout_seconds: float | None = None) -> bool:
        """Blocks until nothing is queued or in flight, without the GIL; false when the time is over first."""

    def drain(self) -> None:
        """Blocks until nothing is queued or in flight."""

    def close(self) -> None:
        """Gives up what has not begun, waits for what has, frees threads and memory. Idempotent."""
