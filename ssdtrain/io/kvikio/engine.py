"""The kvikio engine: its threads wait for a fence, then for kvikio, and rescue what could not be written."""

from __future__ import annotations

import errno
import zlib
from collections.abc import Iterable
from typing import Any

from ssdtrain.io import python
from ssdtrain.io.python import (
    BaseEngine,
    Chunk,
    Fence,
    FetchJob,
    File,
    Piece,
    Read,
    State,
    Workers,
    Write,
    check_sizes,
    view_of,
)

from .files import Handles
from .memory import Driver, Memory
from .probe import GpuDirect, probe_once
from .requests import DirectWrite

_MAX_THREADS = 8


class SpillFile(python.SpillFile):
    """A spill file whose blocks are pages: GPUDirect moves nothing smaller, and kvikio would split what is."""

    least_block_nbytes = 4096


class KvikioEngine(BaseEngine):
    """The engine for `ssdtrain.io.engine.open_engine` kind ``"kvikio"``."""

    kind = "kvikio"
    host_nbytes = 0
    staging_nbytes = 0
    staging_in_use_nbytes = 0
    peak_staging_nbytes = 0

    def __init__(
        self,
        files: Iterable[Any],
        staging_nbytes: int,
        slab_nbytes: int,
        checksum: bool = False,
        gpudirect: GpuDirect | None = None,
    ) -> None:
        """Moves at most `staging_nbytes` at a time, in requests of at most `slab_nbytes`.

        Raises:
            RuntimeError: kvikio does not work in this process.
            OSError: kvikio cannot work with these files.
        """
        targets: list[File] = list(files)
        check_sizes(targets, staging_nbytes, slab_nbytes)
        self.gpudirect = gpudirect or probe_once(tuple(file.directory for file in targets))
        if self.gpudirect.mode == "unavailable":
            raise RuntimeError(self.gpudirect.sentence)
        num_threads = min(_MAX_THREADS, staging_nbytes // slab_nbytes)
        handles = Handles(targets, is_posix=self.gpudirect.mode == "posix")
        try:
            handles.check_answers()
            handles.configure(num_threads, slab_nbytes)
        except BaseException:
            handles.close()
            raise
        super().__init__(_Direct(targets, handles, checksum), slab_nbytes, num_threads)
        if not self.gpudirect.is_real:
            self.notes.append(self.gpudirect.sentence)

    def add_device(self, driver: object) -> str:
        return ""  # device memory needs no preparation: fences say it all

    def write(
        self,
        file: int,
        offset: int,
        nbytes: int,
        pieces: list[tuple[int, int, int]],
        producer: Fence | None = None,
    ) -> DirectWrite:
        write = self._begin_write((file, offset, nbytes), pieces)
        assert isinstance(write, DirectWrite)
        write.producer = producer
        self._queue_write(write, self._workers.to_write)
        return write

    def read(self, write: Write, piece: int, address: int, capacity: int, ready: Fence | None = None) -> Read:
        return self._begin_read(write, piece, (address, capacity), ready)

    def _make_write(self, place: tuple[int, int, int], pieces: list[Piece]) -> Write:
        return DirectWrite(self._monitor, place, pieces, self.slab_nbytes)


class _Direct(Workers):
    """Between the tensors' own memory and the files."""

    kind = "kvikio"
    takes_writes_in = State.QUEUED

    def __init__(self, files: list[File], handles: Handles, has_checksum: bool) -> None:
        super().__init__(files, has_checksum)
        self._handles = handles
        self._driver = Driver()

    def _let_go(self) -> None:
        self._handles.close()

    def _write_file(self, write: Write, chunk: Chunk) -> None:
        assert isinstance(write, DirectWrite)
        _synchronize(write.producer)
        if self.has_checksum:
            for part, (_, memory) in zip(_live(chunk), write.sources(chunk), strict=True):
                part.checksum = zlib.crc32(self._content(memory, write.producer))
        start, is_device = write._offset + chunk.offset, write.producer is not None
        for offset, memory in write.sources(chunk):
            with self.pulses[write._file]:
                self._handles.write(write._file, memory, start + offset, is_device=is_device)
        self._end_buffered(write._file, start, chunk.nbytes, is_write=True)

    def _rescue(self, write: Write, chunk: Chunk) -> bytearray | None:
        assert isinstance(write, DirectWrite)
        rescued = bytearray(chunk.nbytes)
        try:
            _synchronize(write.producer)
            for offset, memory in write.sources(chunk):
                rescued[offset : offset + memory.nbytes] = self._content(memory, write.producer)
        except (OSError, MemoryError):  # the source is all there is, and stays: it never counts as copied
            return None
        return rescued

    def _read_file(self, job: FetchJob) -> None:
        _synchronize(job.ready)
        file, memory = job.write._file, Memory(job.address, job.nbytes)
        with self.pulses[file]:
            self._handles.read(file, memory, job.file_offset, is_device=job.ready is not None)
        self._end_buffered(file, job.file_offset, job.nbytes, is_write=False)

    def _read_memory(self, job: FetchJob) -> None:
        assert job.source is not None
        _synchronize(job.ready)
        memory = Memory(job.address, job.part.nbytes)
        if job.ready is None:
            view_of(*memory)[:] = job.source[: memory.nbytes]
        else:
            self._driver.write(memory, job.source, job.ready.device_index)

    def _checksum(self, job: FetchJob) -> int:
        return zlib.crc32(self._content(Memory(job.address, job.part.nbytes), job.ready))

    def _content(self, memory: Memory, fence: Fence | None) -> memoryview | bytearray:
        return view_of(*memory) if fence is None else self._driver.read(memory, fence.device_index)


def _live(chunk: Chunk) -> list[Any]:
    return [part for part in chunk.parts if not part.is_skipped]


def _synchronize(fence: Fence | None) -> None:
    """Waits for whoever used the memory last, whatever stream that was on."""
    if fence is None:
        return
    try:
        fence.synchronize()
        return
    except Exception as error:  # the fence is another package's: whatever it raises, the request has failed
        text = f"waiting for the device failed: {error}"
    raise OSError(errno.EIO, text)
