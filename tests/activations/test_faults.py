"""Faults of drives, played for real: nothing is lost, nothing hangs, nothing is silent.

Whatever the drive does, losses and gradients are equal to the bit to those without ssdtrain, or backward raises one
error that names what is lost and where. Every body runs in a child of its own, see `fault_tools`.
"""

from __future__ import annotations

import atexit
import errno
import os
import resource
import signal
import time
from pathlib import Path

import pytest
from drives import Drive, ext4_drive, fill, tmpfs_drive
from fault_tools import (
    ENGINES,
    KIB,
    MIB,
    Lab,
    Trainer,
    check_equal,
    check_error,
    check_holdings,
    check_no_record,
    check_nothing_left,
    check_one_warning_per_kind,
    check_steps,
    drain,
    engine_of,
    holdings,
    plain_after_loss,
    plain_steps,
    policy,
    spill_fds,
    tell,
)

import ssdtrain
from ssdtrain.scheduling.schedule import Schedule

PRELOADED = ("threads", "python")  # whose system calls the library sees
every_engine = pytest.mark.parametrize("engine", ENGINES)
every_preloaded = pytest.mark.parametrize("engine", PRELOADED)


# -- a full disk -------------------------------------------------------------------------------------------------------


def full_from_the_start(directory: str, engine: str) -> None:
    before = holdings()
    with pytest.raises(OSError) as caught:  # noqa: PT011  errno says more than a text
        ssdtrain.offload_activations(directory, policy(engine))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, directory), caught.value
    del caught
    check_holdings(before)


@every_engine
@pytest.mark.parametrize("left_nbytes", [0, 8 * KIB])
@pytest.mark.parametrize("drive", ["small_ext4", "small_tmpfs"])
def test_full_from_the_start(
    lab: Lab, request: pytest.FixtureRequest, drive: str, engine: str, left_nbytes: int
) -> None:
    """The only directory has no room, or room for a file but not for a slab: said before training starts."""
    directory = request.getfixturevalue(drive).directory
    fill(directory, left_nbytes)
    lab.run(full_from_the_start, directory, engine)


def one_of_two_is_full(full: str, free: str, engine: str) -> None:
    before = holdings()
    offload = ssdtrain.offload_activations([full, free], policy(engine))
    check_steps(offload, lambda: drain(offload))
    stats = offload.stats
    assert stats.read_nbytes > 0 and stats.kept_nbytes == 0, str(stats)
    assert any(full in text and "full" in text for text in stats.fallbacks), stats.fallbacks
    check_one_warning_per_kind(offload)
    check_nothing_left(offload, before)


@every_engine
@pytest.mark.parametrize("left_nbytes", [0, 8 * KIB])
def test_one_of_two_is_full(lab: Lab, small_ext4: Drive, tmp_path: Path, engine: str, left_nbytes: int) -> None:
    """Of two drives the one without room is left out, by name."""
    fill(small_ext4.directory, left_nbytes)
    (tmp_path / "free").mkdir()
    lab.run(one_of_two_is_full, small_ext4.directory, tmp_path / "free", engine)


def fills_up(directory: str, engine: str) -> None:
    before = holdings()
    expected = plain_steps()
    offload = ssdtrain.offload_activations(directory, policy(engine))
    trainer = Trainer()
    with offload:
        check_equal(trainer.finish(trainer.forward()), expected[0])
        full = fill(directory)
        others = [Trainer().forward() for _ in range(4)]  # more than there is room for
        check_equal(trainer.finish(trainer.forward()), expected[1])
        for loss in others:
            loss.backward()
        del loss, others
    assert offload.stats.skipped["no spill space"].count > 0
    assert any("no room for more spill space" in text and directory in text for text in offload.stats.fallbacks)
    check_nothing_left(offload, before)
    fill(directory)
    check_equal(trainer.step(offload), expected[2])  # entered again while there is no room at all
    check_one_warning_per_kind(offload)
    check_nothing_left(offload, before)
    full.unlink()
    check_steps(offload, lambda: drain(offload))  # room came back and is used
    check_nothing_left(offload, before)


@every_engine
@pytest.mark.parametrize("drive", ["small_ext4", "small_tmpfs"])
def test_fills_up_later(lab: Lab, request: pytest.FixtureRequest, drive: str, engine: str) -> None:
    """Another program takes what was left: tensors stay in memory, also when the context is entered anew."""
    lab.run(fills_up, request.getfixturevalue(drive).directory, engine)


# -- writes that fail --------------------------------------------------------------------------------------------------


def check_rescue(offload: ssdtrain.ActivationOffload, directory: str, number: int) -> None:
    stats = offload.stats
    assert any(f"write failed: {os.strerror(number)} (errno {number})" in text for text in stats.fallbacks), str(stats)
    assert any(directory in text and "after 3 failed writes" in text for text in stats.fallbacks), str(stats)
    assert stats.skipped["no directory left"].count > 0, str(stats)
    check_one_warning_per_kind(offload)


def writes_refused(directory: str, engine: str, number: int) -> None:
    steps = plain_steps()
    before = holdings()
    offload = ssdtrain.offload_activations(directory, policy(engine))
    if number == errno.EFBIG:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        atexit.register(resource.setrlimit, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    else:
        os.environ["FAKE_WRITES"] = "e*"
    rescued = []
    with offload:
        trainer = Trainer()
        for expected in steps:
            loss = trainer.forward()
            drain(offload)
            rescued.append(engine_of(offload).rescued_nbytes)
            check_equal(trainer.finish(loss), expected)
            del loss
        assert rescued[0] > 0 == rescued[-1], rescued
        assert engine_of(offload).rescued_nbytes == engine_of(offload).staging_in_use_nbytes == 0
    check_rescue(offload, directory, number)
    check_nothing_left(offload, before)
    num_warnings = len(offload.stats.fallbacks)
    check_steps(offload)  # entered again: the drive is still known to be bad
    assert len(offload.stats.fallbacks) == num_warnings and offload.stats.num_live_records == 0


@pytest.mark.parametrize("engine, number", [(e, errno.EFBIG) for e in ENGINES] + [(e, errno.EIO) for e in PRELOADED])
def test_writes_refused(lab: Lab, tmp_path: Path, engine: str, number: int) -> None:
    """Every write fails (a broken drive, or a file size limit): the bytes are kept in memory, after three failures the
    directory is not used any more, and training goes on."""
    lab.run(writes_refused, tmp_path, engine, number)
    assert list(tmp_path.iterdir()) == []


def thin(directory: str, engine: str) -> None:
    steps = plain_steps(rows=2048)
    offload = ssdtrain.offload_activations(directory, policy(engine, checksum=True))
    for _ in range(3):
        trainer = Trainer(rows=2048)
        for expected in steps:
            try:
                check_equal(trainer.step(offload, lambda: drain(offload)), expected)
            except OSError as error:
                check_error(error, directory, errno.EBADMSG, errno.EIO)
                break
    stats = offload.stats
    assert stats.written_nbytes > 0, str(stats)
    assert any("write failed" in text for text in stats.fallbacks), str(stats)
    check_one_warning_per_kind(offload)


@every_engine
def test_device_runs_out_of_blocks(lab: Lab, tmp_path: Path, engine: str) -> None:
    """A thin-provisioned drive: the file system has room and the device below has none, so that reserved blocks cannot
    be written. What failed is kept; what the device takes and loses (Linux' loop device does) the checksum catches."""
    with tmpfs_drive(tmp_path / "pool", 12 * MIB) as pool:
        with ext4_drive(tmp_path / "thin", 96 * MIB, pool.directory) as drive:
            lab.run(thin, drive.directory, engine)


# -- reads that fail ---------------------------------------------------------------------------------------------------


def falters(directory: str, engine: str, writes: str, reads: str) -> None:
    steps = plain_steps()
    before = holdings()
    offload = ssdtrain.offload_activations(directory, policy(engine, checksum=True))

    def drain_and_read() -> None:
        drain(offload)
        os.environ.pop("FAKE_WRITES", None)
        os.environ["FAKE_READS"] = reads

    trainer = Trainer()
    for expected in steps:
        with offload:
            os.environ.pop("FAKE_READS", None)
            os.environ["FAKE_WRITES"] = writes
            loss = trainer.forward()
            drain_and_read()
        check_equal(trainer.finish(loss), expected)
        del loss
    assert offload.stats.read_nbytes > 0 and not offload.stats.fallbacks, str(offload.stats)
    check_nothing_left(offload, before)


@every_preloaded
@pytest.mark.parametrize("steps", ["e", "iiiiii", "ssss", "aaiiss", "essiesa"])
def test_passing_faults(lab: Lab, tmp_path: Path, engine: str, steps: str) -> None:
    """One error, interrupted calls, temporary refusals, short transfers: tried again or continued, nobody notices."""
    lab.run(falters, tmp_path, engine, steps, steps)


def truncate(offload: ssdtrain.ActivationOffload) -> None:
    for fd in spill_fds(offload):
        os.ftruncate(fd, 0)


def refuse_reads(offload: ssdtrain.ActivationOffload) -> None:
    os.environ["FAKE_READS"] = "e*"


def corrupt(offload: ssdtrain.ActivationOffload) -> None:
    for fd in spill_fds(offload):
        with open(f"/proc/self/fd/{fd}", "r+b", buffering=0) as file:
            file.write(b"\x55" * (4 * MIB))
            os.fsync(file.fileno())


READ_FAULTS = {
    "truncate": (truncate, errno.EIO),
    "refuse": (refuse_reads, errno.EIO),
    "corrupt": (corrupt, errno.EBADMSG),
}


def reads_fail(directory: str, engine: str, name: str, prefetch_nbytes: int) -> None:
    after = plain_after_loss()[0]
    before = holdings()
    spoil, number = READ_FAULTS[name]
    offload = ssdtrain.offload_activations(directory, policy(engine, checksum=True, prefetch_nbytes=prefetch_nbytes))
    trainer = Trainer()
    with offload:
        loss = trainer.forward()
        drain(offload)
        spoil(offload)
        try:
            trainer.finish(loss)
        except OSError as error:
            check_error(error, directory, number)
            del error
        else:
            raise AssertionError("backward went on without the bytes")
        del loss
        assert any(directory in text and "not used any more" in text for text in offload.stats.fallbacks)
        trainer.zero_grad()
        check_equal(trainer.finish(trainer.forward()), after)
    assert offload.stats.skipped["no directory left"].count > 0
    check_one_warning_per_kind(offload)
    check_nothing_left(offload, before)


@pytest.mark.parametrize("prefetch_nbytes", [0, MIB])
@pytest.mark.parametrize(
    "engine, name",
    [(e, n) for e in ENGINES for n in READ_FAULTS if e != "io_uring" or n != "refuse"],
)
def test_reads_fail(lab: Lab, tmp_path: Path, engine: str, name: str, prefetch_nbytes: int) -> None:
    """Bytes that are nowhere else cannot be had (no answer, file cut short, other bytes than written): one error in
    backward, then the run goes on without that directory."""
    lab.run(reads_fail, tmp_path, engine, name, prefetch_nbytes)


def one_of_two_reads_fail(bad: str, good: str, engine: str) -> None:
    after = plain_after_loss()[0]
    offload = ssdtrain.offload_activations([bad, good], policy(engine, prefetch_nbytes=0))
    trainer = Trainer()
    with offload:
        loss = trainer.forward()
        drain(offload)
        os.ftruncate(spill_fds(offload)[0], 0)
        try:
            trainer.finish(loss)
        except OSError as error:
            check_error(error, bad)
            del error
        del loss
        trainer.zero_grad()
        loss = trainer.forward()
        drain(offload)
        read = offload.stats.read_nbytes
        check_equal(trainer.finish(loss), after)
        assert offload.stats.read_nbytes > read, "the other directory is used"
    assert sum("not used any more" in text for text in offload.stats.fallbacks) == 1


@every_engine
def test_one_of_two_reads_fail(lab: Lab, tmp_path: Path, engine: str) -> None:
    """Records are striped over two drives and one loses its bytes: only that one is given up."""
    (tmp_path / "bad").mkdir()
    (tmp_path / "good").mkdir()
    lab.run(one_of_two_reads_fail, tmp_path / "bad", tmp_path / "good", engine)


# -- a drive that is pulled --------------------------------------------------------------------------------------------


def pulled(directory: str, engine: str, when: str) -> None:
    steps = plain_after_loss(3)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    offload = ssdtrain.offload_activations(directory, policy(engine))
    trainer = Trainer()
    with offload:
        loss = trainer.forward()
        drain(offload)
        tell("pull")
        signal.sigwait([signal.SIGUSR1])
        if when == "backward":
            try:
                trainer.finish(loss)
            except OSError as error:
                check_error(error, directory)
                del error
            else:
                raise AssertionError("backward went on without the drive")
            trainer.zero_grad()
        del loss
        for expected in steps:
            check_equal(trainer.finish(trainer.forward()), expected)
    assert any("not used any more" in text for text in offload.stats.fallbacks), str(offload.stats)
    check_one_warning_per_kind(offload)
    check_no_record(offload)


@every_engine
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_pulled(lab: Lab, small_ext4: Drive, engine: str, when: str) -> None:
    """The device is gone in the middle of a step: before writes, which are rescued; before reads, an error."""
    child = lab.start(pulled, small_ext4.directory, engine, when)
    assert child.next_event() == "pull", child.stderr
    small_ext4.pull()
    os.kill(child.pid, signal.SIGUSR1)
    code = child.wait()
    small_ext4.plug()
    assert (code, child.stderr) == (0, ""), child.stderr


# -- slow and stuck drives ---------------------------------------------------------------------------------------------


def slow(directory: str, engine: str) -> None:
    steps = plain_steps()
    before = holdings()
    offload = ssdtrain.offload_activations(directory, policy(engine, mode="auto", staging_nbytes=256 * KIB))
    os.environ["FAKE_WRITES"] = "d*"
    trainer = Trainer()
    for expected in steps:
        with offload:
            loss = trainer.forward()
        check_equal(trainer.finish(loss), expected)
        del loss
    stats = offload.stats
    assert stats.skipped["drive behind"].count > 0, str(stats)
    assert stats.num_offloaded > 0
    assert stats.peak_staging_nbytes <= 256 * KIB
    assert stats.stall_seconds < 3, "never waits for a write"
    del os.environ["FAKE_WRITES"]
    check_nothing_left(offload, before)


@every_preloaded
def test_slow(lab: Lab, tmp_path: Path, engine: str) -> None:
    """A drive that takes 20 ms for every 16 KiB: mode "auto" keeps what it cannot take in time."""
    lab.run(slow, tmp_path, engine)


STUCK_SECONDS = 0.3


def stuck_writes(directory: str, engine: str, mode: str, how_it_ends: str) -> None:
    steps = plain_steps()
    offload = ssdtrain.offload_activations(
        directory, policy(engine, mode=mode, io_timeout_seconds=STUCK_SECONDS, staging_nbytes=256 * KIB)
    )
    os.environ["FAKE_WRITES"] = "h*"
    offload.__enter__()
    trainer = Trainer()
    for expected in steps:
        check_equal(trainer.finish(trainer.forward()), expected)
        time.sleep(0 if mode == "all" else STUCK_SECONDS)  # in mode "auto" nothing else takes time here
    stats = offload.stats
    assert stats.skipped["drive stuck"].count > 0, str(stats)
    assert any(directory in t and "not used any more" in t and "offset" in t for t in stats.fallbacks), str(stats)
    assert mode == "auto" or any("mode 'all' keeps" in text for text in stats.fallbacks)
    assert stats.stall_seconds < 5 * STUCK_SECONDS
    if how_it_ends == "closed":
        offload.__exit__(None, None, None)
        begin = time.monotonic()
        offload.close()
        assert time.monotonic() - begin < 5 * STUCK_SECONDS + 1
        assert any("stay until the process ends" in text for text in offload.stats.fallbacks)
    if how_it_ends == "left":
        offload.__exit__(None, None, None)
        check_steps(offload)
        check_no_record(offload)
    check_one_warning_per_kind(offload)
    if how_it_ends == "with a live graph":
        globals()["kept"] = trainer.forward()


@every_preloaded
@pytest.mark.parametrize("mode", ["all", "auto"])
@pytest.mark.parametrize("how_it_ends", ["closed", "left", "just ends", "with a live graph"])
def test_stuck_writes(lab: Lab, tmp_path: Path, engine: str, mode: str, how_it_ends: str) -> None:
    """The drive takes requests and never answers: its directory is given up, tensors stay, and neither training nor
    close() nor the end of the process waits for it longer than it was told to."""
    lab.run(stuck_writes, tmp_path, engine, mode, how_it_ends, seconds=20)


def planned_writes(directory: str, engine: str) -> None:
    """The drive takes nothing until backward begins, and what is sent is more than fits staging."""
    Schedule.is_planned = property(lambda self: True)  # type: ignore[method-assign, assignment]
    offload = ssdtrain.offload_activations(directory, policy(engine, mode="auto"))
    offload.keep_open()
    expected = plain_steps()[0]
    reader, writer = os.pipe()
    os.environ["FAKE_GATE"] = str(reader)

    def look() -> None:
        stats = offload.stats
        assert "drive behind" not in stats.skipped and stats.num_offloaded > 0, str(stats)
        assert engine_of(offload).inflight_nbytes > offload.policy.staging_nbytes
        os.write(writer, b"." * 4096)
        drain(offload)

    check_equal(Trainer().step(offload, look), expected)
    assert offload.stats.read_nbytes > 0
    offload.close()


@every_preloaded
def test_planned_writes_wait_their_turn(lab: Lab, tmp_path: Path, engine: str) -> None:
    """What a plan sends is not kept for good because the drive is behind for a moment."""
    lab.run(planned_writes, tmp_path, engine, seconds=20)


def stuck_reads(directory: str, engine: str, how_it_ends: str) -> None:
    after = plain_after_loss()[0]
    offload = ssdtrain.offload_activations(directory, policy(engine, io_timeout_seconds=STUCK_SECONDS))
    trainer = Trainer()
    with offload:
        loss = trainer.forward()
        drain(offload)
        os.environ["FAKE_READS"] = "h*"
        try:
            trainer.finish(loss)
        except OSError as error:
            check_error(error, directory, errno.ETIMEDOUT)
            del error
        else:
            raise AssertionError("backward went on without the bytes")
        del loss
        trainer.zero_grad()
        check_equal(trainer.finish(trainer.forward()), after)
        assert offload.stats.skipped["no directory left"].count > 0
    check_one_warning_per_kind(offload)
    if how_it_ends == "closed":
        offload.close()


@every_preloaded
@pytest.mark.parametrize("how_it_ends", ["closed", "just ends"])
def test_stuck_reads(lab: Lab, tmp_path: Path, engine: str, how_it_ends: str) -> None:
    """A read that is never answered is an error in backward after the time allowed; the next step works."""
    lab.run(stuck_reads, tmp_path, engine, how_it_ends, seconds=20)
