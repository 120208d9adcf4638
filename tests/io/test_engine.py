"""Every engine keeps the same promises: bytes come back equal, nothing is lost, nothing is left behind."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_tools import KINDS, SLAB_NBYTES, Io, Memory, descriptors, eventually, num_threads, random_bytes, round_up
from folders import HELPERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssdtrain.io.extension import INTERFACE
from ssdtrain.io.open_engine import open_engine

SIZES = [1, 511, 512, 4095, 4096, 4097, SLAB_NBYTES, 3 * SLAB_NBYTES + 1, 40 * SLAB_NBYTES - 5]

OpenIo = Callable[..., Io]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def open_io(kind: str, tmp_path: Path) -> Iterator[OpenIo]:
    """Opens engines; at the end they are closed and the directory must be empty."""
    opened: list[Io] = []

    def make(directory: Path | str = tmp_path, **options: Any) -> Io:
        opened.append(Io(kind, directory, **options))
        return opened[-1]

    yield make
    for io in opened:
        io.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("nbytes", SIZES)
def test_bytes_come_back(open_io: OpenIo, nbytes: int, checksum: bool) -> None:
    io = open_io(checksum=checksum)
    written = io.write(random_bytes(nbytes))
    written.write.wait()
    assert written.write.error is None
    assert written.write.written_nbytes == io.written_nbytes(nbytes)
    io.check(written)
    assert io.engine.read_nbytes == round_up(nbytes, io.block)


@pytest.mark.parametrize("nbytes", SIZES)
def test_bytes_come_back_before_they_are_written(open_io: OpenIo, nbytes: int) -> None:
    """Read as soon as the piece is copied: from the slab, from the file, or some of each."""
    io = open_io(num_slabs=64)
    written = io.write(random_bytes(nbytes))
    written.write.wait_copied()
    written.sources[0].fill(0)  # the source is ours again
    read, destination = io.start_read(written, 0)
    assert read.wait()
    assert read.error is None
    assert destination.bytes(nbytes) == written.contents[0]
    assert read.forwarded_nbytes + round_up(read.read_nbytes, io.block) >= nbytes


def test_several_pieces_share_an_extent(open_io: OpenIo) -> None:
    sizes = [1, 512, 700, 4096, SLAB_NBYTES + 3, 5, 2 * SLAB_NBYTES]
    io = open_io(checksum=True)
    for gap_blocks in (0, 1, 3 * SLAB_NBYTES // io.block):
        written = io.write(*(random_bytes(size, size) for size in sizes), gap_blocks=gap_blocks)
        written.write.wait()
        assert written.write.is_copied
        io.check(written)


def test_gaps_and_padding_are_zero(open_io: OpenIo) -> None:
    """What an earlier tenant left in a slab must not reach the file."""
    io = open_io(num_slabs=1)
    io.write(b"\xff" * SLAB_NBYTES).write.wait()
    io.write(b"a", b"b", gap_blocks=2).write.wait()
    fd, start, length = io.files[0].fd, SLAB_NBYTES, 6 * io.block
    back = Memory(length)
    view = memoryview(back._map)[:length]
    assert os.preadv(fd, [view], start) == length
    view.release()
    content = back.bytes()
    assert content[0:1] + content[3 * io.block : 3 * io.block + 1] == b"ab"
    assert sum(content) == ord("a") + ord("b")


def test_short_staging_only_slows_down(open_io: OpenIo) -> None:
    io = open_io(num_slabs=1)
    writes = [io.write(random_bytes(2 * SLAB_NBYTES + 100, seed)) for seed in range(12)]
    for written in writes:
        written.write.wait_copied()
        io.check(written)
    io.engine.drain()
    for written in writes:
        io.check(written)
    assert io.engine.peak_staging_nbytes == SLAB_NBYTES * io.has_slabs
    assert io.engine.staging_in_use_nbytes == 0


def test_staging_is_used_as_far_as_it_is_needed(open_io: OpenIo, kind: str) -> None:
    """What may be used later is neither used nor registered before; whoever waits for it goes on when it may."""
    is_native = kind in ("io_uring", "threads")  # others may use all of it from the beginning
    io = open_io(**({"first_staging_nbytes": 2 * SLAB_NBYTES} if is_native else {}))
    for written in [io.write(random_bytes(SLAB_NBYTES, seed)) for seed in range(12)]:
        written.write.wait_copied()
        io.check(written)
    assert io.engine.peak_staging_nbytes <= (2 if is_native else 8) * SLAB_NBYTES
    writes = [io.write(random_bytes(3 * SLAB_NBYTES, seed)) for seed in range(12)]
    assert io.engine.grow_staging(100 * SLAB_NBYTES) == ""
    assert io.engine.grow_staging(SLAB_NBYTES) == ""  # it never gets less
    for written in writes:
        written.write.wait_copied()
        io.check(written)
    assert io.engine.peak_staging_nbytes <= 8 * SLAB_NBYTES


def test_several_files(open_io: OpenIo) -> None:
    io = open_io(num_files=3)
    writes = [io.write(random_bytes(SLAB_NBYTES + seed, seed), file=seed % 3) for seed in range(1, 20)]
    for written in writes:
        written.write.wait()
    for written in writes:
        io.check(written)


def test_counters_add_up(open_io: OpenIo) -> None:
    io = open_io()
    assert io.engine.num_events == 0
    written = io.write(random_bytes(3 * SLAB_NBYTES), random_bytes(10))
    written.write.wait()
    assert io.engine.num_events == 3  # two pieces copied, one write done
    io.check(written)
    assert io.engine.num_events == 5
    assert io.engine.written_nbytes == 3 * SLAB_NBYTES + io.written_nbytes(10)
    assert io.engine.inflight_nbytes == 0
    assert io.engine.write_busy_seconds > 0
    assert io.engine.read_busy_seconds > 0
    assert (io.engine.num_retries, io.engine.num_write_errors, io.engine.num_read_errors) == (0, 0, 0)


def test_wait_inflight(open_io: OpenIo) -> None:
    io = open_io(num_slabs=1)
    writes = [io.write(random_bytes(4 * SLAB_NBYTES)) for _ in range(8)]
    assert io.engine.wait_inflight(32 * SLAB_NBYTES, 0.0)
    assert io.engine.wait_inflight(8 * SLAB_NBYTES)
    assert io.engine.inflight_nbytes <= 8 * SLAB_NBYTES
    assert io.engine.wait_inflight(0)
    assert all(written.write.is_done for written in writes)


def test_wait_with_a_timeout_returns(open_io: OpenIo) -> None:
    io = open_io()
    written = io.write(random_bytes(SLAB_NBYTES))
    written.write.wait()
    read, _ = io.start_read(written, 0)
    while not read.wait(0.0001):
        assert not read.is_done or read.wait(0)
    assert read.is_done


# ---------------------------------------------------------------------------------------------------- cancel


def test_cancel_right_away(open_io: OpenIo) -> None:
    """A queue longer than staging, cancelled at once: whatever began is written, the rest is dropped, none is lost."""
    io = open_io(num_slabs=1)
    writes = [io.write(random_bytes(2 * SLAB_NBYTES, seed)) for seed in range(20)]
    for written in writes[1:]:
        written.write.cancel(0)
    io.engine.drain()
    io.check(writes[0])
    for written in writes:
        assert written.write.is_done
        assert written.write.is_copied
        assert written.write.written_nbytes + written.write.cancelled_nbytes == 2 * SLAB_NBYTES
    assert io.engine.staging_in_use_nbytes == 0
    assert io.engine.inflight_nbytes == 0


def test_cancel_one_piece_keeps_its_neighbours(open_io: OpenIo) -> None:
    io = open_io(num_slabs=1, checksum=True)
    contents = [random_bytes(size, size) for size in (100, SLAB_NBYTES, 300, 2 * SLAB_NBYTES + 7, 500)]
    for victim in range(5):
        written = io.write(*contents)
        written.write.cancel(victim)
        written.write.wait()
        assert written.write.is_piece_copied(victim)
        for piece, content in enumerate(contents):
            if piece != victim:
                assert io.read(written, piece) == content
        with pytest.raises(RuntimeError, match="not cancelled"):
            io.start_read(written, victim)


def test_cancel_after_the_write_changes_nothing(open_io: OpenIo) -> None:
    io = open_io()
    written = io.write(random_bytes(5000))
    written.write.wait()
    events = io.engine.num_events
    written.write.cancel(0)
    written.write.cancel(0)
    assert written.write.cancelled_nbytes == 0
    assert io.engine.num_events == events


def test_cancelled_source_may_go_once_it_is_not_read(open_io: OpenIo) -> None:
    """A cancelled piece counts as copied only when no thread reads its memory any more; then it may be unmapped."""
    io = open_io(num_slabs=2)
    for seed in range(30):
        written = io.write(random_bytes(6 * SLAB_NBYTES, seed))
        written.write.cancel(0)
        written.write.wait_copied()
        written.sources[0].fill(0)
        written.sources.clear()
        io.kept.clear()
        io._next[0] = 0
        written.write.wait()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_pieces_any_cancels(open_io: OpenIo, data: st.DataObject) -> None:
    io = open_io(num_slabs=2, checksum=True)
    size = st.one_of(st.integers(1, 5000), st.integers(1, 3 * SLAB_NBYTES))
    layout = data.draw(st.lists(st.lists(size, min_size=1, max_size=5), min_size=1, max_size=5))
    writes = [io.write(*(random_bytes(n, n) for n in sizes)) for sizes in layout]
    cancelled = [data.draw(st.sets(st.integers(0, len(sizes) - 1))) for sizes in layout]
    for written, victims in zip(writes, cancelled, strict=True):
        for victim in victims:
            written.write.cancel(victim)
    for written, victims in zip(writes, cancelled, strict=True):
        written.write.wait_copied()
        for piece in set(range(len(written.contents))) - victims:
            assert io.read(written, piece) == written.contents[piece]
    io.engine.drain()
    assert io.engine.staging_in_use_nbytes == 0
    io.close()


# ---------------------------------------------------------------------------------------------------- errors


def test_flipped_byte_is_found(open_io: OpenIo) -> None:
    io = open_io(checksum=True)
    written = io.write(random_bytes(3 * SLAB_NBYTES))
    written.write.wait()
    block = Memory(io.block)
    view = memoryview(block._map)[: io.block]
    os.preadv(io.files[0].fd, [view], SLAB_NBYTES)
    view[7] ^= 1
    os.pwrite(io.files[0].fd, view, SLAB_NBYTES)
    view.release()
    read, _ = io.start_read(written, 0)
    read.wait()
    assert read.error is not None
    number, offset, nbytes, message = read.error
    assert (number, offset, nbytes) == (errno.EBADMSG, SLAB_NBYTES, SLAB_NBYTES)
    assert "checksum" in message
    assert io.engine.num_read_errors == 1


@pytest.mark.parametrize("length", [0, 100, 4096, 2 * SLAB_NBYTES, 2 * SLAB_NBYTES + 4096 + 10])
def test_truncated_file_is_an_error_not_zeros(open_io: OpenIo, length: int) -> None:
    io = open_io()
    written = io.write(random_bytes(3 * SLAB_NBYTES))
    written.write.wait()
    os.ftruncate(io.files[0].fd, length)
    read, _ = io.start_read(written, 0)
    read.wait()
    assert read.error is not None
    assert read.error[0] == errno.EIO
    assert read.error[3] == "end of file"
    assert io.engine.num_read_errors == -(-(3 * SLAB_NBYTES - length) // SLAB_NBYTES)


FAILING_WRITE = """
import errno, os, resource, signal, sys
sys.path[:0] = [{tests!r}]
from engine_tools import Io, SLAB_NBYTES, random_bytes

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
io = Io({kind!r}, {directory!r}, num_slabs=2, checksum=True)
limit = 2 * SLAB_NBYTES + 4096
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
written = io.write(random_bytes(5 * SLAB_NBYTES + 1000), random_bytes(300))
written.write.wait()
number, offset, nbytes = written.write.error  # of the chunk that failed first: any of the last four
assert number == errno.EFBIG and offset >= 2 * SLAB_NBYTES and offset % SLAB_NBYTES == 0
assert written.write.written_nbytes == 2 * SLAB_NBYTES
assert io.engine.num_write_errors == 4
assert io.engine.num_retries == 8
assert io.engine.rescued_nbytes == written.write.rescued_nbytes >= 3 * SLAB_NBYTES + 1300
assert io.engine.staging_in_use_nbytes == 0
io.check(written)
read, _ = io.start_read(written, 0)
read.wait()
assert (read.read_nbytes, read.forwarded_nbytes) == (2 * SLAB_NBYTES, 3 * SLAB_NBYTES + 1000)
written.write.cancel(0)
assert 0 < io.engine.rescued_nbytes <= SLAB_NBYTES
assert io.read(written, 1) == written.contents[1]
written.write.cancel(1)
assert io.engine.rescued_nbytes == 0
other = io.write(random_bytes(SLAB_NBYTES))
other.write.wait()
assert io.engine.rescued_nbytes == SLAB_NBYTES
engine = io.engine
io.close()
del other
assert engine.rescued_nbytes == 0
"""


def test_failed_write_is_rescued(kind: str, tmp_path: Path) -> None:
    """The disk stops taking bytes half way (a file size limit): training goes on with what memory holds.

    In a process of its own, as the limit is the process's.
    """
    script = FAILING_WRITE.format(tests=str(HELPERS), kind=kind, directory=str(tmp_path))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_bad_requests_are_refused(open_io: OpenIo) -> None:
    io = open_io()
    memory = Memory(8192)
    at, block = memory.address, io.block
    bad_writes = [
        (1, 0, block, [(at, 1, 0)]),
        (0, 1, block, [(at, 1, 0)]),
        (0, 0, block - 1, [(at, 1, 0)]),
        (0, 0, 0, [(at, 1, 0)]),
        (0, 0, 1 << 40, [(at, 1, 0)]),
        (0, 0, block, []),
        (0, 0, block, [(at, 0, 0)]),
        (0, 0, block, [(at, block + 1, 0)]),
        (0, 0, 2 * block, [(at, 1, 1)]),
        (0, 0, 2 * block, [(at, block + 1, 0), (at, 1, block)]),
        (0, 0, 2 * block, [(at, 1, block), (at, 1, 0)]),
    ]
    for arguments in bad_writes:
        with pytest.raises(ValueError, match="Expected"):
            io.engine.write(*arguments)
    written = io.write(random_bytes(block))
    written.write.wait()
    with pytest.raises(ValueError, match="capacity"):
        io.engine.read(written.write, 0, at, block - 1)
    with pytest.raises(IndexError, match="piece"):
        io.engine.read(written.write, 1, at, block)
    if io.files[0].memory_alignment > 1:
        with pytest.raises(ValueError, match="memory_alignment"):
            io.engine.read(written.write, 0, at + 1, block)
    assert io.engine.inflight_nbytes == 0
    io.check(written)


# ----------------------------------------------------------------------------------------- closing and forking


def test_close_is_idempotent_and_final(open_io: OpenIo) -> None:
    io = open_io()
    written = io.write(random_bytes(10))
    written.write.wait()
    io.engine.close()
    io.engine.close()
    assert io.engine.is_closed
    with pytest.raises(RuntimeError, match="Expected an open engine"):
        io.write(b"x")
    with pytest.raises(RuntimeError, match="Expected an open engine"):
        io.start_read(written, 0)
    for wait in (io.engine.drain, lambda: io.engine.wait_inflight(0)):
        with pytest.raises(RuntimeError, match="Expected an open engine"):
            wait()
    assert written.write.is_done


def test_close_with_work_queued(open_io: OpenIo) -> None:
    """Nobody waits for ever on a closed engine, and it does not read sources afterwards."""
    io = open_io(num_slabs=1)
    first = io.write(random_bytes(4 * SLAB_NBYTES))
    first.write.wait_copied()
    writes = [io.write(random_bytes(4 * SLAB_NBYTES)) for _ in range(20)]
    reads = [io.start_read(first, 0) for _ in range(20)]
    io.engine.close()
    for written in writes:
        assert written.write.is_done
        assert written.write.is_copied
        assert written.write.written_nbytes + written.write.cancelled_nbytes == 4 * SLAB_NBYTES
    for read, destination in reads:
        assert read.wait(0)
        if read.error is None:
            assert destination.bytes() == first.contents[0]
        else:
            assert read.error[0] == errno.ECANCELED


def test_closing_wakes_other_threads(open_io: OpenIo) -> None:
    io = open_io(num_slabs=1)
    written = io.write(random_bytes(200 * SLAB_NBYTES))
    waiters = [threading.Thread(target=written.write.wait) for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    io.engine.close()
    for waiter in waiters:
        waiter.join(60)
        assert not waiter.is_alive()


def test_many_threads_at_once(open_io: OpenIo) -> None:
    io = open_io(num_slabs=4, checksum=True)
    failures: list[BaseException] = []

    def work(worker: int) -> None:
        try:
            for step in range(25):
                offset = (worker * 25 + step) * 2 * SLAB_NBYTES
                content = random_bytes(SLAB_NBYTES + worker * 1000 + 1, worker * 100 + step)
                source = Memory(len(content), content)
                pieces = [(source.address, len(content), 0)]
                write = io.engine.write(0, offset, 2 * SLAB_NBYTES, pieces)
                write.wait_copied()
                back = Memory(2 * SLAB_NBYTES)
                assert io.engine.read(write, 0, back.address, back.nbytes).wait()
                assert back.bytes(len(content)) == content
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_dropping_everything_in_flight_is_safe(kind: str, tmp_path: Path) -> None:
    """The user's references go in any order; threads and descriptors go with them."""
    for warm_up in (True, False):
        threads, before = num_threads(), descriptors()
        io = Io(kind, tmp_path, num_slabs=2)
        sources = [Memory(8 * SLAB_NBYTES, random_bytes(8 * SLAB_NBYTES)) for _ in range(4)]
        for i, source in enumerate(sources):
            nbytes = 8 * SLAB_NBYTES
            io.engine.write(0, i * nbytes, nbytes, [(source.address, nbytes, 0)])
        del io
        gc.collect()
        assert warm_up or eventually(lambda: num_threads() <= threads), "threads were left behind"  # noqa: B023
        assert warm_up or eventually(lambda: not descriptors() - before), "descriptors were left behind"  # noqa: B023


def test_requests_outlive_the_engine(kind: str, tmp_path: Path) -> None:
    io = Io(kind, tmp_path)
    written = io.write(random_bytes(SLAB_NBYTES))
    written.write.wait()
    read, _ = io.start_read(written, 0)
    io.close()
    del io
    gc.collect()
    assert read.is_done
    written.write.cancel(0)
    written.write.wait()
    assert written.write.error is None


def _in_child(body: Callable[[], None]) -> int:
    """Exit status of a forked child that runs `body`: 0 when it returns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, about forking with threads
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_forked_child_can_neither_use_nor_harm(open_io: OpenIo) -> None:
    """A data loader worker inherits our objects, but not our threads: it must get an error, not a hang."""
    io = open_io(num_slabs=2)
    engine, file = io.engine, io.files[0]
    done = io.write(random_bytes(SLAB_NBYTES, 1))
    done.write.wait()
    read, _ = io.start_read(done, 0)
    written = io.write(random_bytes(20 * SLAB_NBYTES, 2))
    uses: list[Callable[[], Any]] = [
        lambda: engine.write(0, 0, SLAB_NBYTES, [(0, 1, 0)]),
        lambda: engine.read(done.write, 0, 0, SLAB_NBYTES),
        lambda: engine.wait_inflight(0),
        engine.drain,
        engine.close,
        written.write.wait,
        written.write.wait_copied,
        lambda: written.write.cancel(0),
        read.wait,
        lambda: file.grow(1 << 20),
        file.close,
    ]

    def child() -> None:
        for use in uses:
            with pytest.raises(RuntimeError, match="forked"):
                use()

    assert _in_child(child) == 0
    written.write.wait()
    io.check(written)
    io.check(done)


def test_forked_child_drops_what_it_inherited(kind: str, tmp_path: Path) -> None:
    """Destructors run in the child, in the middle of the parent's work, and must leave it alone."""
    held: list[Any] = [Io(kind, tmp_path, num_slabs=2)]
    contents = [random_bytes(20 * SLAB_NBYTES, seed) for seed in range(4)]
    held.extend(held[0].write(content) for content in contents)

    def child() -> None:
        held.clear()
        gc.collect()

    assert _in_child(child) == 0
    for written in held[1:]:
        written.write.wait()
        held[0].check(written)
    held[0].close()


# ------------------------------------------------------------------------------------------------ open_engine


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no writable /dev/shm")
def test_tmpfs(open_io: OpenIo) -> None:
    """Some kernels refuse direct I/O there; the bytes must come back either way."""
    io = open_io("/dev/shm", checksum=True)
    written = io.write(random_bytes(5 * SLAB_NBYTES + 17), random_bytes(3))
    written.write.wait()
    assert written.write.error is None
    io.check(written)


def test_open_engine_by_name(kind: str, tmp_path: Path) -> None:
    choice = open_engine(kind, [str(tmp_path)], 1 << 20, 1 << 16, True, 1 << 24)
    assert (choice.kind, choice.engine.kind, choice.fallbacks) == (kind, kind, [])
    assert choice.files[0].cap_nbytes == 1 << 24
    choice.engine.close()


def test_open_engine_shares_the_bound_between_directories(tmp_path: Path) -> None:
    choice = open_engine("auto", [str(tmp_path)] * 3, 1 << 20, 1 << 16, False, 3 << 20)
    assert [file.cap_nbytes for file in choice.files] == [1 << 20] * 3
    choice.engine.close()


def test_open_engine_takes_open_files(kind: str, tmp_path: Path) -> None:
    files = open_engine(kind, [str(tmp_path)], 1 << 20, 1 << 16).files
    choice = open_engine(kind, files, 1 << 20, 1 << 16)
    assert list(choice.files) == list(files)


def test_unknown_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected an engine among auto, io_uring, threads, python, kvikio, got 'aio'"):
        open_engine("aio", [str(tmp_path)], 1 << 20, 1 << 16)


def test_no_cpp_is_obeyed_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSDTRAIN_NO_CPP", "1")
    choice = open_engine("auto", [str(tmp_path)], 1 << 20, 1 << 16)
    assert choice.kind == "python"
    assert list(choice.fallbacks) == ["engines io_uring and threads are not available: SSDTRAIN_NO_CPP is set"]
    choice.engine.close()
    with pytest.raises(RuntimeError, match=r"Expected engine 'threads' to be available.*use engine='auto'"):
        open_engine("threads", [str(tmp_path)], 1 << 20, 1 << 16)


@pytest.mark.parametrize("number, name", [(None, "none"), (10**6, "1000000")])
def test_an_extension_of_other_source_code_is_not_used_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None, name: str
) -> None:
    """Else what is said is whatever fails first in it: an argument that it does not take, a name it does not have."""
    extension = pytest.importorskip("ssdtrain._C")
    monkeypatch.setattr(extension, "INTERFACE", number)
    choice = open_engine("auto", [str(tmp_path)], 1 << 20, 1 << 16)
    choice.close()
    assert choice.kind == "python"
    (said,) = choice.fallbacks
    why = f"{extension.__file__} does not belong to this source code (expected interface {INTERFACE}, got {name})"
    assert said.startswith(f"engines io_uring and threads are not available: {why}; build it anew: rm ")
    with pytest.raises(RuntimeError, match=r"Expected engine 'threads' to be available.* build it anew"):
        open_engine("threads", [str(tmp_path)], 1 << 20, 1 << 16)


@pytest.mark.parametrize("staging, slab", [(1 << 20, 1000), (1 << 20, 0), (4096, 8192)])
def test_sizes_that_do_not_fit_are_refused(kind: str, tmp_path: Path, staging: int, slab: int) -> None:
    with pytest.raises(ValueError, match="Expected"):
        open_engine(kind, [str(tmp_path)], staging, slab)


def test_crc32c_matches_the_standard() -> None:
    """Check value of CRC-32C, and the table against the processor's instruction at every alignment."""
    crc32c = pytest.importorskip("ssdtrain._C").crc32c
    assert crc32c(b"123456789") == crc32c(b"123456789", use_table=True) == 0xE3069283
    data = random_bytes(1000)
    for start in range(9):
        for stop in range(start, 200, 7):
            assert crc32c(data[start:stop]) == crc32c(data[start:stop], use_table=True)
