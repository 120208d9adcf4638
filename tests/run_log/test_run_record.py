"""The record of a run: what is in it, how large it gets, and that training never notices it."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from conftest import MakeOffload, mlp
from drives import Drive, fill
from engine_tools import KINDS, Io, random_bytes
from folders import HELPERS
from run_tools import POLICY, network, recorded_run, train

import ssdtrain
from ssdtrain.planner import Lifetime, Step
from ssdtrain.report import describe
from ssdtrain.run_log import Recorder, RecordError, Run, read_run
from ssdtrain.run_log.format import first_line, pack
from ssdtrain.run_log.path import record_path
from ssdtrain.stats import Counters
from ssdtrain.tracing.finished_step import FinishedStep
from ssdtrain.tracing.step_trace import StepTrace

MIB = 1 << 20


# -- what is in it -----------------------------------------------------------------------------------------------------


def test_totals_are_those_of_the_stats(tmp_path: Path) -> None:
    path, stats = recorded_run(tmp_path, 8)
    run = read_run(path)
    totals = run.steps[-1]["counters"]
    assert [row["step"] for row in run.steps] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert run.is_complete and run.num_lost_nbytes == run.num_damaged == 0
    for name in ("num_saved", "num_offloaded", "offloaded_nbytes", "kept_nbytes", "num_prefetched"):
        assert totals[name] == getattr(stats, name), name
    assert totals["offloaded_nbytes"] > MIB // 4
    assert max(row["peak_nbytes"] for row in run.steps) == stats.peak_memory_nbytes
    assert run.stats["skipped"] == stats.as_dict()["skipped"]
    assert run.policy["record"] == str(path) and run.environment["packages"]["torch"] == torch.__version__
    assert run.environment["packages"]["ssdtrain"] == ssdtrain.__version__, "of what runs, whatever is installed"


@pytest.mark.parametrize("num_passes", [1, 2], ids=["a pass", "accumulation"])
@pytest.mark.parametrize("how", ["entered once", "entered each time", "kept open"])
@pytest.mark.parametrize("mode", ["all", "auto"])
def test_statistics_record_and_callbacks_count_the_same_steps(
    tmp_path: Path, mode: str, how: str, num_passes: int
) -> None:
    """All that are over, each once: also the last one, inside the context, after it and after `close`."""
    path, model, x = tmp_path / "run.ssdtrain", network(), torch.randn(256, 64)
    offload = ssdtrain.offload_activations(tmp_path, POLICY | {"mode": mode}, model, record=path)
    plain = ssdtrain.offload_activations(tmp_path, POLICY | {"mode": mode}, model)  # which nobody watches
    told: list[tuple[int, int]] = []
    offload.on_step(lambda number, stats: told.append((number, stats.num_steps)))
    for each, is_watched in ((offload, True), (plain, False)):
        if how == "kept open":
            each.keep_open()
        with each if how == "entered once" else contextlib.nullcontext():
            for number in range(1, 3 * num_passes + 1):
                with contextlib.nullcontext() if how == "entered once" else each:
                    loss = model(x).square().mean()
                assert each.stats.num_steps == number - 1
                loss.backward()
                assert each.stats.num_steps == number and each.stats.last_memory_nbytes > 0
        assert each.stats.num_steps == 3 * num_passes
        each.close()
        assert each.stats.num_steps == 3 * num_passes
        assert not is_watched or read_run(path).num_steps == 3 * num_passes
    assert told == [(number, number) for number in range(1, 3 * num_passes + 1)]


def test_a_path_with_bytes_that_are_no_text_records_too(tmp_path: Path) -> None:
    """In the fields of a policy as much as by name, of which the first was refused."""
    folder = tmp_path / os.fsdecode(b"run\xff")
    folder.mkdir()
    path = str(folder / "run.ssdtrain")
    section = ssdtrain.Section.of({"directory": str(folder), "activations": POLICY | {"record": path}})
    with_record = ssdtrain.offload_activations(list(section.directories), section.policy)
    train(with_record, network(), 3)
    with_record.close()
    assert read_run(path).num_steps == 3
    with pytest.raises(ValueError, match="at least 1 character"):
        ssdtrain.ActivationPolicy(record="")


def test_a_timeline_has_every_request_in_order(tmp_path: Path) -> None:
    """With staging for one record: the next cannot leave before it has, so that some must come back from the drive."""
    run = read_run(recorded_run(tmp_path, 4, staging_nbytes="64KiB", prefetch_nbytes="64KiB")[0])
    detail = run.details[-1]
    end, columns = detail.seconds * 1e6, detail.records
    assert detail.writes and detail.reads
    for place, nbytes, _, was_cancelled, queued, copy_begun, copied, write_begun, done in detail.writes:
        assert nbytes == columns["nbytes"][place]
        if not was_cancelled:
            assert columns["saved"][place] <= queued <= copy_begun <= copied and write_begun <= done
    for place, _, _, queued, begun, done in detail.reads:
        assert max(queued, begun) <= done <= columns["released"][place]
    for saved, needed, released in zip(columns["saved"], columns["needed"], columns["released"], strict=True):
        assert 0 <= saved <= released <= end + 1
        assert needed == -1 or saved <= needed <= released
    assert any("0" in name for name in detail.modules)


@pytest.mark.parametrize("mode", ["auto", "all"])
def test_both_modes_are_recorded(tmp_path: Path, mode: str) -> None:
    run = read_run(recorded_run(tmp_path, 5, mode=mode)[0])
    assert run.num_steps == 5 and sum(sums[3] for sums in run.modules.values()) > 0


def test_what_would_have_been_is_what_a_run_without_moving_holds(tmp_path: Path) -> None:
    moved = read_run(recorded_run(tmp_path / "moved", 3, staging_nbytes="64KiB", prefetch_nbytes="64KiB")[0])
    kept = read_run(recorded_run(tmp_path / "kept", 3, mode="auto", decline_below_nbytes="1GiB")[0])
    assert kept.steps[-1]["peak_nbytes"] == moved.steps[-1]["peak_if_kept_nbytes"] > moved.steps[-1]["peak_nbytes"]


def test_stalls_are_charged_to_a_record(tmp_path: Path) -> None:
    """Without prefetch, and with room for one record in staging, every reload from the drive is waited for."""
    path, stats = recorded_run(tmp_path, 6, prefetch_nbytes=0, staging_nbytes="64KiB")
    run = read_run(path)
    assert stats.stall_seconds == pytest.approx(run.steps[-1]["counters"]["stalled_seconds"], abs=1e-5)
    num_reads = 0
    for detail in run.details:
        columns = detail.records
        for tier, place, begin, took in detail.stalls:
            assert begin >= 0 and 0 <= place < len(columns["nbytes"]) and tier in ("read", "write")
            if tier == "read":  # a use comes first, then the wait, then the release
                num_reads += 1
                assert columns["needed"][place] <= begin + 1 and begin + took <= columns["released"][place] + 1
        total = sum(took for *_, took in detail.stalls) / 1e6
        assert total == pytest.approx(run.steps[detail.step - 1]["stall_seconds"], abs=1e-4)
    assert num_reads > 0


@pytest.mark.parametrize("kind", KINDS)
def test_requests_say_when(tmp_path: Path, kind: str) -> None:
    io = Io(kind, tmp_path)
    try:
        begin = time.monotonic()
        written = io.write(random_bytes(100_000))
        written.write.wait()
        read, _memory = io.start_read(written, 0)
        read.wait()
        end = time.monotonic()
        queued, copy_begun, copied, write_begun, done = written.write.moments
        assert begin <= queued <= write_begun <= done <= end and queued <= copied <= done
        assert not io.has_slabs or queued <= copy_begun <= min(copied, write_begun)  # the first chunk's, so before
        queued, read_begun, read_done = read.moments
        assert done <= queued <= read_begun <= read_done <= end
    finally:
        io.close()


@pytest.mark.parametrize("host_nbytes", [0, MIB])
def test_every_kind_of_device(
    make_offload: MakeOffload, device_kind: str, tmp_path_factory: pytest.TempPathFactory, host_nbytes: int
) -> None:
    """With an accelerator the host's clock is not that of the computation, and the record says so."""
    path = tmp_path_factory.mktemp("record") / "run.ssdtrain"
    offload, model = make_offload(record=str(path), host_nbytes=host_nbytes), mlp(width=32)
    with offload:
        for _ in range(3):
            model(torch.randn(64, 32)).square().sum().backward()
    offload.close()
    run = read_run(path)
    detail = run.details[-1]
    assert run.num_steps == 3 and detail.is_wall_time == (device_kind == "cpu")
    assert detail.writes and all(write[4] <= write[8] for write in detail.writes)
    went_to_host = {write[2] for write in detail.writes} == {1}
    assert went_to_host == (host_nbytes > 0 and device_kind != "cpu")
    assert describe(run)["headline"]


# -- nobody notices ----------------------------------------------------------------------------------------------------


def test_results_are_the_same_to_the_bit(tmp_path: Path) -> None:
    with_record, without = network(), network()
    first = ssdtrain.offload_activations(tmp_path, POLICY, record=tmp_path / "run.ssdtrain")
    second = ssdtrain.offload_activations(tmp_path, POLICY)
    assert train(first, with_record, 3) == train(second, without, 3)
    assert all(torch.equal(a, b) for a, b in zip(with_record.parameters(), without.parameters(), strict=True))
    first.close()


def test_nothing_is_there_without_a_record(tmp_path: Path) -> None:
    offload = ssdtrain.offload_activations(tmp_path, POLICY)
    train(offload, network(), 3)
    assert inside.source(offload).request_log is None and not inside.schedule(offload).review._is_watched
    assert list(tmp_path.iterdir()) == []


def test_it_keeps_no_storage_alive(tmp_path: Path) -> None:
    offload = ssdtrain.offload_activations(tmp_path, POLICY, record=tmp_path / "run.ssdtrain")
    storages: list[Any] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            result = x * 2
            storages.append(torch.multiprocessing.reductions.StorageWeakRef(result.untyped_storage()))
            ctx.save_for_backward(result)
            return result

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * ctx.saved_tensors[0]

    with offload:
        for _ in range(3):
            Watched.apply(torch.randn(64, 256, requires_grad=True)).exp().sum().backward()
    gc.collect()
    assert len(storages) == 3 and all(storage.expired() for storage in storages)
    offload.close()


def test_the_offload_is_not_kept_alive_and_the_record_is_finished_with_it(tmp_path: Path) -> None:
    path = tmp_path / "run.ssdtrain"
    offload = ssdtrain.offload_activations(tmp_path, POLICY, record=path)
    train(offload, network(), 3)
    gone = weakref.ref(offload)
    del offload
    gc.collect()
    run = read_run(path)
    assert gone() is None and run.is_complete and run.num_steps == 3


def test_a_full_disk_is_said_once(small_ext4: Drive, tmp_path: Path) -> None:
    path, model = small_ext4.directory / "run.ssdtrain", network()
    offload = ssdtrain.offload_activations(tmp_path, POLICY, model, record=path)
    fill(small_ext4.directory)
    losses = train(offload, model, 30)
    stats = offload.stats
    offload.close()
    said = [text for text in stats.fallbacks if "run record" in text]
    assert len(losses) == 30 and len(said) == 1 and "No space left" in said[0]


def test_an_error_of_the_writer_is_said_once_and_ends_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    offload = ssdtrain.offload_activations(tmp_path, POLICY, record=tmp_path / "run.ssdtrain")
    monkeypatch.setattr("ssdtrain.run_log.encode.row", broken)
    losses = train(offload, network(), 30)
    assert len(losses) == 30
    assert sum("ZeroDivisionError" in text for text in offload.stats.fallbacks) == 1
    offload.close()


def test_a_step_that_never_ends_does_not_fill_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssdtrain.tracing.request_log._MAX_ROWS", 5)
    offload = ssdtrain.offload_activations(tmp_path, POLICY, record=tmp_path / "run.ssdtrain")
    model, alive = network(), []
    with offload:
        for _ in range(4):
            alive.append(model(torch.randn(256, 64)))
            model(torch.randn(256, 64)).sum().backward()
    request_log = inside.source(offload).request_log
    assert request_log is not None and 0 < len(request_log._writes) <= 5 and len(request_log._reads) <= 6
    alive.clear()
    offload.close()
    assert read_run(tmp_path / "run.ssdtrain").num_steps == 1


# -- its size ----------------------------------------------------------------------------------------------------------


def made_up_run(path: Path, num_steps: int, *, limit: int, num_records: int = 50) -> Run:
    """A record of steps that nobody trained."""
    recorder = Recorder(str(path), ssdtrain.ActivationPolicy(record_nbytes=limit), [])
    recording = StepTrace(Counters(), lambda step: None)
    lives = tuple(
        Lifetime(MIB + i * 4096, i * 1e-3, 0.1 - i * 1e-3, 0.101 - i * 1e-3, 0, f"blocks.{i}")
        for i in range(num_records)
    )
    for number in range(1, num_steps + 1):
        totals, slow = Counters(), number == num_steps // 2
        totals.written_nbytes, totals.stalled_seconds = number * 123_456_789, number * 1e-3
        finished = FinishedStep(
            recording, Step(lives, 0.11), 5.0 + number, 0.5 if slow else 0.11, 0.01, MIB + number, None, totals
        )
        while recorder._queue.full():
            time.sleep(0.001)
        assert recorder.note_step(number, finished) == ""
    recorder.close()
    return read_run(path)


@pytest.mark.parametrize("limit", [64 << 10, 1 << 20])
def test_it_never_grows_beyond_its_limit(tmp_path: Path, limit: int) -> None:
    path, num_steps = tmp_path / "run.ssdtrain", 5000
    run = made_up_run(path, num_steps, limit=limit)
    assert path.stat().st_size <= limit
    assert run.steps[-1]["step"] == num_steps and run.steps[-1]["counters"]["written_nbytes"] == num_steps * 123_456_789
    assert run.is_complete


def test_first_and_worst_steps_keep_their_timelines(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "run.ssdtrain", 1000, limit=1 << 20)
    reasons = {detail.step: detail.why for detail in run.details}
    assert [reasons.get(step) for step in (1, 2, 3)] == ["first"] * 3
    assert reasons[500] == "worst"
    assert any(why == "sample" and step > 500 for step, why in reasons.items())


def test_rows_that_share_one_lose_no_total(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "run.ssdtrain", 3000, limit=128 << 10, num_records=5)
    assert run.steps[0]["num_steps"] == 1 and run.steps[-2]["num_steps"] > 1
    assert sum(row["num_steps"] for row in run.steps) == 3000
    assert sum(row["seconds"] for row in run.steps) == pytest.approx(0.11 * 2999 + 0.5)


# -- when things go wrong ----------------------------------------------------------------------------------------------

KILLED = """
import os, sys, time
sys.path.insert(0, {tests!r})
import ssdtrain
from run_tools import POLICY, network, train
model = network()
offload = ssdtrain.offload_activations({folder!r}, POLICY, model, record={path!r})
print("ready", flush=True)
train(offload, model, 1_000_000)
"""


def test_a_killed_run_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "run.ssdtrain"
    code = KILLED.format(tests=str(HELPERS), folder=str(tmp_path), path=str(path))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    deadline = time.monotonic() + 60
    while path.stat().st_size < 20_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    run = read_run(path)
    assert not run.is_complete and run.num_steps >= 3 and run.details and run.stats["num_saved"] > 0


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_a_cut_tail_costs_only_itself(tmp_path: Path, kept: float) -> None:
    path, _ = recorded_run(tmp_path, 8)
    whole = read_run(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    cut = read_run(path)
    assert 0 < cut.num_steps <= whole.num_steps and cut.steps == whole.steps[: len(cut.steps)]
    assert not cut.is_complete and cut.num_lost_nbytes > 0


def test_a_damaged_block_is_left_out(tmp_path: Path) -> None:
    path, _ = recorded_run(tmp_path, 8)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    run = read_run(path)
    assert run.num_damaged + (run.num_lost_nbytes > 0) >= 1 and run.num_steps >= 1


NOT_RECORDS = {
    "another kind of file": b"<html></html>" * 10,
    "version 999": first_line().replace(b"1\n", b"999\n"),
    "cut before its first block": first_line() + b"\x10\0\0\0",
    "an empty one": first_line() + pack({"kind": "run", "policy": {}, "environment": {}, "counters": []}),
}


@pytest.mark.parametrize("what", NOT_RECORDS)
def test_what_is_no_record_is_named_in_one_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(NOT_RECORDS[what])
    with pytest.raises(RecordError, match=what) as raised:
        read_run(path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


def train_and_fork(folder: str) -> None:
    model = network()
    offload = ssdtrain.offload_activations(folder, POLICY, model, record=f"{folder}/run.ssdtrain")
    train(offload, model, 2)
    child = os.fork()
    if child == 0:
        train(offload, model, 2)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    train(offload, model, 2)
    offload.close()


def test_a_fork_leaves_the_record_to_its_parent(tmp_path: Path) -> None:
    """In a process with one thread: OpenMP's others do not follow a fork, and the child would wait for them."""
    code = f"import test_run_record as tests; tests.train_and_fork({str(tmp_path)!r})"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
    run = read_run(tmp_path / "run.ssdtrain")
    assert run.num_steps == 4 and run.num_damaged == run.num_lost_nbytes == 0


# -- where it is -------------------------------------------------------------------------------------------------------


def test_an_older_record_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    recorded_run(tmp_path, 6)
    assert read_run(recorded_run(tmp_path, 2)[0]).num_steps == 2
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("chapter one")
    with pytest.raises(FileExistsError, match="another kind of file"):
        ssdtrain.offload_activations(tmp_path, record=thesis)
    assert thesis.read_text() == "chapter one"
    with pytest.raises(OSError, match="missing"):
        ssdtrain.offload_activations(tmp_path, record=tmp_path / "missing" / "run.ssdtrain")


def test_one_file_for_each_rank() -> None:
    ranks = {"RANK": "3", "LOCAL_RANK": "1"}
    assert record_path("run.{rank}.ssdtrain", ranks) == "run.3.ssdtrain"
    assert record_path("{local_rank}/{rank}", ranks) == "1/3"
    assert record_path("run.ssdtrain", ranks) is None, "two ranks must not write one file"
    assert record_path("run.ssdtrain", {"RANK": "0"}) == "run.ssdtrain"
    assert record_path("run.{rank}", {}) == "run.0"
    with pytest.raises(ValueError, match="rank"):
        record_path("run.{host}", ranks)


def test_it_can_be_asked_for_by_environment_and_arguments() -> None:
    import argparse

    from ssdtrain.api.section import Section
    from ssdtrain.integrations.arguments import add_arguments, asked_for

    assert ssdtrain.ActivationPolicy.from_environment({"SSDTRAIN_RECORD": "a", "SSDTRAIN_LOG_EVERY": "5"}).record == "a"
    words = ["--ssdtrain-dir", "/x", "--ssdtrain-record", "run.{rank}", "--ssdtrain-record-nbytes", "1MiB"]
    asked = asked_for(add_arguments(argparse.ArgumentParser()).parse_args(words))
    assert asked is not None and (asked[1].record, asked[1].record_nbytes) == ("run.{rank}", MIB)
    section = {"activations": {"directory": "/x", "record": "run.{rank}", "log_every": 10}}
    assert (Section.of(section, {}).policy.record, Section.of(section, {}).policy.log_every) == ("run.{rank}", 10)


def test_it_can_be_asked_for_by_policy(tmp_path: Path) -> None:
    path = tmp_path / "run.ssdtrain"
    offload = ssdtrain.offload_activations(tmp_path, POLICY | {"record": str(path), "record_nbytes": "64KiB"})
    train(offload, network(), 2)
    offload.close()
    assert read_run(path).policy["record_nbytes"] == 64 << 10


# -- the log -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every, lines", [(0, 0), (2, 3), (3, 2)])
def test_one_line_every_few_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture, every: int, lines: int) -> None:
    offload = ssdtrain.offload_activations(tmp_path, POLICY | {"log_every": every})
    with caplog.at_level(logging.INFO, logger="ssdtrain"):
        train(offload, network(), 6)
        offload.close()
    found = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO and r.getMessage().startswith("step ")]
    assert len(found) == lines
    assert all(f"in {every} steps" in line and "offloaded" in line and "stalled" in line for line in found)


def test_a_record_is_json_inside(tmp_path: Path) -> None:
    """Anything else can read it: a line, then length, checksum and compressed JSON."""
    import zlib

    data = recorded_run(tmp_path, 2)[0].read_bytes()
    at = data.index(b"\n") + 1
    nbytes = int.from_bytes(data[at : at + 4], "little")
    block = json.loads(zlib.decompress(data[at + 8 : at + 8 + nbytes]))
    assert block["kind"] == "run" and zlib.crc32(data[at + 8 : at + 8 + nbytes]) == int.from_bytes(
        data[at + 4 : at + 8], "little"
    )
