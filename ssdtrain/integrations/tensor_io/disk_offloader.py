"""TensorNVMe's `DiskOffloader` on our engine: tensors out of memory and back, one by one or several as one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ssdtrain.io import FileEngine, Request
from ssdtrain.io.extents import ExtentAllocator
from ssdtrain.io.files.paths import absolute_path
from ssdtrain.io.files.unlinked import open_unlinked

_BLOCK_NBYTES = 4096
_ENGINES = {"uring": "io_uring", "aio": "auto", "pthread": "threads", "auto": "auto"}
Callback = Callable[[], object]


@dataclass(eq=False)
class _Entry:
    """Tensors that are on the drive, or on their way."""

    storages: list[StorageWeakRef]
    sizes: list[int]
    offsets: list[int]
    writes: list[Request] = field(default_factory=list)
    reads: list[Request] = field(default_factory=list)
    callback: Callback | None = None
    kept: list[torch.UntypedStorage] = field(default_factory=list)
    """What is moved now."""


class DiskOffloader:
    """Writes tensors to a file without a name and frees their memory; reads them back into it.

    A tensor is known by its storage, which has to be all its own: `parameter` and `parameter.data` are the same one.
    Memory is freed once its bytes are in the file, and stays when they could not be written. The file's room is used
    again when a tensor was read back, or has died. Not for several threads at a time.
    """

    def __init__(self, dir_name: str | os.PathLike[str], n_entries: int = 16, backend: str = "uring") -> None:
        """Makes the directory where it is missing, and the file.

        Args:
            dir_name: a directory on the drive.
            n_entries: how many requests of 1 MiB the drive has at a time.
            backend: ``"uring"``, ``"pthread"``, or ``"aio"`` and ``"auto"`` for the fastest that works.

        Raises:
            ValueError: the backend is unknown, or `n_entries` not positive.
            OSError: the directory cannot be used.
            RuntimeError: the C++ extension, or the backend asked for, cannot be used.
        """
        if backend not in _ENGINES:
            raise ValueError(f"Expected a backend among {', '.join(_ENGINES)}, got {backend!r}")
        directory = absolute_path(dir_name, "a directory")
        os.makedirs(directory, exist_ok=True)
        self._engine = FileEngine(queue_depth=n_entries, num_threads=n_entries, engine=_ENGINES[backend])
        fd = open_unlinked(directory)
        try:
            self._file = self._engine.open(fd)
        finally:
            os.close(fd)
        self._space = ExtentAllocator(_BLOCK_NBYTES)
        self._entries: dict[tuple[int, ...], _Entry] = {}
        self._moving: list[_Entry] = []

    # -- one tensor, or several as one ---------------------------------------------------------------------------

    def sync_write(self, tensor: torch.Tensor) -> None:
        """Writes a tensor and frees its memory. As `async_write`."""
        self.sync_writev([tensor])

    def sync_read(self, tensor: torch.Tensor) -> None:
        """Reads a tensor back into memory of its own. As `async_read`."""
        self.sync_readv([tensor])

    def async_write(self, tensor: torch.Tensor, callback: Callback | None = None) -> None:
        """Begins to write a tensor. As `async_writev`."""
        self.async_writev([tensor], callback)

    def async_read(self, tensor: torch.Tensor, callback: Callback | None = None) -> None:
        """Begins to read a tensor. As `async_readv`."""
        self.async_readv([tensor], callback)

    def sync_writev(self, tensors: Sequence[torch.Tensor]) -> None:
        """Writes tensors and frees their memory.

        Raises:
            OSError: they could not be written; their memory is as it was.
        """
        entry = self._begin_write(tensors, None)
        self._finish([entry])

    def sync_readv(self, tensors: Sequence[torch.Tensor]) -> None:
        """Reads tensors that were written together.

        Raises:
            RuntimeError: they were not, or are in memory.
            OSError: they could not be read; another attempt may follow.
        """
        entry = self._begin_read(tensors, None)
        self._finish([entry])

    def async_writev(self, tensors: Sequence[torch.Tensor], callback: Callback | None = None) -> None:
        """Begins to write tensors, which must not change meanwhile.

        Their memory is freed when this thread learns that they are written: in a later call of this object,
        `sync_write_events` at the latest. Then `callback` is called.

        Raises:
            ValueError: one is not in host memory, has no memory, or not all of its storage.
            RuntimeError: one is on its way already.
        """
        self._begin_write(tensors, callback)
        self._finish([entry for entry in self._moving if _is_over(entry)])

    def async_readv(self, tensors: Sequence[torch.Tensor], callback: Callback | None = None) -> None:
        """Begins to read tensors that were written together.

        They have memory at once, and their bytes after `sync_read_events`. `callback` is called when this thread learns
        of that.

        Raises:
            RuntimeError: they were not written together, or are in memory.
        """
        self._begin_read(tensors, callback)
        self._finish([entry for entry in self._moving if _is_over(entry)])

    def sync_write_events(self) -> None:
        """Waits for all writes.

        Raises:
            OSError: one failed; what it was to write is in memory.
        """
        self._finish([entry for entry in self._moving if not entry.reads])

    def sync_read_events(self) -> None:
        """Waits for all reads.

        Raises:
            OSError: one failed; another attempt may follow.
        """
        self._finish([entry for entry in self._moving if entry.reads])

    def synchronize(self) -> None:
        """Waits for all reads and writes. Raises as `sync_write_events` and `sync_read_events` do."""
        self._finish(list(self._moving))

    # -- how -----------------------------------------------------------------------------------------------------

    def _begin_write(self, tensors: Sequence[torch.Tensor], callback: Callback | None) -> _Entry:
        storages = [_storage_of(tensor) for tensor in tensors]
        for storage in storages:
            if storage.nbytes() == 0:
                raise ValueError("Expected a tensor with memory, got one without: it is on the drive, or empty")
        key = _key_of(storages)
        on_their_way = {cdata for other in self._moving for cdata in _key_of_entry(other)}
        if on_their_way & set(key) or len(set(key)) < len(key):
            raise RuntimeError("Expected tensors that are not on their way, got one that is: synchronize() first")
        sizes = [storage.nbytes() for storage in storages]
        self._forget_the_dead()
        if key in self._entries:  # it was given memory anew instead of being read
            self._drop(self._entries[key])
        entry = _Entry([StorageWeakRef(s) for s in storages], sizes, list(map(self._allocate, sizes)))
        entry.callback, entry.kept = callback, storages
        self._entries[key] = entry
        self._moving.append(entry)
        moved = zip(storages, entry.offsets, strict=True)
        entry.writes = [self._file.write(_bytes_of(storage), offset) for storage, offset in moved]
        return entry

    def _begin_read(self, tensors: Sequence[torch.Tensor], callback: Callback | None) -> _Entry:
        storages = [_storage_of(tensor) for tensor in tensors]
        entry = self._entries.get(_key_of(storages))
        if entry is None:
            raise RuntimeError("Expected tensors that were written together, in this order, got others")
        if entry.reads:
            raise RuntimeError("Expected tensors that are not on their way, got some that are: synchronize() first")
        if entry in self._moving:
            self._finish([entry])
        for storage, nbytes in zip(storages, entry.sizes, strict=True):
            if storage.nbytes() != 0:
                raise RuntimeError("Expected tensors without memory, got one that was given some after its write")
            storage.resize_(nbytes)
        entry.callback, entry.kept = callback, storages
        moved = zip(storages, entry.offsets, strict=True)
        entry.reads = [self._file.read(_bytes_of(storage), offset) for storage, offset in moved]
        self._moving.append(entry)
        return entry

    def _finish(self, entries: Iterable[_Entry]) -> None:
        """Waits for what each entry does now; raises the first error when all are over."""
        first: OSError | None = None
        for entry in entries:
            try:
                self._finish_one(entry)
            except OSError as error:
                first = first or error
        if first is not None:
            raise first

    def _finish_one(self, entry: _Entry) -> None:
        is_read = bool(entry.reads)
        errors = [request.exception() for request in entry.reads or entry.writes]
        failed = next((error for error in errors if error is not None), None)
        storages, callback = entry.kept, entry.callback
        entry.kept, entry.callback, entry.reads, entry.writes = [], None, [], []
        self._moving.remove(entry)
        if is_read != (failed is not None):  # read back, or never written: there is nothing in the file
            self._drop(entry)
        if is_read == (failed is not None):  # written, or not read
            for storage in storages:
                storage.resize_(0)
        if failed is not None:
            raise failed
        if callback is not None:
            callback()

    def _allocate(self, nbytes: int) -> int:
        found = self._space.allocate(nbytes)
        if found is None:
            self._space.extend(self._space.capacity + self._space.missing_nbytes(nbytes))
            found = self._space.allocate(nbytes)
            assert found is not None
        return found

    def _drop(self, entry: _Entry) -> None:
        del self._entries[_key_of_entry(entry)]
        for offset, nbytes in zip(entry.offsets, entry.sizes, strict=True):
            self._space.release(offset, nbytes)

    def _forget_the_dead(self) -> None:
        for entry in list(self._entries.values()):
            if entry not in self._moving and all(storage.expired() for storage in entry.storages):
                self._drop(entry)


def _key_of_entry(entry: _Entry) -> tuple[int, ...]:
    """What an entry is known by: its storages, whose place nobody else takes as long as it has weak references."""
    return tuple(storage.cdata for storage in entry.storages)


def _key_of(storages: Sequence[torch.UntypedStorage]) -> tuple[int, ...]:
    return tuple(storage._cdata for storage in storages)


def _is_over(entry: _Entry) -> bool:
    return all(request.done() for request in entry.reads or entry.writes)


def _storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    """All the memory of a tensor."""
    if tensor.device.type != "cpu":
        raise ValueError(f"Expected a tensor in host memory, got one on {tensor.device}: copy it with .cpu() first")
    storage = tensor.untyped_storage()
    own_nbytes = tensor.numel() * tensor.element_size()
    if tensor.storage_offset() != 0 or storage.nbytes() not in (0, own_nbytes):
        raise ValueError("Expected a tensor with a storage of its own, got a view: pass tensor.clone()")
    if not storage.resizable():
        raise ValueError("Expected a tensor whose memory is PyTorch's, got another's: pass tensor.clone()")
    return storage


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)
