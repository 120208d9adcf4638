"""Bytes that must not be lost: every engine, every size, failed writes, lost reads, ends of processes."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from drives import Drive, fill
from engine_tools import KINDS, eventually
from fault_tools import KIB, Lab, tell

from ssdtrain.policy import OptimizerPolicy
from ssdtrain.store.record import Record
from ssdtrain.store.state_store import StateLostError, StateStore

SIZES = [1, 511, 512, 513, 4095, 4096, 4097, 64 * KIB, 300 * KIB + 7]
every_engine = pytest.mark.parametrize("engine", KINDS)


def store_of(*directories: object, **policy: Any) -> StateStore:
    chosen = OptimizerPolicy(**({"staging_nbytes": 64 * KIB} | policy))
    return StateStore([str(directory) for directory in directories], chosen)


def some(nbytes: int, seed: int = 0) -> torch.UntypedStorage:
    generator = torch.Generator().manual_seed(seed + nbytes)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator).untyped_storage()


def as_bytes(storage: torch.UntypedStorage) -> bytes:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()


@every_engine
@pytest.mark.parametrize("num_directories", [1, 2])
def test_every_size_comes_back(engine: str, num_directories: int, tmp_path: Path) -> None:
    """Written, read, written anew, read again, while others are in flight; more bytes than staging."""
    folders = [tmp_path / str(i) for i in range(num_directories)]
    for folder in folders:
        folder.mkdir()
    store = store_of(*folders, engine=engine)
    records = {nbytes: Record(f"{nbytes} bytes") for nbytes in SIZES}
    for seed in range(3):
        for nbytes, record in records.items():
            store.write(record, some(nbytes, seed))
        reads = {nbytes: store.read(record) for nbytes, record in records.items()}
        for nbytes, pending in reads.items():
            assert as_bytes(store.wait(pending)) == as_bytes(some(nbytes, seed)), (nbytes, seed)
    store.flush()
    in_use = inside.space(store).in_use_nbytes
    assert sum(SIZES) <= in_use < sum(SIZES) + len(SIZES) * num_directories * 4096
    for record in records.values():
        store.release(record)
    store.flush()
    assert inside.space(store).in_use_nbytes == 0
    assert [path for folder in folders for path in folder.iterdir()] == []
    store.close()


@every_engine
def test_a_slot_may_be_written_anew_before_it_is_written(engine: str, tmp_path: Path) -> None:
    """Many times in a row: the last bytes count, and the space of the others is free in the end."""
    store, record = store_of(tmp_path, engine=engine), Record("often")
    for seed in range(50):
        store.write(record, some(40 * KIB, seed))
        if seed % 7 == 0:
            assert as_bytes(store.wait(store.read(record))) == as_bytes(some(40 * KIB, seed))
    assert as_bytes(store.wait(store.read(record))) == as_bytes(some(40 * KIB, 49))
    store.flush()
    assert inside.space(store).in_use_nbytes == 40 * KIB
    store.close()


@every_engine
def test_memory_in_flight_is_bounded(engine: str, tmp_path: Path) -> None:
    """Sources are held until they are copied: with staging of 64 KiB never more than that and the largest one."""
    store = store_of(tmp_path, engine=engine)
    for i in range(40):
        store.write(Record(str(i)), some(32 * KIB, i))
        held = {id(source): source for pending in store._store.pending.writes for source in pending.sources}
        assert sum(source.nbytes() for source in held.values()) <= 64 * KIB + 32 * KIB
    store.close()


@every_engine
def test_a_failed_write_keeps_the_bytes(engine: str, small_ext4: Drive) -> None:
    """The drive answers with errors: bytes stay in memory, are read from there, and flush says that they are."""
    store = store_of(small_ext4.directory, engine=engine)
    records = [Record(f"record {i}") for i in range(6)]
    store.write(records[0], some(100 * KIB, 0))
    store.flush()
    small_ext4.pull()
    for i, record in enumerate(records[1:], start=1):
        store.write(record, some(100 * KIB, i))
    with pytest.raises(OSError, match="in memory") as caught:
        store.flush()
    assert caught.value.errno in (errno.EIO, errno.ETIMEDOUT)
    for i, record in enumerate(records[1:], start=1):
        assert as_bytes(store.wait(store.read(record))) == as_bytes(some(100 * KIB, i))
    assert any("write failed" in text for text in store.counters.fallbacks), store.counters.fallbacks
    small_ext4.plug()
    store.close()


@every_engine
def test_a_full_drive_keeps_the_bytes(engine: str, small_ext4: Drive) -> None:
    """What has no room stays in memory, and is read from there; with room again it goes out with the next write."""
    store = store_of(small_ext4.directory, engine=engine)
    filler = fill(small_ext4.directory)
    records = [Record(f"record {i}") for i in range(4)]
    for i, record in enumerate(records):
        store.write(record, some(3000 * KIB, i))
        assert as_bytes(store.wait(store.read(record))) == as_bytes(some(3000 * KIB, i))
    assert any("no room on the drive for record 3: it stays in memory" in text for text in store.counters.fallbacks)
    filler.unlink()
    inside.space(store)._no_growth_before = [0.0]  # it tries again after some seconds
    store.write(records[3], some(3000 * KIB, 9))
    assert records[3].storage is None
    assert as_bytes(store.wait(store.read(records[3]))) == as_bytes(some(3000 * KIB, 9))
    store.close()


@every_engine
def test_bytes_that_the_drive_changed_are_an_error(engine: str, tmp_path: Path) -> None:
    """Checksums are on by default; without them the other bytes come back."""
    for checksum in (True, False):
        store, record = store_of(tmp_path, engine=engine, checksum=checksum), Record("exp_avg of h.0")
        store.checkpoint = "step-7.pt"
        store.write(record, some(64 * KIB))
        store.flush()
        with open(f"/proc/self/fd/{store.drive.files[0].fd}", "r+b", buffering=0) as raw:
            offset = record.segments[0].extent.offset + 100
            os.pwrite(raw.fileno(), bytes([os.pread(raw.fileno(), 1, offset)[0] ^ 4]), offset)
        if checksum:
            with pytest.raises(StateLostError, match=r"exp_avg of h.0, \d+ bytes at offset \d+.*step-7.pt") as caught:
                store.wait(store.read(record))
            assert (caught.value.errno, caught.value.filename) == (errno.EBADMSG, str(tmp_path))
        else:
            assert as_bytes(store.wait(store.read(record))) != as_bytes(some(64 * KIB))
        store.close()


@every_engine
def test_reads_that_fail_are_an_error(engine: str, small_ext4: Drive) -> None:
    store, record = store_of(small_ext4.directory, engine=engine), Record("h.0.weight")
    store.write(record, some(500 * KIB))
    store.flush()
    small_ext4.pull()
    with pytest.raises(StateLostError, match=r"h.0.weight") as caught:
        store.wait(store.read(record))
    assert caught.value.errno == errno.EIO
    small_ext4.plug()
    store.close()


def test_what_was_dropped_is_not_written_to(tmp_path: Path) -> None:
    """An pending nobody takes: its memory is held until the read is over, then free."""
    store, record = store_of(tmp_path), Record("dropped")
    store.write(record, some(2000 * KIB))
    store.flush()
    for _ in range(5):
        store.read(record)
    store.engine.drain()
    store._store.reap()
    assert store._store.pending.reads == []
    store.close()


def test_reserve(small_ext4: Drive) -> None:
    store = store_of(small_ext4.directory)
    store.reserve(1 << 20, "things")
    with pytest.raises(OSError, match=r"Expected room for 32.0 MiB of things, got \d+.*: free some space") as caught:
        store.reserve(32 << 20, "things")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(small_ext4.directory))
    capped = store_of(small_ext4.directory, disk_nbytes="1MiB")
    with pytest.raises(OSError, match=r"raise disk_nbytes \(1.0 MiB\)"):
        capped.reserve(2 << 20, "things")
    store.close()
    capped.close()


def test_closed(tmp_path: Path) -> None:
    store, record = store_of(tmp_path), Record("late")
    store.write(record, some(KIB))
    store.close()
    store.close()
    for call in (lambda: store.read(record), lambda: store.write(record, some(KIB)), store.flush):
        with pytest.raises(RuntimeError, match="after close"):
            call()
    store.release(record)


def in_a_forked_child(directory: str) -> None:
    store, record = store_of(directory), Record("parent's")
    store.write(record, some(100 * KIB))
    child = os.fork()
    if child == 0:
        try:
            store.read(record)
        except RuntimeError as error:
            os._exit(7 if "forked child" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert as_bytes(store.wait(store.read(record))) == as_bytes(some(100 * KIB))
    store.close()


def test_a_forked_child_is_told(lab: Lab, tmp_path: Path) -> None:
    lab.run(in_a_forked_child, str(tmp_path))


def killed(directory: str) -> None:
    store = store_of(directory)
    records = [Record(str(i)) for i in range(8)]
    for i, record in enumerate(records):
        store.write(record, some(1000 * KIB, i))
    tell("written")
    os.kill(os.getpid(), 9)


def test_a_killed_process_leaves_nothing(lab: Lab, small_ext4: Drive) -> None:
    before = small_ext4.used_nbytes
    child = lab.start(killed, str(small_ext4.directory))
    assert child.next_event() == "written"
    assert child.wait() == -9
    assert list(Path(small_ext4.directory).iterdir()) == []
    eventually(lambda: small_ext4.used_nbytes == before)


def test_nothing_is_left_without_close(tmp_path: Path, small_ext4: Drive) -> None:
    """The store is dropped: its files and its engine go with it."""
    before = small_ext4.used_nbytes
    store = store_of(small_ext4.directory)
    store.write(Record("x"), some(1000 * KIB))
    store.engine.drain()
    del store
    gc.collect()
    eventually(lambda: small_ext4.used_nbytes == before)
