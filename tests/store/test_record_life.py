"""The life of every record against a model in plain Python that knows no engine, no schedule and no prefetch.

The model plays autograd: it packs tensors, keeps the handles, unpacks some of them, some twice, some never, drops them,
and changes tensors in place meanwhile. All it knows is what each saved tensor must come back as, which of them share
memory, and that every byte is on exactly one account.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from conftest import EAGER, send
from doses import dose
from engine_tools import descriptors, eventually, num_threads
from fault_tools import num_kept_files
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch.multiprocessing.reductions import StorageWeakRef

import ssdtrain
from ssdtrain.store.record import Handle, Residency, SavedRecord

DTYPES = [torch.float32, torch.int16, torch.uint8, torch.complex64, torch.bfloat16]
NUM_EXAMPLES = dose(12, 200)
MAX_NUMEL = 3000  # up to six slabs
CAP_NBYTES = 128 * 1024


@dataclass(eq=False)
class Counter:
    """A version counter, shared by a tensor, its views, and what comes back of them."""

    version: int = 0


@dataclass(eq=False)
class Held:
    """A tensor the user has."""

    tensor: torch.Tensor
    counter: Counter


@dataclass(eq=False)
class Filed:
    """What is known of a record: which bytes it stands for, and in which memory they were last seen."""

    record: SavedRecord
    source: StorageWeakRef
    version: int
    start: int
    end: int
    memory: StorageWeakRef
    num_handles: int = 0
    may_be_home: bool = False  # somebody may have found the source alive and called the trip off

    def may_hold(self, storage: StorageWeakRef) -> bool:
        """Whether the record may be what keeps `storage` alive: as its source, or until all handles saw its reload."""
        is_reloaded = self.memory.cdata != self.source.cdata
        return (self.may_be_home and self.source.cdata == storage.cdata) or (
            is_reloaded and self.memory.cdata == storage.cdata
        )


@dataclass(eq=False)
class Saved:
    """A saved tensor as it must come back."""

    handle: Any
    content: bytes
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    start: int  # first byte in the source's storage
    counter: Counter
    version: int
    resident_nbytes: int = 0
    filed: Filed | None = None


def content_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def last_byte(tensor: torch.Tensor) -> int:
    steps = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return (tensor.storage_offset() + steps + 1) * tensor.element_size()


def is_dense(tensor: torch.Tensor) -> bool:
    return 0 not in tensor.stride()


class RecordLife(RuleBasedStateMachine):
    """The hooks of one offload and, beside them, what autograd would expect of them."""

    engine = "threads"
    directory = Path()

    @initialize(
        prefetch_nbytes=st.sampled_from([0, 8 * 1024, 64 * 1024]),
        checksum=st.booleans(),
        disk_nbytes=st.sampled_from([None, None, CAP_NBYTES]),
        num_faults=st.sampled_from([0, 0, 1, 4]),
    )
    def begin(self, prefetch_nbytes: int, checksum: bool, disk_nbytes: int | None, num_faults: int) -> None:
        self.holdings = descriptors(), num_threads()
        self.policy = EAGER | {
            "engine": self.engine,
            "prefetch_nbytes": prefetch_nbytes,
            "checksum": checksum,
            "disk_nbytes": disk_nbytes,
        }
        self.offload = ssdtrain.offload_activations(self.directory, self.policy)
        self.offload.__enter__()
        self.is_entered = True
        self.num_faults = num_faults
        self.all_leave = disk_nbytes is None  # nothing has a reason to stay
        self.held: list[Held] = []
        self.saved: list[Saved] = []
        self.filed: list[Filed] = []
        self.memories: list[StorageWeakRef] = []

    # -- what the user does ----------------------------------------------------------------------------------------

    @rule(
        rows=st.integers(1, 3),
        columns=st.integers(0, MAX_NUMEL // 3),
        dtype=st.sampled_from(DTYPES),
        is_flat=st.booleans(),
    )
    def make(self, rows: int, columns: int, dtype: torch.dtype, is_flat: bool) -> None:
        """A new storage with bytes of its own."""
        first = 7 * len(self.memories)
        numbers = torch.arange(first, first + rows * columns) % 251
        tensor = numbers.to(dtype) if is_flat else numbers.to(dtype).reshape(rows, columns)
        self.memories.append(StorageWeakRef(tensor.untyped_storage()))
        self.held.append(Held(tensor, Counter(tensor._version)))

    @precondition(lambda self: self.held)
    @rule(
        which=st.integers(0, 99),
        how=st.sampled_from(["slice", "one", "step", "turn", "bytes", "detach", "expand"]),
        at=st.integers(0, MAX_NUMEL),
    )
    def alias(self, which: int, how: str, at: int) -> None:
        """Another tensor on the same storage."""
        held = self.held[which % len(self.held)]
        view = held.tensor
        at %= view.size(0) + 1 if view.dim() else 1
        if how == "slice" and view.dim():
            view = view[at:]
        elif how == "one" and view.numel():
            view = view.flatten()[at % view.numel()] if view.is_contiguous() else view[at % view.size(0)]
        elif how == "step" and view.dim():
            view = view[at % 3 :: 2]
        elif how == "turn":
            view = view.mT if view.dim() > 1 else view
        elif how == "bytes" and view.dim() and view.stride(-1) == 1:
            view = view.view(torch.uint8)
        elif how == "expand":
            view = view.unsqueeze(0).expand(2, *view.size())
        else:
            view = view.detach()
        self.held.append(Held(view, held.counter))

    @precondition(lambda self: any(is_dense(held.tensor) for held in self.held))
    @rule(which=st.integers(0, 99))
    def change(self, which: int) -> None:
        """Whatever was saved of this storage before is spoilt, wherever its bytes are."""
        dense = [held for held in self.held if is_dense(held.tensor)]
        held = dense[which % len(dense)]
        held.tensor.add_(1)
        held.counter.version += 1
        assert held.tensor._version == held.counter.version

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99))
    def let_go(self, which: int) -> None:
        """The user drops a tensor; its storage may live on by others."""
        self.held.pop(which % len(self.held))

    # -- what autograd does ----------------------------------------------------------------------------------------

    @precondition(lambda self: self.held and self.is_entered)
    @rule(which=st.integers(0, 99), and_drop=st.booleans())
    def save(self, which: int, and_drop: bool) -> None:
        """Alias of a known record, or a new one; never two for the same bytes, never one for different bytes."""
        held = self.held[which % len(self.held)]
        tensor, version = held.tensor, held.counter.version
        item = tensor.element_size()
        self.saved.append(
            Saved(
                inside.pack(self.offload, tensor),
                content_of(tensor),
                tensor.dtype,
                tensor.size(),
                tensor.stride(),
                tensor.storage_offset() * item,
                held.counter,
                version,
            )
        )
        if type(self.saved[-1].handle) is Handle:
            assert tensor.numel() > 0
            self.file(self.saved[-1], tensor)
        else:
            assert tensor.numel() == 0 or inside.transport(self.offload) is None
            self.saved[-1].resident_nbytes = tensor.nbytes
        if and_drop:
            self.held.remove(held)

    def file(self, saved: Saved, tensor: torch.Tensor) -> None:
        """Which record this handle must be of."""
        storage, start, end = tensor.untyped_storage(), saved.start, last_byte(tensor)
        record = saved.handle.record
        for filed in self.filed:
            is_same = filed.source.cdata == storage._cdata and filed.version == saved.version
            if is_same and filed.start <= start and end <= filed.end:
                break
        else:
            if tensor._base is not None and (end - start) * 4 >= storage.nbytes():
                start, end = 0, storage.nbytes()
            else:
                start -= start % 512
            ref = StorageWeakRef(storage)
            filed = Filed(record, ref, saved.version, start, end, ref)
            assert all(other.record is not record for other in self.filed), "one record for different bytes"
            assert (record.start, record.nbytes) == (start, end - start)
            self.filed.append(filed)
        assert filed.record is record, "two records for the same bytes"
        filed.num_handles += 1
        saved.filed = filed

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 99), keep=st.booleans(), times=st.integers(1, 2))
    def unpack(self, which: int, keep: bool, times: int) -> None:
        """The saved bytes, or autograd's error; a second unpack is the first one again."""
        saved = self.saved[which % len(self.saved)]
        self.note_backward()
        if saved.counter.version != saved.version:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                inside.unpack(self.offload, saved.handle)
            return
        tensors = [inside.unpack(self.offload, saved.handle) for _ in range(times)]
        for tensor in tensors:
            self.check(saved, tensor)
        if keep:
            self.held.append(Held(tensors[0], saved.counter))

    def check(self, saved: Saved, tensor: torch.Tensor) -> None:
        assert content_of(tensor) == saved.content
        assert (tensor.dtype, tensor.size(), tensor.stride()) == (saved.dtype, saved.size, saved.stride)
        assert tensor._version == saved.version
        filed = saved.filed
        if filed is None:
            return
        storage = tensor.untyped_storage()
        if not filed.memory.expired():
            assert storage._cdata == filed.memory.cdata, "the bytes are in memory twice"
        elif storage._cdata != filed.memory.cdata:
            filed.memory = StorageWeakRef(storage)
            self.memories.append(filed.memory)
        shift = 0 if storage._cdata == filed.source.cdata else filed.start
        assert tensor.storage_offset() * tensor.element_size() == saved.start - shift

    def note_backward(self) -> None:
        """Every unpack may have others prefetched, and those whose source lives are not read back, but stay."""
        for filed in self.filed:
            filed.may_be_home |= not filed.source.expired()

    @precondition(lambda self: self.is_entered)
    @rule(
        columns=st.integers(1, MAX_NUMEL // 3),
        dtype=st.sampled_from(DTYPES),
        first=st.integers(0, 2),
        keep=st.booleans(),
        num=st.integers(1, 5),
    )
    def there_and_back(self, columns: int, dtype: torch.dtype, first: int, keep: bool, num: int) -> None:
        """What training does most: a few new tensors and an alias of each are saved, leave memory, and come back."""
        before = len(self.saved)
        for _ in range(num):
            self.make(rows=3, columns=columns, dtype=dtype, is_flat=False)
            self.held.append(Held(self.held[-1].tensor[first:], self.held[-1].counter))
            self.save(which=len(self.held) - 1, and_drop=True)
            self.save(which=len(self.held) - 1, and_drop=True)
        self.send()
        for which in reversed(range(before, len(self.saved))):
            self.unpack(which=which, keep=keep, times=2)

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 99))
    def drop(self, which: int) -> None:
        """The graph lets go of a saved tensor; of a record, with its last one."""
        self.forget(self.saved.pop(which % len(self.saved)))

    def forget(self, saved: Saved) -> None:
        saved.handle = None
        filed = saved.filed
        if filed is None:
            return
        filed.num_handles -= 1
        if filed.num_handles == 0:
            self.filed.remove(filed)
            record = filed.record
            self.offload.stats  # noqa: B018  what is on the drive alone is released by the next who looks
            assert record.residency is Residency.RELEASED
            assert record.storage is None and record.pending_read is None and record.segments == ()

    @precondition(lambda self: self.is_entered)
    @rule(size=st.integers(1, 3000), retain=st.booleans())
    def another_step(self, size: int, retain: bool) -> None:
        """A real forward and backward in between: its saves join the open pass, its unpacks prefetch from it."""
        self.note_backward()
        x = torch.linspace(0, 1, size, requires_grad=True)
        loss = (x * 1).sin().exp().sum()
        for is_retained in [True] * retain + [False]:
            loss.backward(retain_graph=is_retained)
        expected = x.detach().sin().exp() * x.detach().cos()
        assert torch.equal(x.grad, expected * (1 + retain))

    @rule()
    def enter_or_leave(self) -> None:
        """Backward may come when the context was left; without records the engine is closed meanwhile."""
        if self.is_entered:
            self.offload.__exit__(None, None, None)
            assert (inside.transport(self.offload) is None) == (not self.filed)
        else:
            self.offload.__enter__()
        self.is_entered = not self.is_entered

    # -- what the engine and the schedule do -------------------------------------------------------------------------

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 99))
    def prefetch(self, which: int) -> None:
        """Ahead of need, in an order of its own."""
        filed = self.saved[which % len(self.saved)].filed
        if filed is not None:
            filed.may_be_home |= not filed.source.expired()
            inside.reloads(self.offload).prefetch(filed.record)

    @rule()
    def drain(self) -> None:
        transport = inside.transport(self.offload)
        if transport is not None:
            transport.engine.drain()

    @precondition(lambda self: self.is_entered)
    @rule()
    def send(self) -> None:
        """Everything saved so far goes out, and its memory is free unless it is somebody's or was called home."""
        send()
        self.drain()
        self.offload.stats  # noqa: B018  takes note of what the engine did
        if not self.all_leave:
            return
        for filed in self.filed:
            if not filed.may_be_home and filed.memory.cdata == filed.source.cdata:  # never reloaded
                assert filed.record.residency in (Residency.DISK, Residency.RELOADING)
                owners = [held for held in self.held if held.tensor.untyped_storage()._cdata == filed.source.cdata]
                others = [other for other in self.filed if other is not filed and other.may_hold(filed.source)]
                assert filed.source.expired() or owners or others, "the memory of a record on the drive is not free"

    # -- faults ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def files_opened(self, flag: int) -> Iterator[None]:
        """Meanwhile the spill files can only be read, or only be written."""
        self.num_faults -= 1
        self.all_leave = False  # directories that failed are not used any more
        transport = inside.transport(self.offload)
        fds = [file.fd for file in transport.drive.files] if transport is not None else []
        originals = [os.dup(fd) for fd in fds]
        for fd in fds:
            other = os.open(f"/proc/self/fd/{fd}", flag | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
            os.dup2(other, fd, inheritable=False)
            os.close(other)
        try:
            yield
        finally:
            if inside.transport(self.offload) is transport and transport is not None:
                transport.engine.drain()
                for fd, original in zip(fds, originals, strict=True):
                    os.dup2(original, fd, inheritable=False)
            for original in originals:
                os.close(original)

    @precondition(lambda self: self.num_faults and self.is_entered)
    @rule()
    def send_in_vain(self) -> None:
        """Writes fail: the bytes stay with the engine, whatever has no place there stays with the record."""
        with self.files_opened(os.O_RDONLY):
            send()

    @precondition(lambda self: self.num_faults and self.saved)
    @rule(which=st.integers(0, 99))
    def unpack_in_vain(self, which: int) -> None:
        """Reads fail: bytes that are in memory come, others are an error that says so, and come when reads work."""
        failure: OSError | None = None
        with self.files_opened(os.O_WRONLY):
            try:
                self.unpack(which=which, keep=False, times=1)
            except OSError as error:
                failure = error.with_traceback(None)  # whose frames hold the handle
        if failure is not None:
            assert failure.errno == errno.EBADF and failure.filename == str(self.directory)
            assert "record" in str(failure)
        self.unpack(which=which, keep=False, times=1)

    @precondition(lambda self: self.num_faults and self.saved)
    @rule(which=st.integers(0, 99))
    def unpack_without_memory(self, which: int) -> None:
        """No memory for a reload: the accounts stay right, and the bytes come when there is some."""
        self.num_faults -= 1
        device = inside.devices(self.offload).cpu

        def refuse(*sizes: int) -> None:
            raise MemoryError

        device.allocate = refuse  # type: ignore[method-assign, assignment]
        with contextlib.suppress(MemoryError):
            self.unpack(which=which, keep=False, times=1)
        del device.allocate
        self.unpack(which=which, keep=False, times=1)

    # -- what always holds -------------------------------------------------------------------------------------------

    @invariant()
    def accounts_agree(self) -> None:
        stats, store, counters = self.offload.stats, inside.store(self.offload), inside.counters(self.offload)
        records = [filed.record for filed in self.filed]
        assert stats.num_live_records == len(records)
        assert {r for entry in store.index._records.values() for r in entry} == set(records)
        assert [record.num_handles for record in records] == [filed.num_handles for filed in self.filed]
        assert all(record.pass_.records[record.index] is record for record in records)
        in_memory = [r.nbytes for r in records if r.storage is not None or r.residency is Residency.RELOADING]
        shared = [record for record in records if record.residency is Residency.SHARED]
        resident = [saved.resident_nbytes for saved in self.saved]
        assert counters.held_nbytes == sum(in_memory) + sum(r.nbytes for r in shared) + sum(resident)
        reloads = store.reloads
        assert set(reloads.shared) == set(shared)
        prefetched = [record for record in records if record.is_prefetched]
        assert set(reloads._prefetched) == set(prefetched) and len(reloads._prefetched) == len(prefetched)
        assert all(record.residency is Residency.RELOADING for record in prefetched)
        assert counters.prefetched_nbytes == sum(record.nbytes for record in prefetched)
        most = self.policy["prefetch_nbytes"]
        assert counters.prefetched_nbytes <= most or (most and len(prefetched) == 1), "more than one, beyond the bound"

    @invariant()
    def extents_agree(self) -> None:
        transport = inside.transport(self.offload)
        if transport is None:
            return
        extents = [segment.extent for filed in self.filed for segment in filed.record.segments]
        extents += [segment.extent for segment in transport.pending._unwanted]
        assert transport.space.in_use_nbytes == sum(extent.nbytes for extent in extents)
        assert self.policy["disk_nbytes"] is None or transport.space.in_use_nbytes <= CAP_NBYTES
        ends = {0: 0}
        for extent in sorted(extents):
            assert extent.offset >= ends[extent.file], "two records in one place"
            ends[extent.file] = extent.offset + extent.nbytes
        assert transport.engine.staging_in_use_nbytes <= EAGER["staging_nbytes"]

    def teardown(self) -> None:
        """The last handles go: nothing is on any account, and the engine is closed, although the offload is alive; it
        keeps its spill file, which is empty."""
        if not hasattr(self, "offload"):
            return
        if self.is_entered:
            self.offload.__exit__(None, None, None)
        while self.saved:
            self.forget(self.saved.pop())
        counters, store = inside.counters(self.offload), inside.store(self.offload)
        assert (counters.num_live_records, counters.held_nbytes, counters.prefetched_nbytes) == (0, 0, 0)
        assert not (store.index._records or store.reloads.shared or store.reloads._prefetched or store.releases.notes)
        assert inside.transport_of(store) is None
        self.held.clear()
        assert all(memory.expired() for memory in self.memories)
        num_kept = num_kept_files(self.offload)
        assert num_kept <= 1
        assert eventually(
            lambda: len(descriptors() - self.holdings[0]) == num_kept
        )  # a file of no use closes meanwhile
        assert eventually(lambda: num_threads() <= self.holdings[1])
        assert os.listdir(self.directory) == []
        self.offload.close()
        assert eventually(lambda: not descriptors() - self.holdings[0])


@pytest.mark.parametrize("engine", ["io_uring", "threads", "python"])
def test_record_life(tmp_path: Path, engine: str) -> None:
    """Saves, changes, unpacks, drops and faults in any order: the right bytes, once, and nothing left of them."""
    machine = type("Life", (RecordLife,), {"engine": engine, "directory": tmp_path})
    torch.ones(1 << 17, requires_grad=True).exp().sum().backward()  # starts the threads that torch keeps
    gc.collect()
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=NUM_EXAMPLES, stateful_step_count=60, deadline=None, derandomize=True, database=None
        ),
    )


def test_no_extent_is_given_away_under_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph is dropped while the drive writes its record: until it is done, the place must not be another's, whose
    bytes the late write would destroy."""
    gate, has_begun = threading.Event(), threading.Event()
    write = os.pwrite

    def wait_and_write(fd: int, data: Any, offset: int) -> int:
        has_begun.set()
        assert gate.wait(60)
        return write(fd, data, offset)

    offload = ssdtrain.offload_activations(tmp_path, EAGER | {"engine": "python"})
    monkeypatch.setattr(os, "pwrite", wait_and_write)
    leaf = torch.ones(1, requires_grad=True)
    with offload:
        first = inside.pack(offload, torch.ones(1500))
        leaf + 1  # the sequence number moves on
        second = inside.pack(offload, torch.ones(1500))
        assert has_begun.wait(60)
        transport = inside.transport(offload)
        assert transport is not None
        in_use = transport.space.in_use_nbytes
        assert in_use > 0
        del first
        offload.stats  # noqa: B018  takes note of what the engine did
        assert transport.space.in_use_nbytes == in_use
        gate.set()
        transport.engine.drain()
        offload.stats  # noqa: B018
        assert transport.space.in_use_nbytes == 0
        del second
    assert offload.stats.num_live_records == 0


@pytest.mark.parametrize("engine", ["io_uring", "threads", "python"])
def test_a_failed_prefetch_is_tried_again(tmp_path: Path, engine: str) -> None:
    """A drive refuses reads for a while; what was asked for ahead of need in that while is still there when needed."""
    offload = ssdtrain.offload_activations(tmp_path, EAGER | {"engine": engine})
    leaf = torch.ones(1, requires_grad=True)
    with offload:
        handle = inside.pack(offload, torch.arange(1500.0))
        leaf + 1  # the sequence number moves on
        other = inside.pack(offload, torch.arange(1500.0) + 1)
        transport = inside.transport(offload)
        assert transport is not None
        transport.engine.drain()
        offload.stats  # noqa: B018  takes note of what the engine did
        record = handle.record
        assert record.residency is Residency.DISK
        with reads_refused(transport.drive.files[0].fd):
            assert inside.reloads(offload).prefetch(record)
            transport.engine.drain()
        assert record.pending_read.reads[0].error is not None
        assert torch.equal(inside.unpack(offload, handle), torch.arange(1500.0))
        assert any("Bad file descriptor" in text for text in offload.stats.fallbacks)
        del handle, other, record
    assert offload.stats.num_live_records == 0


@contextlib.contextmanager
def reads_refused(fd: int) -> Iterator[None]:
    """Meanwhile a file can only be written."""
    original = os.dup(fd)
    other = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
    os.dup2(other, fd, inheritable=False)
    os.close(other)
    try:
        yield
    finally:
        os.dup2(original, fd, inheritable=False)
        os.close(original)
