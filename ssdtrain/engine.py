"""The engines: what executes file requests, and which one this machine can run.

Knows addresses, files and byte counts, no tensors. Four engines share one interface: ``io_uring`` and ``threads``
(C++, `ssdtrain._C`), ``python`` (`ssdtrain._python_engine`) and ``kvikio`` (`ssdtrain._kvikio_engine`), which takes
device memory too. This is the only file that imports them.

    choice = open_engine("auto", ["/mnt/nvme"], 256 << 20, 4 << 20, False, None)
    choice.files[0].grow(1 << 30)
    write = choice.engine.write(0, 0, nbytes, [(address, nbytes, 0)])      # begins at once, never blocks
    write.wait_copied()                                                    # the source may change now
    read = choice.engine.read(write, 0, other_address, nbytes)             # from memory or from the file
    read.wait()
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, Protocol

from ssdtrain import _kvikio_engine, _python_engine
from ssdtrain._kvikio_engine import GpuDirect
from ssdtrain._kvikio_engine import probe as gpudirect
from ssdtrain._python_engine import Fence

KINDS = ("auto", "io_uring", "threads", "python", "kvikio")
_ANYWHERE = ("io_uring", "threads", "python")

__all__ = ["KINDS", "Engine", "EngineChoice", "Fence", "GpuDirect", "Read", "SpillFile", "Write", "gpudirect"]


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

    def close(self) -> None:
        """Gives the space back once no engine uses the file. Idempotent."""


class Write(Protocol):
    """A request to bring pieces of memory to an extent of a file.

    Source memory must stay readable until its piece is copied. The bytes can be read back from then on, whatever
    becomes of the write: from a slab, from memory that was rescued from a failed write, or from the file. An engine
    without slabs copies a piece by writing it; one that it can neither write nor rescue never counts as copied.
    """

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

    def wait(self) -> None:
        """Blocks until `is_done`, without the GIL."""

    def wait_copied(self) -> None:
        """Blocks until `is_copied` or `is_done`, without the GIL."""


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
    def read_nbytes(self) -> int:
        """Bytes that came from the file, padding included."""

    @property
    def forwarded_nbytes(self) -> int:
        """Bytes that came from memory."""

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Blocks until `is_done`, without the GIL; false when the time is over first."""


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
            file: index of the file.
            offset: start of the extent, in whole blocks.
            nbytes: length of the extent, in whole blocks, inside `SpillFile.nbytes`.
            pieces: (source address, nbytes, offset in the extent), sorted, apart, each offset in whole blocks.
            producer: for device memory (kvikio only), what has to be over before the pieces are read.
        """

    def read(self, write: Any, piece: int, address: int, capacity: int, ready: Fence | None = None) -> Read:
        """Begins to bring one copied, not cancelled piece of `write` to `address`. Never blocks.

        Args:
            write: what this engine's `write` returned.
            piece: index of the piece.
            address: a multiple of the file's `memory_alignment`.
            capacity: writable bytes there: the piece in whole blocks, or more.
            ready: for device memory (kvikio only), what has to be over before it is written.
        """

    def wait_inflight(self, max_nbytes: int, timeout_seconds: float | None = None) -> bool:
        """Blocks until `inflight_nbytes` <= `max_nbytes`, without the GIL; false when the time is over first."""

    def drain(self) -> None:
        """Blocks until nothing is queued or in flight."""

    def close(self) -> None:
        """Gives up what has not begun, waits for what has, frees threads and memory. Idempotent."""


@dataclass(frozen=True)
class EngineChoice:
    """An open engine, its files and why it is this one."""

    engine: Engine
    files: Sequence[SpillFile]
    kind: str
    reason: str
    fallbacks: list[str] = field(default_factory=list)

    def shortcomings(self) -> list[str]:
        """What works, but not the best way."""
        texts = list(self.engine.notes)
        for file in self.files:
            reasons = [] if file.is_direct else [file.direct_reason]
            texts += [f"{file.directory}: {why}" for why in (*reasons, file.fallocate_reason) if why]
        return texts

    def close(self) -> None:
        """Ends the engine and gives the spill space back."""
        self.engine.close()
        for file in self.files:
            file.close()


@dataclass(frozen=True)
class _Request:
    places: Sequence[str | SpillFile]
    staging_nbytes: int
    slab_nbytes: int
    checksum: bool
    disk_nbytes: int | None

    def files(self, make: Callable[[str, int | None], SpillFile]) -> list[SpillFile]:
        """The files as they are, or one new file per directory, which share `disk_nbytes` evenly."""
        cap = None if self.disk_nbytes is None else self.disk_nbytes // len(self.places)
        return [make(place, cap) if isinstance(place, str) else place for place in self.places]


def open_engine(
    kind: str,
    files_or_directories: Sequence[str | SpillFile],
    staging_nbytes: int,
    slab_nbytes: int,
    checksum: bool = False,
    disk_nbytes: int | None = None,
    device_index: int | None = None,
) -> EngineChoice:
    """Opens the engine asked for, or with ``"auto"`` the best that works here, on files or on new files.

    Args:
        kind: one of `KINDS`. ``"auto"`` tries io_uring, then threads, then python; for device memory it takes kvikio
            instead where GPUDirect is real and measured faster.
        files_or_directories: open spill files of the engine's own kind, or directories to open them in.
        staging_nbytes: memory for slabs; allocated now.
        slab_nbytes: size of a slab, a multiple of 4096.
        checksum: verify every byte that is read from a file.
        disk_nbytes: bound on all files together; None for no bound.
        device_index: the GPU whose memory travels; None for host memory.

    Raises:
        ValueError: `kind` is unknown, or the sizes do not fit together.
        OSError: a directory cannot hold a spill file.
        RuntimeError: the engine asked for by name does not work here.
    """
    if kind not in KINDS:
        raise ValueError(f"Expected an engine among {', '.join(KINDS)}, got {kind!r}")
    request = _Request(list(files_or_directories), staging_nbytes, slab_nbytes, checksum, disk_nbytes)
    names, preference = _names(kind, request, device_index)
    fallbacks: list[str] = []
    for name in names:
        try:
            engine, files = _open(name, request)
        except _UnavailableError as unavailable:
            _give_up_if_named(kind, unavailable)
            fallbacks.append(f"engine {name} is not available: {unavailable}")
            continue
        reasons = ["asked for by name"] if kind == name else fallbacks or ["the fastest, and it works here"]
        if isinstance(engine, _kvikio_engine.KvikioEngine) and not preference:
            preference = engine.gpudirect.sentence
        return EngineChoice(engine, files, name, "; ".join(filter(None, [*reasons, preference])), fallbacks)
    raise AssertionError("the python engine is always available")


def _names(kind: str, request: _Request, device_index: int | None) -> tuple[tuple[str, ...], str]:
    """The engines to try in turn, and why kvikio is among the automatic ones or not."""
    if kind != "auto":
        return (kind,), ""
    directories = tuple(place for place in request.places if isinstance(place, str))
    if device_index is None or len(directories) < len(request.places):
        return _ANYWHERE, ""
    is_better, why = _kvikio_engine.pays(directories, device_index, open_engine)
    return (("kvikio", *_ANYWHERE), why) if is_better else (_ANYWHERE, f"kvikio is not preferred: {why}")


class _UnavailableError(Exception):
    """The engine cannot run here; the message says why."""


def _give_up_if_named(kind: str, unavailable: _UnavailableError) -> None:
    if kind == "auto":
        return
    others = " or ".join(f"engine={name!r}" for name in KINDS[1:] if name != kind)
    raise RuntimeError(
        f"Expected engine {kind!r} to be available, got: {unavailable}; use engine='auto' or {others}"
    ) from unavailable


def _open(name: str, request: _Request) -> tuple[Engine, list[SpillFile]]:
    make_file: Any
    make: Any
    if name == "python":
        files = request.files(_python_engine.SpillFile)
        return _python_engine.PythonEngine(files, request.staging_nbytes, request.slab_nbytes, request.checksum), files
    if name == "kvikio":
        make_file, make = _kvikio_engine.SpillFile, _kvikio_engine.KvikioEngine
    else:
        extension = _extension()
        make_file, make = extension.SpillFile, partial(extension.Engine, name)
    files = request.files(make_file)
    try:
        return make(files, request.staging_nbytes, request.slab_nbytes, request.checksum), files
    except (OSError, RuntimeError, TypeError) as error:
        for file, place in zip(files, request.places, strict=True):
            if file is not place:
                file.close()
        raise _UnavailableError(str(error)) from error


def _extension() -> ModuleType:
    if os.environ.get("SSDTRAIN_NO_CPP", "0") not in ("", "0"):
        raise _UnavailableError("SSDTRAIN_NO_CPP is set")
    try:
        from ssdtrain import _C
    except ImportError as error:
        raise _UnavailableError(
            f"the extension ssdtrain._C does not import ({error}); reinstall ssdtrain without SSDTRAIN_NO_CPP"
        ) from error
    return _C
