"""DeepSpeed's `aio_handle` on our engine: its calls and return values, but any length, and no error is lost."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ssdtrain.io import File, FileEngine, PinnedBuffer, Request

logger = logging.getLogger("ssdtrain")

_ALIGNMENT = 512
Path = str | os.PathLike[str]


@dataclass(frozen=True)
class _Operation:
    """One tensor on its way."""

    request: Request
    file: File
    finish: Callable[[], object]


class AioHandle:
    """Moves tensors between memory and whole files or ranges of them; what DeepSpeed's ``aio_handle`` does.

    Where that one returns -1, or reports success although bytes are missing, this one raises. Lengths need not be
    multiples of anything, tensors may be pinned or not, with gaps, and on an accelerator: through host memory then.
    """

    def __init__(
        self,
        block_size: int = 1 << 20,
        queue_depth: int = 128,
        single_submit: bool = False,
        overlap_events: bool = False,
        intra_op_parallelism: int = 1,
        *,
        engine: str = "auto",
    ) -> None:
        """As `ssdtrain.io.FileEngine`.

        Args:
            block_size: the most bytes the drive is asked for at once.
            queue_depth: how many blocks at a time.
            single_submit: kept to be asked for; the engine submits what is there.
            overlap_events: as `single_submit`; submitting and completing always overlap.
            intra_op_parallelism: threads of engine ``"threads"``; with io_uring one serves all.
            engine: ``"io_uring"``, ``"threads"`` or ``"auto"``.

        Raises:
            ValueError: a number is not positive.
            RuntimeError: the C++ extension cannot be used.
        """
        self._engine = FileEngine(
            block_nbytes=block_size, queue_depth=queue_depth, num_threads=intra_op_parallelism, engine=engine
        )
        self._block_size, self._queue_depth = block_size, queue_depth
        self._single_submit, self._overlap_events = single_submit, overlap_events
        self._intra_op_parallelism = intra_op_parallelism
        self._lock = threading.Lock()
        self._pending: list[_Operation] = []
        self._locked: dict[int, PinnedBuffer] = {}

    # -- what it was made with -----------------------------------------------------------------------------------

    def get_block_size(self) -> int:
        """As it was passed."""
        return self._block_size

    def get_queue_depth(self) -> int:
        """As it was passed."""
        return self._queue_depth

    def get_single_submit(self) -> bool:
        """As it was passed."""
        return self._single_submit

    def get_overlap_events(self) -> bool:
        """As it was passed."""
        return self._overlap_events

    def get_intra_op_parallelism(self) -> int:
        """As it was passed."""
        return self._intra_op_parallelism

    def get_alignment(self) -> int:
        """Lengths that go past the page cache whole, as DeepSpeed counts them; others work too."""
        return self._intra_op_parallelism * _ALIGNMENT

    # -- one operation -------------------------------------------------------------------------------------------

    def read(self, buffer: torch.Tensor, filename: Path, validate: bool, file_offset: int = 0) -> int:
        """Fills `buffer` from a file; 0. As `sync_pread`."""
        self.pread(buffer, filename, validate, False, file_offset)
        return 0

    def write(self, buffer: torch.Tensor, filename: Path, validate: bool, file_offset: int = 0) -> int:
        """Writes `buffer` to a file; 0. As `sync_pwrite`."""
        self.pwrite(buffer, filename, validate, False, file_offset)
        return 0

    def sync_pread(self, buffer: torch.Tensor, filename: Path, file_offset: int = 0) -> int:
        """Fills `buffer` from a file, and waits as `wait` does."""
        return self.pread(buffer, filename, False, False, file_offset)

    def sync_pwrite(self, buffer: torch.Tensor, filename: Path, file_offset: int = 0) -> int:
        """Writes `buffer` to a file, which is made where it is missing, and waits as `wait` does."""
        return self.pwrite(buffer, filename, False, False, file_offset)

    def async_pread(self, buffer: torch.Tensor, filename: Path, file_offset: int = 0) -> int:
        """Begins to fill `buffer`; 0. It has its bytes after `wait`."""
        return self.pread(buffer, filename, False, True, file_offset)

    def async_pwrite(
        self, buffer: torch.Tensor, filename: Path | int | None = None, file_offset: int = 0, *, fd: int | None = None
    ) -> int:
        """Begins to write `buffer`, which must not change before `wait`, to a file or an open descriptor; 0."""
        target = filename if fd is None else fd
        if target is None or (filename is not None and fd is not None):
            raise TypeError("Expected filename or fd, got neither or both")
        return self.pwrite(buffer, target, False, True, file_offset)

    def pread(
        self, buffer: torch.Tensor, filename: Path, validate: bool, asynchronous: bool, file_offset: int = 0
    ) -> int:
        """Begins to fill `buffer`; waits for all that is under way unless `asynchronous`.

        Args:
            buffer: filled whole, from `file_offset` on.
            filename: the file.
            validate: reads the bytes a second way and compares.
            asynchronous: returns 0 at once.
            file_offset: where in the file.

        Raises:
            OSError: the file cannot be opened; when it waits, as `wait`.
        """
        host = buffer.detach() if _is_plain(buffer) else torch.empty(buffer.shape, dtype=buffer.dtype)
        file = self._engine.open(filename)
        finish = partial(_finish_read, buffer, host, (file.name, file_offset, validate))
        return self._begin(_Operation(file.read(host, file_offset), file, finish), asynchronous)

    def pwrite(
        self, buffer: torch.Tensor, filename: Path | int, validate: bool, asynchronous: bool, file_offset: int = 0
    ) -> int:
        """Begins to write `buffer`, as `pread`."""
        host = buffer.detach() if _is_plain(buffer) else buffer.detach().cpu().contiguous()
        file = self._open(filename)
        finish = partial(_check, host, (file.name, file_offset)) if validate else _nothing
        return self._begin(_Operation(file.write(host, file_offset), file, finish), asynchronous)

    def wait(self) -> int:
        """Waits for all that was begun; how many operations that were.

        Raises:
            OSError: one of them failed: the message says which file, where, and how much of it was moved. All are over
                then, and further errors are logged.
        """
        with self._lock:
            pending, self._pending = self._pending, []
        errors: list[OSError] = []
        for operation in pending:
            try:
                operation.request.result()
                operation.finish()
            except OSError as error:
                errors.append(error)
            finally:
                operation.file.close()
        for other in errors[1:]:
            logger.warning("Another operation of the same wait failed: %s", other)
        if errors:
            raise errors[0]
        return len(pending)

    def _open(self, filename: Path | int) -> File:
        """For writing; as DeepSpeed does, a new file is for its owner only."""
        if isinstance(filename, int):
            return self._engine.open(filename)
        fd = os.open(filename, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            return self._engine.open(fd)
        finally:
            os.close(fd)

    def _begin(self, operation: _Operation, asynchronous: bool) -> int:
        with self._lock:
            self._pending.append(operation)
        return 0 if asynchronous else self.wait()

    # -- memory --------------------------------------------------------------------------------------------------

    def new_cpu_locked_tensor(self, num_elem: int, example_tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of `num_elem` elements of the other's dtype in page-locked memory, with a GPU known to its driver.

        Raises:
            OSError: there is not so much memory.
        """
        dtype = example_tensor.dtype
        if torch.cuda.is_available():
            return torch.empty(num_elem, dtype=dtype, pin_memory=True)
        buffer = PinnedBuffer(num_elem * dtype.itemsize)
        if not buffer.is_locked:
            logger.warning("%d bytes of memory are not locked: %s", len(buffer), buffer.reason)
        tensor = torch.frombuffer(buffer.view, dtype=dtype) if num_elem else torch.empty(0, dtype=dtype)
        self._locked[tensor.data_ptr()] = buffer
        return tensor

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        """Lets go of a tensor of `new_cpu_locked_tensor`: its memory goes with its last user. False for another."""
        if torch.cuda.is_available():
            return tensor.is_pinned()
        return self._locked.pop(tensor.data_ptr(), None) is not None

    def is_pinned(self, buffer: torch.Tensor) -> bool:
        """Whether `buffer` lies in page-locked memory, of this handle or of PyTorch."""
        begin, end = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
        is_own = any(at <= begin and end <= at + len(memory) for at, memory in self._locked.items())
        return is_own or (buffer.device.type == "cpu" and torch.cuda.is_available() and buffer.is_pinned())


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether its bytes lie in host memory as they do in a file."""
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def _finish_read(buffer: torch.Tensor, host: torch.Tensor, where: tuple[str, int, bool]) -> None:
    name, offset, validate = where
    if validate:
        _check(host, (name, offset))
    if not _is_plain(buffer):
        buffer.detach().copy_(host)


def _check(host: torch.Tensor, where: tuple[str, int]) -> None:
    name, offset = where
    own = host.reshape(-1).view(torch.uint8)
    with open(name, "rb") as file:
        file.seek(offset)
        other = bytearray(file.read(len(own)))
    if len(other) != len(own) or (other and not torch.equal(own, torch.frombuffer(other, dtype=torch.uint8))):
        text = f"Expected the {len(own)} bytes at offset {offset} that were moved, got others: look after the drive"
        raise OSError(errno.EIO, text, name)


def _nothing() -> None:
    pass
