"""What only the kvikio engine promises. Run by `test_kvikio.py` in a process with a stand-in driver and `preload.c`.

kvikio is the real one, and so are files and threads. Device memory is the stand-in's: no host access survives it, so
bytes that arrive have gone through the driver's copies, as kvikio's POSIX mode does it on a GPU.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import inside
import pytest
from engine_tools import SLAB_NBYTES, Io, Written, random_bytes, round_up
from engine_tools import Memory as HostMemory
from fault_tools import Trainer, check_equal, check_error, check_steps, plain_steps, policy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ssdtrain
from ssdtrain.io.kvikio import GpuDirect, KvikioEngine, SpillFile, prefer
from ssdtrain.io.kvikio.files import as_os_error
from ssdtrain.io.kvikio.memory import Driver, Memory
from ssdtrain.io.open_engine import gpudirect, open_engine

SIZES = [1, 511, 512, 4095, 4096, 4097, SLAB_NBYTES, 3 * SLAB_NBYTES + 1, 40 * SLAB_NBYTES - 5]


@pytest.fixture
def open_io(tmp_path: Path) -> Iterator[Callable[..., Io]]:
    opened: list[Io] = []

    def make(**options: object) -> Io:
        opened.append(Io("kvikio", tmp_path, **options))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for io in opened:
        io.close()
    assert list(tmp_path.iterdir()) == []


class Fence:
    """Bytes of device memory are there only once somebody has waited for them."""

    device_index = 0

    def __init__(self, work: Callable[[], object] = lambda: None) -> None:
        self._work = work
        self._lock = threading.Lock()
        self.num_waits = 0

    def synchronize(self) -> None:
        with self._lock:
            if self.num_waits == 0:
                time.sleep(0.01)
                self._work()
            self.num_waits += 1


class Gpu:
    """Device memory of a test."""

    def __init__(self) -> None:
        self.driver = Driver()
        self._stack = ExitStack()

    def allocate(self, nbytes: int) -> Memory:
        return self._stack.enter_context(self.driver.allocated(nbytes, 0))

    def fill(self, memory: Memory, content: bytes) -> None:
        self.driver.write(Memory(memory.address, len(content)), memoryview(bytearray(content)), 0)

    def bytes(self, memory: Memory, nbytes: int) -> bytes:
        return bytes(self.driver.read(Memory(memory.address, nbytes), 0))

    def write(self, io: Io, *contents: bytes) -> Written:
        """Begins to write pieces that a kernel, so to say, has not produced yet."""
        memories = [self.allocate(len(content)) for content in contents]

        def produce() -> None:
            for memory, content in zip(memories, contents, strict=True):
                self.fill(memory, content)

        pieces, at = [], 0
        for memory in memories:
            pieces.append((*memory, at))
            at += round_up(memory.nbytes, io.block)
        offset, io._next[0] = io._next[0], io._next[0] + at
        write = io.engine.write(0, offset, at, pieces, producer=Fence(produce))
        return Written(write, contents)

    def read(self, io: Io, written: Written, piece: int = 0) -> bytes:
        """The piece as it comes back to memory that another kernel still uses when the read begins."""
        nbytes = len(written.contents[piece])
        memory = self.allocate(round_up(nbytes, io.block))
        fence = Fence(lambda: self.fill(memory, b"\xee" * memory.nbytes))
        read = io.engine.read(written.write, piece, *memory, ready=fence)
        assert read.wait(60) and read.error is None, read.error
        assert fence.num_waits > 0
        return self.bytes(memory, nbytes)

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    gpu = Gpu()
    yield gpu
    gpu.close()


# ------------------------------------------------------------------------------------------------- device memory


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("nbytes", SIZES)
def test_device_bytes_come_back(open_io: Callable[..., Io], gpu: Gpu, nbytes: int, checksum: bool) -> None:
    """The engine waits for the producer of what it writes, and for the last user of what it fills."""
    io = open_io(checksum=checksum)
    written = gpu.write(io, random_bytes(nbytes))
    assert not written.write.is_done
    written.write.wait()
    assert written.write.error is None
    assert written.write.written_nbytes == nbytes
    assert gpu.read(io, written) == written.contents[0]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 3 * SLAB_NBYTES), min_size=1, max_size=6))
def test_device_pieces_share_an_extent(open_io: Callable[..., Io], gpu: Gpu, sizes: list[int]) -> None:
    io = open_io(num_slabs=3)
    written = gpu.write(io, *(random_bytes(size, size) for size in sizes))
    written.write.wait()
    for piece, content in enumerate(written.contents):
        assert gpu.read(io, written, piece) == content
    io.close()


def test_device_bytes_come_back_to_the_host(open_io: Callable[..., Io], gpu: Gpu) -> None:
    io = open_io()
    written = gpu.write(io, random_bytes(2 * SLAB_NBYTES + 5))
    written.write.wait()
    io.check(written)


def test_device_bytes_are_rescued(open_io: Callable[..., Io], gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drive refuses everything: the bytes are copied to the host before the tensor may go, and come back."""
    io = open_io(num_slabs=2)
    monkeypatch.setenv("FAKE_WRITES", "e*")
    written = gpu.write(io, random_bytes(3 * SLAB_NBYTES + 7), random_bytes(100))
    written.write.wait()
    monkeypatch.delenv("FAKE_WRITES")
    assert written.write.error is not None and written.write.error[0] == errno.EIO
    assert written.write.is_copied
    assert io.engine.rescued_nbytes == written.write.rescued_nbytes >= 3 * SLAB_NBYTES + 107
    assert [gpu.read(io, written, piece) for piece in range(2)] == list(written.contents)
    io.check(written)
    for piece in range(2):
        written.write.cancel(piece)
    assert io.engine.rescued_nbytes == 0


def test_what_cannot_be_rescued_stays(open_io: Callable[..., Io], gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device does not give its bytes either: the source never counts as copied, and nobody waits for it."""
    io = open_io()
    memory = gpu.allocate(SLAB_NBYTES)
    monkeypatch.setenv("STUB_COPY_ERROR", "700")
    write = io.engine.write(0, 0, SLAB_NBYTES, [(*memory, 0)], producer=Fence())
    write.wait()
    write.wait_copied()
    assert write.error is not None and not write.is_copied and write.rescued_nbytes == 0
    with pytest.raises(RuntimeError, match="to be copied"):
        io.engine.read(write, 0, *memory, ready=Fence())


def test_a_read_that_the_device_refuses(open_io: Callable[..., Io], gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    io = open_io()
    written = gpu.write(io, random_bytes(SLAB_NBYTES))
    written.write.wait()
    memory = gpu.allocate(SLAB_NBYTES)
    monkeypatch.setenv("STUB_COPY_ERROR", "700")
    read = io.engine.read(written.write, 0, *memory, ready=Fence())
    assert read.wait(60)
    assert read.error is not None and read.error[:3] == (errno.EIO, 0, SLAB_NBYTES)
    assert "CUDA_ERROR_STUB" in read.error[3]


def test_a_fence_that_fails(open_io: Callable[..., Io], gpu: Gpu) -> None:
    def fail() -> None:
        raise RuntimeError("a kernel has crashed")

    io = open_io()
    memory = gpu.allocate(SLAB_NBYTES)
    write = io.engine.write(0, 0, SLAB_NBYTES, [(*memory, 0)], producer=Fence(fail))
    write.wait()
    assert write.error == (errno.EIO, 0, SLAB_NBYTES)
    written = gpu.write(io, random_bytes(SLAB_NBYTES))
    written.write.wait()
    read = io.engine.read(written.write, 0, *memory, ready=Fence(fail))
    assert read.wait(60)
    assert read.error is not None and "a kernel has crashed" in read.error[3]


# ---------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "steps, number, retries",
    [
        ("iiiiii", None, 0),
        ("aaa", None, 0),
        ("ssss", None, 0),
        ("ee", None, 2),
        ("sisese", None, 2),
        ("eee", errno.EIO, 2),
        ("nnn", errno.ENOSPC, 2),
    ],
)
def test_writes_that_falter(
    open_io: Callable[..., Io], monkeypatch: pytest.MonkeyPatch, steps: str, number: int | None, retries: int
) -> None:
    """Interrupted and short writes go on, failed ones are tried twice more; whatever happens, the bytes are there."""
    io = open_io(num_slabs=1)
    monkeypatch.setenv("FAKE_WRITES", steps)
    written = io.write(random_bytes(SLAB_NBYTES))
    written.write.wait()
    monkeypatch.delenv("FAKE_WRITES")
    assert written.write.error == (None if number is None else (number, 0, SLAB_NBYTES))
    assert io.engine.num_retries == retries
    assert io.engine.rescued_nbytes == (0 if number is None else SLAB_NBYTES)
    written.sources[0].fill(0)
    io.check(written)


@pytest.mark.parametrize(
    "steps, number, retries",
    [("iiiiii", None, 0), ("aaa", None, 0), ("ssss", None, 0), ("ee", None, 2), ("sisese", None, 2), ("eee", 5, 2)],
)
def test_reads_that_falter(
    open_io: Callable[..., Io], monkeypatch: pytest.MonkeyPatch, steps: str, number: int | None, retries: int
) -> None:
    io = open_io(num_slabs=1)
    written = io.write(random_bytes(SLAB_NBYTES))
    written.write.wait()
    monkeypatch.setenv("FAKE_READS", steps)
    read, memory = io.start_read(written, 0)
    assert read.wait(60)
    monkeypatch.delenv("FAKE_READS")
    assert read.error == (None if number is None else (number, 0, SLAB_NBYTES, "Input/output error"))
    assert (io.engine.num_retries, io.engine.num_read_errors) == (retries, int(number is not None))
    assert number is not None or memory.bytes() == written.contents[0]
    io.check(written)


def test_cancel_before_the_write_begins(open_io: Callable[..., Io], monkeypatch: pytest.MonkeyPatch) -> None:
    """The drive holds the first chunk; what waits behind it is dropped, and its sources are free at once."""
    reader, writer = os.pipe()
    io = open_io(num_slabs=1)
    monkeypatch.setenv("FAKE_GATE", str(reader))
    first = io.write(random_bytes(SLAB_NBYTES))
    second = io.write(random_bytes(SLAB_NBYTES, 1), random_bytes(SLAB_NBYTES, 2))
    assert not first.write.is_copied and io.engine.inflight_nbytes == 3 * SLAB_NBYTES
    assert not io.engine.wait_inflight(0, 0.05)
    second.write.cancel(0)
    assert second.write.is_piece_copied(0) and not second.write.is_piece_copied(1)
    second.write.cancel(1)
    assert second.write.is_done and second.write.is_copied
    assert second.write.cancelled_nbytes == 2 * SLAB_NBYTES
    os.write(writer, b".")
    first.write.wait()
    monkeypatch.delenv("FAKE_GATE")
    io.check(first)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(
    "text, number, message",
    [
        ("KvikIO failure at: posix_io.hpp:1: POSIX error on pread: EOF", errno.EIO, "end of file"),
        ("KvikIO failure at: posix_io.hpp:1: POSIX error on pwrite: No space left on device", errno.ENOSPC, None),
        ("Unable to write file: Input/output error", errno.EIO, None),
        ("cuFile error at: x.hpp:1: GPUDirect Storage not supported", errno.EIO, "cuFile error at: x.hpp:1: GPUDirect"),
    ],
)
def test_errors_get_their_number_back(text: str, number: int, message: str | None) -> None:
    error = as_os_error(RuntimeError(text))
    assert error.errno == number
    assert str(error.strerror).startswith(message or os.strerror(number))


# --------------------------------------------------------------------------------------------------------- process


def test_alignment_is_a_page(tmp_path: Path) -> None:
    file = SpillFile(str(tmp_path), None)
    assert file.block_nbytes >= 4096 and file.block_nbytes % 4096 == 0
    file.close()


def test_concurrency_is_bounded_by_staging(tmp_path: Path) -> None:
    for num_slabs, num_threads in ((1, 1), (3, 3), (100, 8)):
        before = threading.active_count()
        io = Io("kvikio", tmp_path, num_slabs=num_slabs)
        assert threading.active_count() - before == num_threads + 1  # one more for what is in memory
        assert io.engine.staging_nbytes == 0
        io.close()
        assert threading.active_count() == before


def test_a_forked_child_is_told(open_io: Callable[..., Io], tmp_path: Path) -> None:
    """kvikio's own threads stay in the parent: a new engine in the child would wait for them for ever."""
    io = open_io()
    written = io.write(random_bytes(SLAB_NBYTES))
    written.write.wait()
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, about forking with threads
        pid = os.fork()
    if pid == 0:
        try:
            open_engine("kvikio", [str(tmp_path)], 1 << 20, 1 << 16)
        except BaseException as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    assert "its threads do not follow a fork: use spawn" in os.read(reader, 4096).decode()
    os.close(reader)
    io.check(written)


# -------------------------------------------------------------------------------------------------- truth and choice


def test_the_verdict_of_this_machine(tmp_path: Path) -> None:
    """No GPU is here, so whatever this kernel and container have, it is POSIX mode, with a reason."""
    verdict = gpudirect([str(tmp_path)])
    assert verdict.mode == "posix" and verdict.sentence.startswith("POSIX mode of kvikio: ")


def test_cufile_is_tried_within_a_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KVIKIO_COMPAT_MODE=OFF leads straight to the real cuFile, which never returns on the stand-in driver."""
    monkeypatch.setenv("KVIKIO_COMPAT_MODE", "OFF")
    choice = open_engine("kvikio", [str(tmp_path)], 1 << 20, 1 << 16)
    assert isinstance(choice.engine, KvikioEngine)
    assert choice.engine.gpudirect.mode == "posix"
    assert "no answer within" in choice.reason
    choice.close()
    assert not os.path.exists("cufile.log")


def test_reason_and_notes_carry_the_sentence(tmp_path: Path) -> None:
    choice = open_engine("kvikio", [str(tmp_path)], 1 << 20, 1 << 16, True, 1 << 24)
    assert isinstance(choice.engine, KvikioEngine)
    sentence = choice.engine.gpudirect.sentence
    assert choice.reason == f"asked for by name; {sentence}"
    assert sentence in choice.shortcomings()
    choice.close()


def test_auto_without_gpudirect_says_why_not_kvikio(tmp_path: Path) -> None:
    choice = open_engine("auto", [str(tmp_path)], 1 << 20, 1 << 16, device_index=0)
    assert choice.kind != "kvikio" and "kvikio is not preferred: POSIX mode of kvikio" in choice.reason
    choice.close()


@pytest.fixture
def pretend_gpudirect(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The sentence of a verdict that GPUDirect is real. Engines opened by name keep to POSIX mode."""
    real = GpuDirect("gpudirect", ("so it is said",))
    monkeypatch.setattr(prefer, "probe", lambda directories: real)
    prefer.pays.cache_clear()
    yield real.sentence
    prefer.pays.cache_clear()


@pytest.mark.parametrize("seconds_of_kvikio, wins", [(1.0, True), (3.0, False)])
def test_auto_takes_what_is_measured_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretend_gpudirect: str, seconds_of_kvikio: float, wins: bool
) -> None:
    """Bytes really move; the clock is a stand-in, as there is no GPU whose speed could be told."""
    measured, durations = prefer.moved_per_second, iter((2.0, seconds_of_kvikio))

    def timed(side: prefer.Side, memory: Memory, fence: Fence | None = None) -> float:
        ticks = itertools.count(0.0, next(durations))
        return measured(side, memory, fence, lambda: next(ticks))

    monkeypatch.setattr(prefer, "moved_per_second", timed)
    for _ in range(2):  # the second time it is remembered
        choice = open_engine("auto", [str(tmp_path)], 1 << 20, 1 << 16, device_index=0)
        assert (choice.kind == "kvikio") is wins
        rate = 2 * (64 << 20) / 1e9
        figures = f"measured {rate / seconds_of_kvikio:.2f} GB/s, {rate / 2:.2f} GB/s through slabs"
        assert f"{pretend_gpudirect}; {figures}" in choice.reason
        assert ("kvikio is not preferred" in choice.reason) is not wins
        choice.close()
    assert threading.active_count() == 1


def test_auto_goes_on_when_nothing_can_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretend_gpudirect: str
) -> None:
    def refuse(*arguments: object) -> tuple[bool, str]:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(prefer, "is_faster", refuse)
    choice = open_engine("auto", [str(tmp_path)], 1 << 20, 1 << 16, device_index=0)
    assert choice.kind != "kvikio" and "it could not be measured" in choice.reason
    choice.close()


def test_a_failed_write_measures_as_nothing(open_io: Callable[..., Io], monkeypatch: pytest.MonkeyPatch) -> None:
    io, pages = open_io(num_slabs=32), HostMemory(1 << 20)
    place = Memory(pages.address, pages.nbytes)
    assert prefer.moved_per_second((io.engine, io.files), place) > 0
    monkeypatch.setenv("FAKE_WRITES", "e*")
    assert prefer.moved_per_second((io.engine, io.files), place) == 0


# --------------------------------------------------------------------------------------------------------- training


def test_training_is_equal_to_the_bit(tmp_path: Path) -> None:
    offload = ssdtrain.offload_activations(tmp_path, policy=policy("kvikio"))
    check_steps(offload)
    stats = offload.stats
    assert stats.engine == "kvikio" and stats.written_nbytes > 0 and stats.read_nbytes > 0
    assert "POSIX mode of kvikio" in stats.engine_reason
    assert any("POSIX mode of kvikio" in text for text in stats.fallbacks)
    offload.close()
    assert list(tmp_path.iterdir()) == []


def test_training_with_checksums(tmp_path: Path) -> None:
    offload = ssdtrain.offload_activations(tmp_path, policy=policy("kvikio", checksum=True))
    check_steps(offload)
    assert offload.stats.read_nbytes > 0
    offload.close()


@pytest.mark.parametrize("faults", ["e*", "n*", "sisisisis", "eeeeeeee"])
def test_training_goes_on_when_writes_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: str) -> None:
    offload = ssdtrain.offload_activations(tmp_path, policy=policy("kvikio"))
    trainer, expected = Trainer(), plain_steps()
    check_equal(trainer.step(offload), expected[0])
    monkeypatch.setenv("FAKE_WRITES", faults)
    check_equal(trainer.step(offload), expected[1])
    monkeypatch.delenv("FAKE_WRITES")
    check_equal(trainer.step(offload), expected[2])
    offload.close()


def test_training_names_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offload = ssdtrain.offload_activations(tmp_path, policy=policy("kvikio", prefetch_nbytes=0))

    def break_reads() -> None:
        transport = inside.transport(offload)
        assert transport is not None
        transport.engine.drain()
        monkeypatch.setenv("FAKE_READS", "e*")

    with pytest.raises(OSError, match="record ") as caught:
        Trainer().step(offload, break_reads)
    monkeypatch.delenv("FAKE_READS")
    check_error(caught.value, str(tmp_path), errno.EIO)
    del caught
    offload.close()
