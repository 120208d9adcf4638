"""An engine's face: checks requests and hands them to the workers."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

from .requests import Chunk, Part, Piece, Pool, Read, Write
from .spill_file import File, Owned, round_up
from .worker import Core, Fence, FetchJob, Workers

_PAGE_NBYTES = 4096
_EXIT_SECONDS = 1.0  # for a file that does not answer, at the end of the process


def _check_pieces(pieces: Iterable[Piece], extent_nbytes: int, block: int) -> None:
    least = 0
    for piece in pieces:
        end = piece.offset + piece.nbytes
        if piece.nbytes <= 0 or piece.offset < least or piece.offset % block != 0 or end > extent_nbytes:
            raise ValueError(
                f"Expected pieces of at least one byte, sorted, apart, each at a multiple of {block} bytes inside "
                f"the extent of {extent_nbytes}, got {piece.nbytes} bytes at {piece.offset}"
            )
        least = end
    if least == 0:
        raise ValueError("Expected at least one piece, got none")


def check_sizes(files: list[File], staging_nbytes: int, slab_nbytes: int) -> None:
    if not files:
        raise ValueError("Expected at least one spill file, got none")
    for step in (_PAGE_NBYTES, *(file.block_nbytes for file in files)):
        if slab_nbytes <= 0 or slab_nbytes % step != 0:
            raise ValueError(f"Expected slab_nbytes to be a multiple of {step}, got {slab_nbytes}")
    if staging_nbytes < slab_nbytes:
        raise ValueError(f"Expected staging_nbytes to hold one slab of {slab_nbytes} bytes, got {staging_nbytes}")


class BaseEngine(Owned):
    """Checks, counters and endings, whoever moves the bytes."""

    registered_buffers = False

    def __init__(self, core: Workers, slab_nbytes: int, num_threads: int) -> None:
        super().__init__()
        self.slab_nbytes = slab_nbytes
        self.notes: list[str] = []
        self._workers = core
        self._monitor = core.monitor
        self._closer = weakref.finalize(self, core.close, _EXIT_SECONDS)
        core.start(num_threads)

    def _begin_write(self, place: tuple[int, int, int], pieces: list[tuple[int, int, int]]) -> Write:
        self._check_open()
        file, offset, nbytes = place
        if not 0 <= file < len(self._workers.files):
            raise ValueError(f"Expected a file index below {len(self._workers.files)}, got {file}")
        self._check_extent(file, offset, nbytes)
        sources = [Piece(*piece) for piece in pieces]
        _check_pieces(sources, nbytes, self._workers.files[file].block_nbytes)
        return self._make_write(place, sources)

    def _make_write(self, place: tuple[int, int, int], pieces: list[Piece]) -> Write:
        return Write(self._monitor, place, pieces, self.slab_nbytes)

    def _queue_write(self, write: Write, queue: deque[tuple[Write, Chunk]]) -> None:
        with self._monitor.changed:
            self._check_open()
            self._monitor.num_pending += 1
            self._monitor.inflight_nbytes += write._nbytes
            queue.extend((write, chunk) for chunk in write._chunks)
            self._monitor.changed.notify_all()

    def _begin_read(self, write: Write, piece: int, place: tuple[int, int], ready: Fence | None) -> Read:
        self._check_open()
        address, capacity = place
        source = write._piece(piece)
        if ready is None:
            self._check_destination(write, source, address, capacity)
        with self._monitor.changed:
            self._check_open()
            if source.num_unread > 0 or source.is_cancelled:
                raise RuntimeError(
                    f"Expected piece {piece} to be copied and not cancelled, got one that is not; "
                    "wait for is_piece_copied"
                )
            read = Read(self._monitor, len(source.parts))
            self._monitor.num_pending += 1
            for part in source.parts:
                self._workers.add(self._fetch_job(read, write, part, address + part.piece_offset, ready))
            self._monitor.changed.notify_all()
        return read

    def _fetch_job(self, read: Read, write: Write, part: Part, address: int, ready: Fence | None) -> FetchJob:
        chunk, start, nbytes = part.chunk, part.chunk_offset, part.nbytes
        if ready is None:  # device memory ends where the tensor does
            nbytes = round_up(nbytes, self._workers.files[write._file].block_nbytes)
        source = None
        if chunk.slab is not None:
            chunk.slab.num_users += 1
            source = chunk.slab.view[start:]
        elif chunk.rescued is not None:
            source = memoryview(chunk.rescued)[start:]
        return FetchJob(read, write, part, address, nbytes, source, chunk.slab, ready)

    def grow_staging(self, nbytes: int) -> str:
        return ""  # all of it may be used from the beginning

    def grow_host(self, nbytes: int) -> str:
        raise RuntimeError("Expected an engine with a host tier, got one without; use 'io_uring' or 'threads'")

    def wait_inflight(self, max_nbytes: int, timeout_seconds: float | None = None) -> bool:
        self._check_open()
        monitor = self._monitor
        with monitor.changed:
            return monitor.changed.wait_for(lambda: monitor.inflight_nbytes <= max_nbytes, timeout_seconds)

    def wait_idle(self, timeout_seconds: float | None = None) -> bool:
        self._check_open()
        with self._monitor.changed:
            return self._monitor.changed.wait_for(lambda: self._monitor.num_pending == 0, timeout_seconds)

    def drain(self) -> None:
        self.wait_idle()

    def close(self) -> None:
        self._check_process()
        self._closer.detach()
        self._workers.close()

    def _check_open(self) -> None:
        self._check_process()
        if self._monitor.is_closing:
            raise RuntimeError("Expected an open engine, got a closed one; open another engine")

    def _check_extent(self, file: int, offset: int, nbytes: int) -> None:
        target = self._workers.files[file]
        block, limit = target.block_nbytes, target.nbytes
        is_aligned = offset % block == 0 and nbytes % block == 0
        if not is_aligned or nbytes <= 0 or offset < 0 or offset + nbytes > limit:
            raise ValueError(
                f"Expected an extent aligned to {block} bytes inside the first {limit} bytes of file {file}, got "
                f"offset {offset}, nbytes {nbytes}; grow the spill file first"
            )

    def _check_destination(self, write: Write, piece: Piece, address: int, capacity: int) -> None:
        target = self._workers.files[write._file]
        needed = round_up(piece.nbytes, target.block_nbytes)
        if capacity < needed:
            raise ValueError(
                f"Expected a capacity of at least {needed} bytes (the piece in whole blocks), got {capacity}"
            )
        if address % target.memory_alignment != 0:
            raise ValueError(
                f"Expected an address aligned to memory_alignment={target.memory_alignment}, got {address}"
            )

    @property
    def is_closed(self) -> bool:
        self._check_process()
        return self._monitor.is_closing

    @property
    def num_events(self) -> int:
        return self._monitor.num_events

    @property
    def inflight_nbytes(self) -> int:
        return self._monitor.inflight_nbytes

    @property
    def written_nbytes(self) -> int:
        return self._monitor.totals.written.nbytes

    @property
    def read_nbytes(self) -> int:
        return self._monitor.totals.read.nbytes

    @property
    def num_retries(self) -> int:
        return self._monitor.num_retries

    @property
    def num_write_errors(self) -> int:
        return self._monitor.num_write_errors

    @property
    def num_read_errors(self) -> int:
        return self._monitor.num_read_errors

    @property
    def rescued_nbytes(self) -> int:
        return self._monitor.rescued_nbytes

    @property
    def write_busy_seconds(self) -> float:
        return self._monitor.totals.written.busy_seconds

    @property
    def read_busy_seconds(self) -> float:
        return self._monitor.totals.read.busy_seconds

    def silent_seconds(self, file: int) -> float:
        return self._workers.pulses[file].silent_seconds if file < len(self._workers.pulses) else 0.0

    def copies(self) -> tuple[tuple[int, float], tuple[int, float]]:
        return (0, 0.0), (0, 0.0)  # it knows no slabs that an accelerator is copied to

    def traffic(self, user: int) -> tuple[tuple[int, float, int, float], tuple[int, float, int, float]]:
        with self._monitor.changed:
            own = self._monitor.traffic[user]
            written, read = own.written, own.read
            return (
                (written.nbytes, written.busy_seconds, *written.sustained),
                (read.nbytes, read.busy_seconds, *read.sustained),
            )


class PythonEngine(BaseEngine):
    """The engine for `ssdtrain.io.engine.open_engine` kind ``"python"``."""

    kind = "python"
    host_nbytes = 0

    def add_device(self, driver: object) -> str:
        raise RuntimeError("Expected host memory, got an accelerator's; use engine='io_uring' or 'threads'")

    def __init__(
        self,
        files: Iterable[Any],
        staging_nbytes: int,
        slab_nbytes: int,
        checksum: bool = False,
        num_threads: int = 2,
    ) -> None:
        targets: list[File] = list(files)
        check_sizes(targets, staging_nbytes, slab_nbytes)
        self.staging_nbytes = staging_nbytes // slab_nbytes * slab_nbytes
        self._pool = Pool(staging_nbytes // slab_nbytes, slab_nbytes)
        super().__init__(Core(targets, self._pool, checksum), slab_nbytes, num_threads)

    def write(
        self,
        file: int,
        offset: int,
        nbytes: int,
        pieces: list[tuple[int, int, int]],
        producer: Fence | None = None,
    ) -> Write:
        _check_host(producer)
        write = self._begin_write((file, offset, nbytes), pieces)
        self._queue_write(write, self._workers.to_copy)
        return write

    def read(self, write: Write, piece: int, address: int, capacity: int, ready: Fence | None = None) -> Read:
        _check_host(ready)
        return self._begin_read(write, piece, (address, capacity), None)

    @property
    def staging_in_use_nbytes(self) -> int:
        return self._pool.in_use_nbytes

    @property
    def peak_staging_nbytes(self) -> int:
        return self._pool.peak_nbytes


def _check_host(fence: Fence | None) -> None:
    if fence is not None:
        raise ValueError(
            f"Expected host memory, got memory of device {fence.device_index}; copy it to the host first, or use "
            "engine='kvikio'"
        )
