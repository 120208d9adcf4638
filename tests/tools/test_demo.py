"""The demo does what it says: real processes, real training at toy size, real memory limits."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from folders import RECIPES
from forks import Forks
from json_outputs import documented
from torch import nn
from typer.testing import CliRunner

from ssdtrain.run_log import read_run
from ssdtrain.tools.cli import app
from ssdtrain.tools.demo import process
from ssdtrain.tools.demo.compare import Comparison, RunResult
from ssdtrain.tools.demo.model import GPT, GPTConfig
from ssdtrain.tools.demo.process import WorkerError, WorkerProcess, describe_exit
from ssdtrain.tools.demo.report import verdict
from ssdtrain.tools.demo.saved_counter import SavedTensorCounter
from ssdtrain.tools.demo.settings import DemoSettings
from ssdtrain.tools.demo.text import Text, standard_library

RECIPE = RECIPES / "train_gpt.py"
SECONDS = 120
POLICY = {"mode": "all", "min_nbytes": "64KiB", "staging_nbytes": "4MiB", "prefetch_nbytes": "4MiB"}
SHAPE = ["--layers=6", "--width=128", "--heads=4", "--batch=8", "--sequence=256", "--steps=2", "--threads=1"]
TINY = ["--layers=1", "--width=32", "--heads=1", "--batch=1", "--sequence=32", "--steps=1", "--threads=1"]
OPTIONS = [*SHAPE, *(f"--policy={name}={value}" for name, value in POLICY.items())]


def toy_settings(directory: Path) -> DemoSettings:
    return DemoSettings(str(directory), 2, 64, 2, batch=2, sequence=64, steps=1, threads=1, policy=POLICY)


def run_demo(*options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ssdtrain", "demo", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


def last_json(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    values: dict[str, Any] = documented("demo", result.stdout)
    return values


def test_the_demo_compares_equal_runs_and_says_so_in_one_line_of_json(tmp_path: Path) -> None:
    drive, record = tmp_path / "drive", tmp_path / "run.ssdtrain"
    drive.mkdir()
    result = run_demo(*OPTIONS, "--json", "--directory", drive, f"--policy=record={record}")
    values = last_json(result)
    plain, ours = values["plain"], values["ssdtrain"]
    assert values["losses_equal"] is True
    assert values["parameters_equal"] is True
    assert plain["losses"] == ours["losses"]
    assert len(plain["losses"]) == 2
    assert values["step_time_ratio"] == ours["step_seconds"] / plain["step_seconds"]
    assert values["written_nbytes"] > 0
    assert values["read_nbytes"] > 0
    assert values["stall_seconds"] >= 0
    assert values["engine"] in ("io_uring", "threads", "python")
    assert 0 < ours["peak_saved_nbytes"] < plain["peak_saved_nbytes"]
    assert plain["peak_rss_nbytes"] > plain["peak_saved_nbytes"]
    assert "peak saved tensors" in result.stdout
    assert "step 2/2" in result.stderr
    assert list(drive.iterdir()) == []
    assert "--layers=6" in read_run(record).environment["command"], "what was typed, not how workers are started"


def test_under_a_memory_limit_only_the_plain_run_dies(tmp_path: Path) -> None:
    values = last_json(run_demo(*OPTIONS, "--json", "--directory", tmp_path, "--memory-limit", "auto"))
    assert values["plain"]["outcome"].startswith("out of memory in ")
    assert values["ssdtrain"]["outcome"] == "finished"
    assert values["losses_equal"] is True
    assert len(values["ssdtrain"]["losses"]) == 2
    assert values["memory_limit_nbytes"] > 0


def test_a_limit_that_both_runs_keep_is_a_failure(tmp_path: Path) -> None:
    result = run_demo(*TINY, "--directory", tmp_path, "--memory-limit", "20GiB")
    assert result.returncode == 1
    assert "Choose a smaller limit" in result.stderr


def test_a_directory_that_cannot_be_used_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    result = run_demo(*TINY, "--directory", tmp_path / "missing")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert str(tmp_path / "missing") in result.stderr


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--policy=min_nbyte=1MiB"], "Did you mean 'min_nbytes'"),
        (["--policy=mode"], "FIELD=VALUE"),
        (["--width=65"], "Try --width"),
        (["--memory-limit=much"], "Expected a size"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(options: list[str], hint: str) -> None:
    result = CliRunner().invoke(app, ["demo", *options])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert hint in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_no_worker_outlives_the_demo(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """Ctrl-C is answered with exit code 130; killed, the demo cannot do a thing, and its workers end all the same."""
    command = [sys.executable, "-m", "ssdtrain", "demo", *TINY, "--steps=100000", f"--directory={tmp_path}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stderr is not None
        assert any(line.startswith("warm-up") for line in demo.stderr)
        workers = psutil.Process(demo.pid).children()
        demo.send_signal(number)
        demo.communicate(timeout=SECONDS)  # reads on: a demo whose words nobody takes could not end
        assert demo.returncode == code
    assert len(workers) == 2
    deadline = time.monotonic() + SECONDS
    while any(is_alive(worker) for worker in workers):
        assert time.monotonic() < deadline
    assert list(tmp_path.iterdir()) == []


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_the_death_of_a_worker_is_explained_and_not_waited_for(tmp_path: Path) -> None:
    with WorkerProcess("plain", toy_settings(tmp_path)) as worker:
        worker.start()
        worker.receive()
        os.kill(worker.pid, signal.SIGKILL)
        worker.send(command="step")
        with pytest.raises(WorkerError) as caught:
            worker.receive()
    assert caught.value.kind == "out_of_memory"
    assert "SIGKILL" in caught.value.detail


def test_a_worker_that_hangs_is_aborted_and_shows_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that waits for its next command hangs as well as any: nobody gives it one."""
    monkeypatch.setattr(process, "_EXIT_SECONDS", SECONDS)
    with WorkerProcess("plain", toy_settings(tmp_path)) as worker:
        worker.start()
        worker.receive()
        worker.reply_seconds = 0.1
        with pytest.raises(WorkerError, match="no answer") as caught:
            worker.receive()
    assert "SIGABRT" in caught.value.detail
    assert "in messages" in caught.value.detail


def test_an_exception_in_a_worker_is_passed_on_with_its_traceback(tmp_path: Path) -> None:
    with WorkerProcess("plain", toy_settings(tmp_path)) as worker:
        worker.start()
        worker.receive()
        worker.send(command="dance")
        with pytest.raises(WorkerError, match="dance") as caught:
            worker.receive()
    assert caught.value.kind == "failure"
    assert "KeyError" in caught.value.detail
    assert "peak_rss_nbytes" in caught.value.measurements


def test_exit_codes_are_put_into_words() -> None:
    assert describe_exit(3) == "exit code 3"
    assert "out-of-memory" in describe_exit(-signal.SIGKILL)
    assert describe_exit(-signal.SIGTERM) == "signal SIGTERM"
    assert describe_exit(-63) == "signal 63"


def test_different_losses_or_parameters_are_a_problem(tmp_path: Path) -> None:
    run = RunResult("plain", [(1.0).hex()], [1.0], {"parameters_sha256": "a"})
    same = Comparison(toy_settings(tmp_path), run, replace(run, role="ssdtrain"))
    other_loss = replace(same, ssdtrain=replace(run, losses=[(1.0 + 2**-52).hex()]))
    other_hash = replace(same, ssdtrain=replace(run, measurements={"parameters_sha256": "b"}))
    assert same.problem is None
    for comparison in (other_loss, other_hash):
        assert re.search("different", comparison.problem or "")


def test_under_a_limit_the_plain_run_must_fail_and_the_other_must_not(tmp_path: Path) -> None:
    good = RunResult("plain", [(1.0).hex()], [1.0])
    bad = replace(good, failure=WorkerError("plain", "out_of_memory", "can't allocate memory"))
    settings = toy_settings(tmp_path)
    assert Comparison(settings, bad, good, 1 << 20).problem is None
    assert "smaller limit" in (Comparison(settings, good, good, 1 << 20).problem or "")
    assert "out of memory in step 1" in (Comparison(settings, bad, bad, 1 << 20).problem or "")


def test_the_default_model_has_about_25_million_parameters() -> None:
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in GPT(GPTConfig()).parameters())
    assert 24e6 < num_parameters < 26e6


def test_the_model_looks_at_no_later_token() -> None:
    """Changing the last token alone must leave the loss of all earlier positions as it is."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=2, width=32, heads=2, sequence=16))
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, -1] += 1
    targets = torch.full((1, 16), -100)  # cross-entropy's own mark for positions that do not count
    targets[0, :15] = tokens[0, 1:]
    assert torch.equal(model(tokens, targets), model(changed, targets))


def test_batches_are_windows_of_the_text_and_depend_on_seed_and_step_alone() -> None:
    data = standard_library()
    text = Text(data, seed=1)
    tokens, targets = text.batch(5, size=3, sequence=64)
    assert len(text) == len(data) > 1_000_000
    assert tokens.shape == targets.shape == (3, 64)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert all(bytes(row.tolist()) in data for row in tokens)
    assert torch.equal(tokens, Text(data, seed=1).batch(5, size=3, sequence=64)[0])
    assert not torch.equal(tokens, text.batch(6, size=3, sequence=64)[0])
    assert not torch.equal(tokens, Text(data, seed=2).batch(5, size=3, sequence=64)[0])


def test_a_text_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="longer text"):
        Text(b"x" * 64).batch(0, size=1, sequence=64)
    with pytest.raises(ValueError, match="0 bytes"):
        Text(b"")


def test_the_counter_counts_each_live_storage_once_and_no_parameter() -> None:
    """Linear saves its input and its weight, Tanh its result: x and tanh(x) at the peak, nothing after."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    x = torch.randn(8, 32)
    with SavedTensorCounter(model.parameters()) as counter:
        for _ in range(2):
            model(x).sum().backward()
    # Two of 8 x 32 float32: the input of the first layer, and what both Tanh and the second layer save.
    assert counter.peak_nbytes == 2 * 8 * 32 * 4
    assert counter.live_nbytes == 0


def test_the_recipe_trains_the_same_numbers_with_and_without_offloading(forks: Forks, tmp_path: Path) -> None:
    shape = ["--layers=2", "--width=64", "--heads=2", "--batch=2", "--sequence=64", "--steps=3"]
    losses = []
    for extra in (["--min-nbytes=4KiB"], ["--no-offload"]):
        (done,) = forks.run([RECIPE, "--device=cpu", f"--dir={tmp_path}", *shape, *extra])
        assert done.returncode == 0, done.stderr
        losses.append(re.findall(r"loss ([0-9.]+)", done.stdout))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


@pytest.mark.parametrize(("rss", "saved", "says"), [(600, 100, "400.0 MiB less memory"), (1010, 810, "10.0 MiB MORE")])
def test_the_verdict_is_one_sentence_about_the_peak_of_the_run(rss: int, saved: int, says: str) -> None:
    def run(role: str, rss: int, saved: int, seconds: float, **stats: Any) -> RunResult:
        sizes = {"peak_rss_nbytes": rss << 20, "peak_saved_nbytes": saved << 20}
        return RunResult(role, ["0x1p0"] * 2, [seconds], {**sizes, "parameters_sha256": "a", "stats": stats})

    plain = run("plain", 1000, 800, 2.0)
    ours = run("ssdtrain", rss, saved, 2.1, peak_memory_step=3, num_offloaded=0, plan="declined: too little")
    lines = verdict(Comparison(toy_settings(Path()), plain, ours))
    assert says in lines[0] and "(step 3)" in lines[0] and "x 1.05 the time" in lines[0] and "to the bit" in lines[0]
    assert "Nothing was moved" in lines[0] and lines[1] == "plan       declined: too little"
    assert verdict(Comparison(toy_settings(Path()), plain, RunResult("ssdtrain"))) == []
