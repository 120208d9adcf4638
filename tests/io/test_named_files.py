"""Files that others know, through the engine: any range, any memory, every byte or an error that says which."""

from __future__ import annotations

import array
import errno
import gc
import logging
import multiprocessing
import os
import random
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from drives import Drive
from engine_tools import descriptors, eventually, num_threads, random_bytes
from fault_tools import Lab

from ssdtrain.io import File, FileEngine, PinnedBuffer, Request

BLOCK = 16 * 1024
SIZES = (0, 1, 511, 512, 4095, 4096, 4097, BLOCK, 5 * BLOCK + 4096, 7 * BLOCK + 13)


@pytest.fixture(params=["io_uring", "threads"])
def engine(request: pytest.FixtureRequest) -> Iterator[FileEngine]:
    with FileEngine(block_nbytes=BLOCK, queue_depth=4, engine=request.param) as opened:
        yield opened


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


# -- ranges and memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_file_has_exactly_the_bytes_that_were_written(engine: FileEngine, path: Path, nbytes: int) -> None:
    content = random_bytes(nbytes)
    with engine.open(path, "x") as file:
        assert file.write(content).result() == nbytes
        assert file.nbytes == nbytes and path.read_bytes() == content
        back = bytearray(nbytes)
        assert file.read(back).result() == nbytes
    assert back == content


@pytest.mark.parametrize("direct", [True, False])
def test_any_range_and_any_address(engine: FileEngine, path: Path, direct: bool) -> None:
    """What lies beside a range stays as it is, on the drive and in memory."""
    mirror = bytearray(random_bytes(1 << 18))
    path.write_bytes(mirror)
    generator = random.Random(0)
    with engine.open(path, "r+", direct=direct) as file:
        for _ in range(60):
            nbytes, shift = generator.choice(SIZES), generator.choice((0, 1, 512, 4096))
            offset = generator.choice((0, 1, 512, 4096, 8191, generator.randrange(1 << 17)))
            source = memoryview(generator.randbytes(shift + nbytes))[shift:]
            file.write(source, offset).result()
            mirror[offset : offset + nbytes] = source
            target = bytearray(b"\xee" * (shift + nbytes + 1))
            file.read(memoryview(target)[shift : shift + nbytes], offset).result()
            assert target == b"\xee" * shift + bytes(source) + b"\xee"
    assert path.read_bytes() == mirror


def test_writers_that_share_a_block_do_not_disturb_each_other(engine: FileEngine, path: Path) -> None:
    """A block that is read, changed and written back loses what another request puts into it meanwhile."""
    content = random_bytes(1 << 17)
    cuts = sorted({0, len(content), *random.Random(1).sample(range(len(content)), 100)})
    ranges = [slice(a, b) for a, b in pairwise(cuts)]
    random.Random(2).shuffle(ranges)
    with engine.open(path, "w") as file, ThreadPoolExecutor(4) as pool:
        requests = list(pool.map(lambda part: file.write(content[part], part.start), ranges))
        assert sum(request.result() for request in requests) == len(content)
    assert path.read_bytes() == content


def test_memory_of_every_kind(engine: FileEngine, path: Path) -> None:
    tensor = torch.arange(5000, dtype=torch.bfloat16)
    numbers = array.array("d", range(100))
    pinned = PinnedBuffer(8192)
    pinned.view[:] = random_bytes(8192)
    with engine.open(path, "w") as file:
        for source, target in (
            (tensor, torch.zeros_like(tensor)),
            (numbers, array.array("d", [0.0]) * 100),
            (pinned.view, PinnedBuffer(8192).view),
            (b"bytes", bytearray(5)),
            (torch.tensor(3.0), torch.tensor(0.0)),
        ):
            file.write(source, 100).result()
            file.read(target, 100).result()
            assert torch.equal(target, source) if isinstance(source, torch.Tensor) else target == source


@pytest.mark.parametrize(
    "memory, kind, words",
    [
        (b"read-only", TypeError, "that can be written to"),
        ("text", TypeError, "got str"),
        (memoryview(bytearray(10))[::2], TypeError, "contiguous"),
        (torch.zeros(4, 4).t(), ValueError, r"contiguous\(\)"),
        (torch.zeros(4, device="meta"), ValueError, "in host memory, got one on meta"),
    ],
    ids=range(5),
)
def test_memory_that_cannot_be_filled(engine: FileEngine, path: Path, memory: Any, kind: Any, words: str) -> None:
    with engine.open(path, "w") as file, pytest.raises(kind, match=words):
        file.read(memory)


# -- opening -----------------------------------------------------------------------------------------------------------


def test_modes(engine: FileEngine, path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        engine.open(path)
    assert caught.value.filename == str(path)
    engine.open(path, "rw").write(b"abc").result()
    with pytest.raises(FileExistsError):
        engine.open(path, "x")
    with engine.open(path, "rw") as file:
        assert file.nbytes == 3
    with engine.open(path, "r+") as file:
        file.truncate(2)
        file.flush()
        assert path.read_bytes() == b"ab"
    with engine.open(path, "w") as file:
        assert file.nbytes == 0
    with pytest.raises(ValueError, match="Expected a mode among r, r\\+, rw, w, x, got 'rb'"):
        engine.open(path, "rb")


def test_a_descriptor(engine: FileEngine, tmp_path: Path) -> None:
    """Of a file without a name, which stays open when the engine's is closed."""
    fd = os.open(tmp_path, os.O_RDWR | os.O_TMPFILE)
    os.write(fd, bytes(5000))
    with engine.open(fd) as file:
        file.write(random_bytes(10_000, 3), 4500).result()
    assert os.pread(fd, 20_000, 0) == bytes(4500) + random_bytes(10_000, 3)
    os.close(fd)


def test_a_descriptor_for_reading_only(engine: FileEngine, path: Path) -> None:
    path.write_bytes(b"abc")
    with path.open("rb") as opened, engine.open(opened.fileno()) as file:
        with pytest.raises(ValueError, match="open for writing"):
            file.write(b"x")
        back = bytearray(3)
        file.read(back).result()
        assert back == b"abc" and file.name == str(path)


def test_what_is_no_file_is_refused_at_once(engine: FileEngine, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(OSError, match="regular file") as caught:
            engine.open(path)
        assert caught.value.filename == str(path)
    ends = os.pipe()
    with pytest.raises(OSError, match="descriptor of a regular file"):
        engine.open(ends[0])
    for end in ends:
        os.close(end)


def test_a_file_system_in_memory(engine: FileEngine, small_tmpfs: Drive) -> None:
    content = random_bytes(100_001)
    with engine.open(small_tmpfs.directory / "file", "w") as file:
        file.write(content, 3).result()
        back = bytearray(100_001)
        file.read(back, 3).result()
    assert back == content


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [0, 1, 600, 4096, BLOCK, 2 * BLOCK + 700])
def test_a_short_read_says_how_much_there_is(engine: FileEngine, path: Path, there: int) -> None:
    path.write_bytes(random_bytes(100 + there))
    with engine.open(path) as file:
        request = file.read(bytearray(10 * BLOCK), 100)
        with pytest.raises(
            OSError, match=f"Expected to read {10 * BLOCK} bytes at offset 100, got {there}: end"
        ) as caught:
            request.result()
    assert caught.value.errno == errno.EIO and caught.value.filename == str(path)


def test_a_full_drive(engine: FileEngine, small_tmpfs: Drive) -> None:
    path = small_tmpfs.directory / "file"
    with engine.open(path, "w") as file:
        request = file.write(bytes(7 << 20))
        with pytest.raises(OSError, match=r"Expected to write 7340032 bytes at offset 0, got \d+: No space") as caught:
            request.result()
        assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
        file.truncate(0)
        assert file.write(b"again").result() == 5


def test_errors_that_nobody_asked_for(engine: FileEngine, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`synchronize` tells the first; what is left when the engine is closed is logged, each once."""
    path.write_bytes(b"abc")
    with engine.open(path) as file:
        for offset in range(100):
            file.read(bytearray(10), offset)
        with pytest.raises(OSError, match="Expected to read 10 bytes at offset 0, got 3: end of file"):
            engine.synchronize()
        engine.synchronize()
        file.read(bytearray(10), 1).wait()
        assert file.read(bytearray(10), 2).wait()
        asked = file.read(bytearray(10), 3)
        assert asked.exception() is not None
        with caplog.at_level(logging.WARNING, "ssdtrain"):
            engine.close()
    assert [text for text in (" at offset 1", " at offset 2", " at offset 3") if text in caplog.text] == [
        " at offset 1",
        " at offset 2",
    ]


def test_leaving_waits_and_tells(path: Path) -> None:
    """Nothing that was asked for is dropped in silence; after an exception nobody waits."""
    content = random_bytes(3 << 20)
    with FileEngine(block_nbytes=4096, queue_depth=1) as engine:
        engine.open(path, "w").write(content)
    assert path.read_bytes() == content
    with pytest.raises(OSError, match="got 3145728: end of file"), FileEngine() as engine:
        engine.open(path).read(bytearray(len(content) + 1))
    engine = FileEngine()
    engine.open(path).read(bytearray(len(content) + 1))
    engine.__exit__(KeyError, KeyError(), None)
    assert "closed" in repr(engine)


def test_what_closing_cancels_is_logged(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = FileEngine(block_nbytes=4096, queue_depth=1)
    file = engine.open(path, "w")
    requests = [file.write(bytes(1 << 20), i << 20) for i in range(20)]
    requests[5].cancel()
    with caplog.at_level(logging.WARNING, "ssdtrain"):
        engine.close()
    cancelled = sum(request.cancelled() for i, request in enumerate(requests) if i != 5)
    assert caplog.text.count("Nobody asked for the result of a request that failed") == cancelled


@pytest.mark.parametrize("offset", [-1, 1 << 63, 1 << 80, 0.5, None])
def test_offsets_that_no_file_has(engine: FileEngine, path: Path, offset: Any) -> None:
    with engine.open(path, "w") as file, pytest.raises(ValueError, match="Expected an offset of 0 or more"):
        file.write(b"x", offset)


def test_numbers_and_engines_that_make_no_sense() -> None:
    for options in ({"queue_depth": 0}, {"block_nbytes": -1}, {"num_threads": "4"}, {"block_nbytes": None}):
        with pytest.raises(ValueError, match=rf"Expected {next(iter(options))} of at least 1, got"):
            FileEngine(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected an engine among auto, io_uring, threads, got 'libaio'"):
        FileEngine(engine="libaio")


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSDTRAIN_NO_CPP", "1")
    with pytest.raises(RuntimeError, match="Expected the C\\+\\+ engine for files, got: SSDTRAIN_NO_CPP is set"):
        FileEngine()


# -- the life of a request ---------------------------------------------------------------------------------------------


def test_callbacks(engine: FileEngine, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each once, whatever another one does; they may make requests themselves."""
    done: list[Request] = []
    finished = threading.Event()

    def fail(request: Request) -> None:
        raise ValueError("in a callback")

    def go_on(request: Request) -> None:
        file.write(b"on", 8).add_done_callback(lambda _: finished.set())

    with engine.open(path, "w") as file, caplog.at_level(logging.ERROR, "ssdtrain"):
        requests = [file.write(bytes(5000), 5000 * i) for i in range(20)]
        requests[0].add_done_callback(fail)
        for request in requests:
            request.add_done_callback(done.append)
        assert eventually(lambda: len(done) == 20)
        requests[3].add_done_callback(go_on)
        assert finished.wait(60)
        assert sorted(map(id, done)) == sorted(map(id, requests)) and all(request.done() for request in done)
    assert "A callback of <write of 5000 bytes" in caplog.text


@pytest.mark.parametrize("kind", ["io_uring", "threads"])
def test_what_was_called_back_is_let_go(path: Path, kind: str) -> None:
    """An engine whose last callback knew it stayed open, with its threads and memory, until the process ended."""
    engine = FileEngine(block_nbytes=BLOCK, queue_depth=4, engine=kind)
    owner, called = weakref.ref(engine), threading.Event()

    def note(known: FileEngine, request: object) -> None:
        called.set()

    with engine.open(path, "w") as file:
        file.write(bytes(BLOCK)).add_done_callback(partial(note, engine))
    assert called.wait(60)
    del engine, file
    assert eventually(lambda: gc.collect() >= 0 and owner() is None)


def test_cancelling(path: Path) -> None:
    """What has not begun does not begin; whoever waits is told, and the engine goes on."""
    with path.open("wb") as made:
        made.truncate(64 << 20)
    target = bytearray(64 << 20)
    with FileEngine(block_nbytes=4096, queue_depth=1) as engine, engine.open(path) as file:
        for _ in range(50):  # each but for a thread that sleeps longer than 16,384 reads take
            request = file.read(target)
            if request.cancel() and request.wait() and request.cancelled():
                break
        assert request.done() and request.cancelled() and not request.cancel()
        with pytest.raises(OSError, match="it was cancelled") as caught:
            request.result()
        assert caught.value.errno == errno.ECANCELED
        assert file.read(bytearray(100)).result() == 100


def test_closing_ends_every_request(engine: FileEngine, path: Path) -> None:
    path.write_bytes(random_bytes(1 << 20))
    file = engine.open(path)
    told: list[Request] = []
    requests = [file.read(bytearray(1 << 20)) for _ in range(30)]
    for request in requests:
        request.add_done_callback(told.append)
    engine.close()
    engine.close()
    assert all(request.done() for request in requests) and len(told) == 30
    for request in requests:
        error = request.exception()
        assert error is None or (error.errno == errno.ECANCELED and "the engine was closed" in str(error))
    with pytest.raises(RuntimeError, match="Expected an open engine, got a closed one"):
        file.read(bytearray(1))


def test_a_closed_file(engine: FileEngine, path: Path) -> None:
    """What is under way ends; the descriptor is closed then."""
    before = descriptors()
    file = engine.open(path, "w")
    request = file.write(bytes(1 << 20))
    file.close()
    file.close()
    assert request.result() == 1 << 20
    assert eventually(lambda: descriptors() <= before)
    with pytest.raises(ValueError, match="Expected an open file, got a closed one"):
        file.write(b"x")


def test_nobody_needs_to_keep_anything(path: Path) -> None:
    """Memory, file and engine stay as long as a request needs them; then all goes."""
    before, threads = descriptors(), num_threads()
    content = random_bytes(3 << 20)

    def leave_behind() -> None:
        engine = FileEngine(block_nbytes=BLOCK, queue_depth=2)
        file = engine.open(path, "w")
        for at in range(0, len(content), 1 << 18):
            file.write(bytearray(content[at : at + (1 << 18)]), at)
        engine.synchronize()
        file.read(bytearray(1 << 20))

    leave_behind()
    gc.collect()
    assert path.read_bytes() == content
    assert eventually(lambda: descriptors() <= before and num_threads() <= threads)


def test_memory_is_let_go_when_a_request_is_done(engine: FileEngine, path: Path) -> None:
    """A `bytearray` cannot change its length while its memory is in use."""
    memory = bytearray(100)
    with engine.open(path, "w") as file:
        file.write(memory).result()
        memory.append(0)
        for _ in range(40):
            file.write(memory)  # nobody waits for it
        engine.synchronize()
        memory.append(0)


def test_waiting_has_an_end(engine: FileEngine, path: Path) -> None:
    with engine.open(path, "w") as file:
        request = file.write(bytes(4 << 20))
        assert request.wait(60) and request.result(0.0) == 4 << 20 and request.exception() is None


def _use_in_child(file: File, engine: FileEngine) -> None:
    with pytest.raises(RuntimeError, match="forked child"):
        file.read(bytearray(1))
    with pytest.raises(RuntimeError, match="forked child"):
        engine.synchronize()
    del file, engine
    gc.collect()
    os._exit(7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_can_neither_use_nor_harm(engine: FileEngine, path: Path) -> None:
    with engine.open(path, "w") as file:
        file.write(b"abc").result()
        child = multiprocessing.get_context("fork").Process(target=_use_in_child, args=(file, engine))
        child.start()
        child.join(60)
        assert child.exitcode == 7
        assert file.read(bytearray(3)).result() == 3


def test_pinned_memory() -> None:
    buffer = PinnedBuffer(100_000)
    assert len(buffer) == 100_000 and buffer.is_locked == (not buffer.reason)
    assert torch.frombuffer(buffer.view, dtype=torch.uint8).data_ptr() % 4096 == 0
    assert len(PinnedBuffer(0)) == 0
    with pytest.raises(ValueError, match="Expected a size of 0 or more"):
        PinnedBuffer(-1)


def _close_a_stuck_drive(folder: str) -> None:
    reader, writer = os.pipe()
    os.environ["FAKE_GATE"] = str(reader)  # every write waits for a byte
    engine = FileEngine(block_nbytes=4096, queue_depth=2, num_threads=2, engine="threads")
    left, right = engine.open(f"{folder}/left", "w"), engine.open(f"{folder}/right", "w")
    memory = bytearray(4096)
    requests = [left.write(memory), right.write(memory), right.write(memory, 4096)]
    for timeout in (0.0, 0.1):
        with pytest.raises(TimeoutError, match=r"got [23] that are not") as caught:
            engine.close(timeout)
        assert f"1 on '{folder}/left'" in str(caught.value) and f" on '{folder}/right'" in str(caught.value)
    with pytest.raises(TimeoutError), engine:  # leaving waits no longer either
        engine.close(timeout=0.0)
    assert "closing" in repr(engine) and not requests[0].done()
    with pytest.raises(BufferError):
        memory.append(0)
    with pytest.raises(RuntimeError, match="Expected an open engine, got one that is being closed"):
        left.write(b"x")
    os.write(writer, b"..")
    engine.close(timeout=60)
    engine.close(timeout=0)
    engine.close()
    assert requests[0].result() == requests[1].result() == 4096 and requests[2].cancelled()
    memory.append(0)
    assert os.path.getsize(f"{folder}/left") == os.path.getsize(f"{folder}/right") == 4096
    requests[2].exception()


def test_closing_waits_as_long_as_one_says(lab: Lab, tmp_path: Path) -> None:
    """A drive that does not answer keeps what is with it, not whoever closes; what has not begun never does."""
    lab.run(_close_a_stuck_drive, tmp_path)


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_times_that_nobody_can_wait(engine: FileEngine, timeout: float) -> None:
    with pytest.raises(ValueError, match="Expected a timeout of 0 or more seconds, or None, got"):
        engine.close(timeout)


def test_closing_in_time_is_like_closing(engine: FileEngine, path: Path) -> None:
    with engine.open(path, "w") as file:
        requests = [file.write(bytes(4096), 4096 * i) for i in range(50)]
        engine.close(timeout=60)
    assert all(request.done() and (request.cancelled() or request.result() == 4096) for request in requests)
