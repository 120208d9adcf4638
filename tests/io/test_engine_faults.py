"""Other kernels, other file systems and failing drives, played by a library preloaded into the engine's process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_tools import KINDS
from folders import HELPERS

PRELUDE = f"""
import errno, os, signal, stat, sys, time
sys.path[:0] = [{str(HELPERS)!r}]
from engine_tools import Io, Memory, SLAB_NBYTES, implementation, random_bytes
from ssdtrain.io.open_engine import open_engine
kind, directory = sys.argv[1:]
"""

Run = Callable[..., None]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the library that plays the faults")
    target = tmp_path_factory.mktemp("preload") / "preload.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", target, HELPERS / "preload.c", "-ldl"], check=True)
    return target


@pytest.fixture
def run(library: Path, tmp_path: Path) -> Run:
    """Runs a script with the library preloaded; it gets `kind` and a directory, which must be empty afterwards."""

    def run_script(kind: str, script: str, **environment: str) -> None:
        command = [sys.executable, "-c", PRELUDE + textwrap.dedent(script), kind, str(tmp_path)]
        env = os.environ | {"LD_PRELOAD": str(library)} | environment
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
        assert result.returncode == 0, result.stderr
        assert list(tmp_path.iterdir()) == []

    return run_script


@pytest.mark.parametrize("kind", KINDS)
def test_no_tmpfile(run: Run, kind: str) -> None:
    """Where files cannot be made without a name, the name is gone at once and nobody else could open it."""
    run(
        kind,
        """
        file = implementation(kind).SpillFile(directory, None)
        assert os.listdir(directory) == []
        status = os.fstat(file.fd)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_nlink == 0
        assert not os.get_inheritable(file.fd)
        """,
        FAKE_NO_TMPFILE="1",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_direct_io(run: Run, kind: str) -> None:
    """Through the page cache the bytes come back too, from any address, and do not stay in the cache."""
    run(
        kind,
        """
        io = Io(kind, directory, num_slabs=2, checksum=True)
        assert not io.files[0].is_direct
        assert io.files[0].direct_reason == "buffered: the file system refuses O_DIRECT"
        assert io.files[0].memory_alignment == 1
        written = io.write(random_bytes(5 * SLAB_NBYTES + 1), random_bytes(100))
        written.write.wait()
        assert written.write.error is None
        io.check(written)
        odd = Memory(io.block + 1)
        assert io.engine.read(written.write, 1, odd.address + 1, io.block).wait()
        assert odd.bytes()[1:101] == written.contents[1]
        os.ftruncate(io.files[0].fd, SLAB_NBYTES + 10)
        read, _ = io.start_read(written, 0)
        read.wait()
        assert read.error[0] == errno.EIO and read.error[3] == "end of file"
        io.close()
        """,
        FAKE_NO_DIRECT="1",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_fallocate(run: Run, kind: str) -> None:
    run(
        kind,
        """
        io = Io(kind, directory)
        assert "no fallocate" in io.files[0].fallocate_reason
        assert os.fstat(io.files[0].fd).st_size == io.files[0].nbytes == 16 << 20
        written = io.write(random_bytes(100000))
        written.write.wait()
        io.check(written)
        io.close()
        """,
        FAKE_NO_FALLOCATE="1",
    )


def test_io_uring_forbidden(run: Run) -> None:
    """Many containers forbid io_uring: threads take over and say so; by name it is an error with the way out."""
    run(
        "auto",
        """
        choice = open_engine("auto", [directory], 1 << 20, 1 << 16)
        assert choice.kind == "threads"
        assert len(choice.fallbacks) == 1
        assert "io_uring is not available" in choice.reason and "Operation not permitted" in choice.reason
        choice.engine.close()
        try:
            open_engine("io_uring", [directory], 1 << 20, 1 << 16)
        except RuntimeError as error:
            assert "Expected engine 'io_uring' to be available" in str(error)
            assert "use engine='auto'" in str(error)
        else:
            raise AssertionError("io_uring opened")
        """,
        FAKE_NO_URING="1",
    )


def test_buffers_that_cannot_be_registered(run: Run) -> None:
    run(
        "io_uring",
        """
        io = Io(kind, directory)
        assert not io.engine.registered_buffers
        assert io.engine.notes == ["buffers not registered: Cannot allocate memory (see ulimit -l)"]
        written = io.write(random_bytes(3 * SLAB_NBYTES + 5))
        written.write.wait()
        io.check(written)
        io.close()
        """,
        FAKE_NO_REGISTER="1",
    )


GATED = """
reader, writer = os.pipe()
io = Io(kind, directory, num_slabs=4, num_threads=1)
os.environ["FAKE_GATE"] = str(reader)
"""


@pytest.mark.parametrize("kind", ["threads", "python"])
def test_read_from_memory_while_the_write_waits(run: Run, kind: str) -> None:
    """The drive does not answer at all; with one more thread the bytes come back from the slabs."""
    run(
        kind,
        GATED.replace("num_threads=1", "num_threads=2")
        + """
written = io.write(random_bytes(3 * SLAB_NBYTES))
written.write.wait_copied()
assert not written.write.is_done
if kind == "threads":
    for _ in range(3):
        read, memory = io.start_read(written, 0)
        assert read.wait() and read.error is None
        assert memory.bytes() == written.contents[0]
        assert (read.read_nbytes, read.forwarded_nbytes) == (0, 3 * SLAB_NBYTES)
assert io.engine.staging_in_use_nbytes == io.engine.peak_staging_nbytes == 3 * SLAB_NBYTES
assert io.engine.inflight_nbytes == 3 * SLAB_NBYTES
assert not io.engine.wait_inflight(0, 0.01)
os.write(writer, b"." * 3)
written.write.wait()
assert io.engine.staging_in_use_nbytes == 0
io.check(written)
os._exit(0)
""",
    )


@pytest.mark.parametrize("kind", ["threads", "python"])
def test_what_somebody_waits_for_is_read_first(run: Run, kind: str) -> None:
    """Reads go in order, those that are waited for before the others, all of them before writes."""
    run(
        kind,
        """
reader, writer = os.pipe()
io = Io(kind, directory, num_slabs=4, num_threads=1)
written = io.write(*[random_bytes(1000, seed) for seed in range(6)])
written.write.wait()
os.environ["FAKE_READ_GATE"] = str(reader)
reads = [io.start_read(written, piece)[0] for piece in range(6)]
while reads[0].moments[1] == 0.0:      # it is at the drive
    pass
other = io.write(random_bytes(1000))
assert not reads[4].wait(0.01)
reads[3].expedite()
order = []
for _ in reads:
    os.write(writer, b".")
    while not any(read.is_done for i, read in enumerate(reads) if i not in order):
        pass
    order.append(next(i for i, read in enumerate(reads) if i not in order and read.is_done))
assert order == [0, 3, 4, 1, 2, 5], order
other.write.wait()
assert other.write.moments[3] > max(read.moments[1] for read in reads)
io.close()
""",
    )


@pytest.mark.parametrize("kind", ["threads", "python"])
def test_a_drive_is_silent_only_while_it_owes_an_answer(run: Run, kind: str) -> None:
    """What waits for its turn is owed nothing yet, and every answer counts, whoever it is for."""
    run(
        kind,
        GATED
        + """
first, second = io.write(random_bytes(SLAB_NBYTES)).write, io.write(random_bytes(SLAB_NBYTES)).write
begun = time.monotonic()
while io.engine.silent_seconds(0) < 0.2:
    pass
assert io.engine.silent_seconds(0) <= time.monotonic() - begun + 1
answered = time.monotonic()
os.write(writer, b".")
while not second.moments[3]:
    pass
assert first.is_done and io.engine.silent_seconds(0) <= time.monotonic() - answered
os.write(writer, b".")
assert second.wait(60) and second.wait_copied(0) and second.wait_issued(0)
assert io.engine.silent_seconds(0) == 0.0
io.close()
""",
    )


@pytest.mark.parametrize("kind", ["threads", "python"])
def test_long_periods_are_told_from_bursts(run: Run, kind: str) -> None:
    """Of two writes the drive takes one at once and lets the other wait; both are traffic of the files' user."""
    run(
        kind,
        GATED
        + """
os.write(writer, b".")
io.write(random_bytes(SLAB_NBYTES)).write.wait()
(nbytes, seconds, *before), read = io.engine.traffic(0)
assert nbytes == SLAB_NBYTES and seconds > 0 and (before == [0, 0.0]) == (seconds < 0.25)
time.sleep(0.1)
written = io.write(random_bytes(2 * SLAB_NBYTES))
time.sleep(0.3)
os.write(writer, b".")
while io.engine.written_nbytes < 2 * SLAB_NBYTES:
    pass
(_, _, *sustained), _ = io.engine.traffic(0)
assert sustained[0] - before[0] == SLAB_NBYTES, "a period that is not over counts"
assert sustained[1] - before[1] > 0.3
os.write(writer, b".")
written.write.wait()
(nbytes, seconds, *sustained), read = io.engine.traffic(0)
assert nbytes == 3 * SLAB_NBYTES and sustained[0] - before[0] == 2 * SLAB_NBYTES and seconds > 0.3
assert read == (0, 0.0, 0, 0.0) and io.engine.traffic(1)[0] == (0, 0.0, 0, 0.0)
io.close()
""",
    )


def test_cancel_before_the_write_begins(run: Run) -> None:
    """One write is at the drive, four slabs are full, the rest waits: cancelling drops all but the one at the drive."""
    run(
        "threads",
        GATED
        + """
contents = [random_bytes(SLAB_NBYTES, seed) for seed in range(10)]
written = io.write(*contents)
while io.engine.num_events < 4:
    written.write.is_copied
assert [written.write.is_piece_copied(i) for i in range(10)] == [True] * 4 + [False] * 6
for piece in range(1, 9):
    written.write.cancel(piece)
while not written.write.is_copied:      # the last piece moves into a slab that a cancelled one gave back
    pass
assert written.write.cancelled_nbytes == 8 * SLAB_NBYTES
assert io.engine.staging_in_use_nbytes == 2 * SLAB_NBYTES
assert not written.write.is_done
assert io.read(written, 9) == contents[9]
written.write.cancel(0)                 # at the drive: finishes
written.write.cancel(9)                 # in a slab: dropped
assert written.write.cancelled_nbytes == 9 * SLAB_NBYTES
os.write(writer, b".")
written.write.wait()
assert written.write.written_nbytes == SLAB_NBYTES
assert io.engine.staging_in_use_nbytes == 0
io.close()
""",
    )


def test_interrupt_ends_a_wait(run: Run) -> None:
    """Ctrl-C reaches a thread that waits in the engine for a drive that does not answer."""
    run(
        "threads",
        GATED
        + """
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, 0.2)
written = io.write(random_bytes(SLAB_NBYTES))
try:
    written.write.wait()
except KeyboardInterrupt:
    os.write(writer, b".")
    written.write.wait()
    io.close()
else:
    raise AssertionError("the wait ended by itself")
""",
    )


READ = """
io = Io("threads", directory, num_threads=1, num_slabs=4)
written = io.write(random_bytes(SLAB_NBYTES))
written.write.wait()
os.environ["FAKE_READS"] = {steps!r}
read, memory = io.start_read(written, 0)
read.wait()
assert (read.error and read.error[0]) == {number}, read.error
assert (io.engine.num_retries, io.engine.num_read_errors) == ({retries}, {errors})
if read.error is None:
    assert memory.bytes() == written.contents[0]
else:
    assert read.error[1:] == (0, SLAB_NBYTES, "Input/output error")
del os.environ["FAKE_READS"]
io.check(written)
io.close()
"""


@pytest.mark.parametrize(
    "steps, number, retries",
    [("iiiiii", None, 0), ("ssss", None, 0), ("ee", None, 2), ("sisese", None, 2), ("eee", "errno.EIO", 2)],
)
def test_reads_that_falter(run: Run, steps: str, number: str | None, retries: int) -> None:
    """Interrupted and short reads go on, failed ones are tried twice more, then reported; never zeros."""
    run("threads", READ.format(steps=steps, number=number, retries=retries, errors=int(number is not None)))
