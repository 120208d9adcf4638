"""Limits: those the system sets, and those the policy promises. Within any of them a run finishes and is equal.

Every body runs in a child of its own, see `fault_tools`.
"""

from __future__ import annotations

import os
import resource
import stat
import tempfile
from pathlib import Path

import hypothesis
import inside
import pytest
import torch
from drives import ext4_drive
from fault_tools import (
    ENGINES,
    KIB,
    MIB,
    Lab,
    Trainer,
    check_equal,
    check_holdings,
    check_no_record,
    check_nothing_left,
    check_one_warning_per_kind,
    check_steps,
    drain,
    holdings,
    plain_steps,
    policy,
    spill_fds,
)
from hypothesis import strategies as st

import ssdtrain
from ssdtrain.devices.base import Allocation
from ssdtrain.policy import MIN_STAGING_NBYTES
from ssdtrain.store.record import SavedRecord

every_engine = pytest.mark.parametrize("engine", ENGINES)


# -- limits of the system ----------------------------------------------------------------------------------------------


def become_nobody() -> None:
    """Root is exempt from some limits."""
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


def little_locked_memory(directory: str, nbytes: int, engine: str, text: str) -> None:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (nbytes, nbytes))
    become_nobody()
    offload = ssdtrain.offload_activations(directory, policy(engine))
    check_steps(offload, lambda: drain(offload))
    assert offload.stats.read_nbytes > 0
    assert any(text in fallback for fallback in offload.stats.fallbacks) or not text, str(offload.stats)
    assert len(set(offload.stats.fallbacks)) == len(offload.stats.fallbacks)


@pytest.mark.parametrize(
    "nbytes, engine, text",
    [
        (0, "auto", "engine io_uring is not available: [Errno 12]"),
        (0, "threads", ""),
        (0, "python", ""),
        (256 * KIB, "io_uring", "buffers not registered: Cannot allocate memory (see ulimit -l)"),
    ],
)
def test_little_locked_memory(lab: Lab, tmp_path: Path, nbytes: int, engine: str, text: str) -> None:
    """`ulimit -l 0` leaves no room for a ring, a little more none for its buffers: others take over, and say so."""
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.getuid() and parent.name.startswith(("pytest-", "popen-")):
            parent.chmod(0o755)
    lab.run(little_locked_memory, tmp_path, nbytes, engine, text)


def used_address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def no_memory_for_staging(directory: str, engine: str) -> None:
    check_steps(ssdtrain.offload_activations(directory, policy("python")), num=1)  # imports what is imported late
    before = holdings()
    resource.setrlimit(resource.RLIMIT_AS, (used_address_space() + 200 * MIB, resource.RLIM_INFINITY))
    try:
        ssdtrain.offload_activations(directory, policy(engine, staging_nbytes="1GiB"))
    except (OSError, RuntimeError, MemoryError) as error:
        text = str(error)
        del error
    else:
        raise AssertionError("1 GiB fitted into 200 MiB")
    assert "staging_nbytes=1GiB: Cannot allocate memory" in text, text
    check_holdings(before)
    check_steps(ssdtrain.offload_activations(directory, policy(engine)))


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_no_memory_for_staging(lab: Lab, tmp_path: Path, engine: str) -> None:
    """The address space is limited: too much staging is refused before training starts, a little works."""
    lab.run(no_memory_for_staging, tmp_path, engine)


def no_memory_for_reloads(directory: str, engine: str) -> None:
    steps = plain_steps(2)
    offload = ssdtrain.offload_activations(directory, policy(engine))
    trainer = Trainer()
    device, prefetch = inside.devices(offload).cpu, inside.reloads(offload).prefetch
    allocate = device.allocate
    is_ahead, num_refused = False, 0

    def watch(record: SavedRecord) -> bool:
        nonlocal is_ahead
        is_ahead = True
        result = prefetch(record)
        is_ahead = False
        return result

    def refuse_ahead(*arguments: int) -> Allocation:
        nonlocal num_refused
        num_refused += is_ahead
        if is_ahead:
            raise MemoryError
        return allocate(*arguments)

    with offload:
        inside.reloads(offload).prefetch, device.allocate = watch, refuse_ahead  # type: ignore[method-assign]
        loss = trainer.forward()
        drain(offload)
        check_equal(trainer.finish(loss), steps[0])
        del inside.reloads(offload).prefetch, device.allocate
        assert num_refused > 0
        trainer.rows = 64 * KIB
        loss = trainer.forward()
        drain(offload)
        resource.setrlimit(resource.RLIMIT_AS, (used_address_space() + MIB, resource.RLIM_INFINITY))
        try:
            loss.backward()
        except (MemoryError, RuntimeError) as error:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            text = str(error)
            del error
        assert "memory" in text, text
        del loss
        trainer.zero_grad()
        trainer.rows = 256
        plain_steps(1)
    check_no_record(offload)


def too_many_open_files(directory: str, engine: str) -> None:
    check_steps(ssdtrain.offload_activations(directory, policy(engine)), num=1)
    before = holdings()
    num = before[0]
    results = []
    for spare in range(5):
        resource.setrlimit(resource.RLIMIT_NOFILE, (num + spare - 1, 4096))  # one of `num` was listdir's own
        try:
            offload = ssdtrain.offload_activations(directory, policy(engine))
        except (OSError, RuntimeError) as error:
            results.append("refused" if "Too many open files" in str(error) else repr(error))
            del error
        else:
            trainer = Trainer()
            check_equal(trainer.step(offload), steps_of_one[0])
            results.append(offload.stats.engine)
            del offload, trainer
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        check_holdings(before)
    assert results[0] == "refused" and results[-1] == (engine if engine != "auto" else "io_uring"), results
    assert engine != "auto" or "threads" in results, results


steps_of_one: list[list[torch.Tensor]] = []


def too_many_open_files_in_child(directory: str, engine: str) -> None:
    steps_of_one.extend(plain_steps(1))
    too_many_open_files(directory, engine)


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_too_many_open_files(lab: Lab, tmp_path: Path, engine: str) -> None:
    """With no, one, two, ... descriptors left: refused with the reason, or another engine, or all is well."""
    lab.run(too_many_open_files_in_child, tmp_path, engine)


def no_descriptor_later(directory: str, engine: str) -> None:
    steps = plain_steps()
    offload = ssdtrain.offload_activations(directory, policy(engine))
    trainer = Trainer()
    check_equal(trainer.step(offload), steps[0])
    resource.setrlimit(resource.RLIMIT_NOFILE, (holdings()[0] - 1, 4096))
    check_equal(trainer.step(offload), steps[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    said = any("Too many open files" in text and "stay in memory" in text for text in offload.stats.fallbacks)
    assert said == (engine == "io_uring"), "a ring needs one; files are open already"
    num_offloaded = offload.stats.num_offloaded
    check_equal(trainer.step(offload), steps[2])
    assert offload.stats.num_offloaded > num_offloaded
    check_one_warning_per_kind(offload)


@every_engine
def test_no_descriptor_later(lab: Lab, tmp_path: Path, engine: str) -> None:
    """Entered again while the process has no descriptor left: an engine that needs one keeps tensors in memory for that
    step, and it says so; the others go on."""
    lab.run(no_descriptor_later, tmp_path, engine)


def test_no_memory_for_reloads(lab: Lab, tmp_path: Path) -> None:
    """Without memory a reload ahead of need waits until it is needed; one that is needed is an error like torch's."""
    lab.run(no_memory_for_reloads, tmp_path, "threads")


# -- limits of the policy ----------------------------------------------------------------------------------------------

POLICIES = st.fixed_dictionaries(
    {
        "staging_nbytes": st.sampled_from([MIN_STAGING_NBYTES, 65 * KIB, 300_001, 4 * MIB]),
        "prefetch_nbytes": st.sampled_from([0, 1, 40 * KIB, 130_000, 16 * MIB]),
        "disk_nbytes": st.sampled_from([None, MIN_STAGING_NBYTES, 200_000, 300 * KIB, 8 * MIB]),
        "mode": st.sampled_from(["auto", "all"]),
        "min_nbytes": st.sampled_from([0, 1, 4096, 33_000, 65_536]),
        "checksum": st.booleans(),
        "engine": st.sampled_from(ENGINES),
        "decline_below_nbytes": st.sampled_from([0, 100_000]),
    }
)


def within_bounds(directory: str) -> None:
    """One process for all examples; a wait on itself ends at the lab's time limit."""
    options = {"depth": 4, "rows": 65}
    steps = plain_steps(2, **options)

    @hypothesis.settings(max_examples=120, derandomize=True, deadline=None, database=None)
    @hypothesis.given(fields=POLICIES, num_directories=st.integers(1, 3), is_drained=st.booleans())
    def check(fields: dict[str, int | None], num_directories: int, is_drained: bool) -> None:
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            directories = [Path(folder, str(i)) for i in range(num_directories)]
            for path in directories:
                path.mkdir()
            offload = ssdtrain.offload_activations(directories, fields)
            peak = 0
            trainer = Trainer(**options)
            with offload:
                for expected in steps:
                    loss = trainer.forward()
                    if is_drained:
                        drain(offload)
                    begin_reload = inside.reloads(offload).begin

                    def watch(record: object, begin_reload: object = begin_reload, is_ahead: bool = False) -> None:
                        nonlocal peak
                        begin_reload(record, is_ahead=is_ahead)  # type: ignore[operator]
                        peak = max(peak, inside.counters(offload).prefetched_nbytes)

                    inside.reloads(offload).begin = watch  # type: ignore[method-assign]
                    check_equal(trainer.finish(loss), expected)
                    del inside.reloads(offload).begin, loss
            stats = offload.stats
            assert stats.num_live_records == 0
            assert stats.peak_staging_nbytes <= int(fields["staging_nbytes"] or 0), str(stats)
            assert stats.peak_disk_nbytes <= (fields["disk_nbytes"] or stats.peak_disk_nbytes), str(stats)
            assert peak <= int(fields["prefetch_nbytes"] or 0), (peak, str(stats))
            assert fields["prefetch_nbytes"] or stats.num_prefetched == 0
            assert inside.transport(offload) is None

    check()


def test_within_all_bounds(lab: Lab, tmp_path: Path) -> None:
    """Any combination of bounds, down to the smallest legal ones: the run finishes, is equal, and keeps to each."""
    lab.run(within_bounds, tmp_path, seconds=150)
    assert list(tmp_path.iterdir()) == []


# -- who may read it ---------------------------------------------------------------------------------------------------

SECRET = b"\xa5"


def secrets(directory: str, engine: str) -> None:
    offload = ssdtrain.offload_activations(directory, policy(engine, min_nbytes=0, staging_nbytes=64 * KIB))
    with offload:
        (fd,) = spill_fds(offload)
        status = os.fstat(fd)
        assert (stat.S_IMODE(status.st_mode), status.st_nlink, status.st_uid) == (0o600, 0, os.getuid())
        assert os.listdir(directory) == [] and not os.get_inheritable(fd)
        secret = torch.full((256 * KIB,), SECRET[0], dtype=torch.uint8).view(torch.float32).requires_grad_()
        loss = (secret * 1).sin().exp()
        drain(offload)
        assert SECRET * 4096 in contents(fd)
        del loss, secret
        drain(offload)
        losses = [
            torch.zeros(n, requires_grad=True).cos().exp().sum() for n in (1, 3, 100, 1023, 1025, 1500, 3000) * 40
        ]
        drain(offload)
        free = contents(fd)
        extents = [
            segment.extent
            for record in inside.thread(offload).pass_.records  # type: ignore[union-attr]
            if record is not None
            for segment in record.segments
        ]
        assert len(extents) > 40
        for extent in extents:
            assert SECRET not in free[extent.offset : extent.offset + extent.nbytes], extent
        del losses


def contents(fd: int) -> bytes:
    with open(f"/proc/self/fd/{fd}", "rb") as file:
        return file.read(4 * MIB)


@every_engine
def test_nothing_leaks_through_the_file(lab: Lab, tmp_path: Path, engine: str) -> None:
    """Mode 0600 and no name from the first byte; in a directory that everybody may write to and that is reached by a
    symbolic link; a record that ends inside a block where another one was is padded with zeros, not with old bytes."""
    (tmp_path / "open to all").mkdir()
    (tmp_path / "open to all").chmod(0o1777)
    (tmp_path / "link").symlink_to(tmp_path / "open to all")
    lab.run(secrets, tmp_path / "link", engine)


def leaves_nothing(directory: str) -> None:
    before = holdings()
    offload = ssdtrain.offload_activations(directory, policy())
    check_steps(offload, lambda: drain(offload))
    check_nothing_left(offload, before)


def test_small_blocks(lab: Lab, tmp_path: Path) -> None:
    """An ext4 of 1 KiB blocks on a loop device: other alignment than the machine's drive."""
    with ext4_drive(tmp_path / "small", 24 * MIB) as drive:
        lab.run(leaves_nothing, drive.directory)
