"""The face of the `ssdtrain` command: names, refusals, and what it prints where."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import ssdtrain
from ssdtrain.tools.bench import Report, Row
from ssdtrain.tools.cli import app
from ssdtrain.tools.cli.bench import _NOISE, _share
from ssdtrain.tools.doctor import Verdict, examine

COMMANDS = ["demo", "doctor", "bench", "plan", "report"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


def test_versions_are_told() -> None:
    result = run("--version")
    assert result.exit_code == 0 and result.output.startswith(f"ssdtrain {ssdtrain.__version__} (Python 3.")
    assert "PyTorch 2." in result.output


@pytest.mark.parametrize("command", [[], *[[name] for name in COMMANDS]], ids=" ".join)
def test_help_is_complete_at_80_columns(command: list[str]) -> None:
    """Sentences that are cut off end in dots."""
    short, long = run(*command, "-h"), run(*command, "--help")
    assert short.exit_code == 0 and short.output == long.output
    assert not [line for line in short.output.splitlines() if line.endswith("...") and not line.startswith("Usage:")]
    assert max(map(len, short.output.splitlines())) <= 80


def test_shells_complete() -> None:
    """Also as `python -m ssdtrain`, of whose words no shell makes a function or a variable."""
    asked = {"_SSDTRAIN_COMPLETE": "complete_bash", "COMP_WORDS": "ssdtrain d", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "ssdtrain"]
    completed = subprocess.run(command, capture_output=True, text=True, env=os.environ | asked)
    assert completed.stdout.split() == ["demo", "doctor"], completed.stderr


def test_former_names_of_options_are_understood_and_not_shown(tmp_path: Path) -> None:
    now = run("plan", "--width", "2048", "--sequence", "512", "--json")
    former = run("plan", "--hidden=2048", "--seq", "512", "--json")
    assert now.exit_code == 0 and now.output == former.output
    missing = str(tmp_path / "missing")
    assert run("plan", "--trace", missing).stderr == run("plan", "--record", missing).stderr
    assert not {"--hidden", "--seq ", "--trace"} & set(run("plan", "-h").output.split())
    assert "--directory" not in run("demo", "-h").output


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["plan", "--memory-budget", "1GiB"], "Expected --record with --memory-budget"),
        (["plan", "--drive-read-gbs", "3"], "Expected --record with --drive-read-gbs"),
        (["plan", "--record", "x", "--layers", "3"], "--record or --layers"),
        (["plan", "--drive-price", "90"], "Expected --tbw with --drive-price"),
        (["plan", "--sequence", "0"], "--sequence"),
        (["plan", "--gpu", "400:much"], "400:48GB"),
        (["bench", ".", "--quick", "--size", "64MiB"], "--quick or --size"),
        (["bench", ".", "--size", "lots"], "--size: Expected a size such as"),
        (["bench", ".", "--total", "1MiB"], "Expected a size of at least 8.0 MiB for --total, got '1MiB'"),
        (["demo", ".", "--memory-limit", "lots"], "--memory-limit: Expected a size such as"),
        (["demo", ".", "--memory-limit", "8"], "1.0 MiB for --memory-limit, got '8'; with no unit it is bytes"),
        (["demo", ".", "--width", "33"], "Expected --width to be a multiple of --heads, got"),
        (["demo", ".", "--policy", "mode=any"], "mode: Input should be 'auto' or 'all', got 'any'"),
        (["demo", ".", "--directory", "."], "DIRECTORY or --directory"),
        (["doctor", ""], "a directory, got ''"),
        (["bench", ""], "a directory, got ''"),
        (["demo", ""], "a directory, got ''"),
    ],
    ids=" ".join,
)
def test_what_means_nothing_is_refused_in_the_words_of_the_command(arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and says in result.stderr and len(result.stderr.splitlines()) == 1


def test_gpus_by_any_case_and_of_ones_own() -> None:
    assert run("plan", "--gpu", "h200", "--json").output == run("plan", "--gpu", "H200", "--json").output
    assert '"memory_nbytes": 48000000000.0' in run("plan", "--gpu", "400:48GB", "--json").output


def test_nothing_exceeds_its_ceiling() -> None:
    """A drive that was busy while its ceiling was measured gives no share at all, and the reason."""
    assert [_share(gbs, 2.0) for gbs in (1.0, 2.0, 2.1, 11.6)] == ["50%", "100%", "100%", "noise"]
    row = Row(1 << 20, 8, 5.78, 1.0, 1.0, 1.0, 0.001, 0.001)
    assert Report("/x", "threads", "", "fio", 1 << 20, [row]).best is row and "noise" in _NOISE


def test_what_is_not_installed_is_not_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssdtrain.tools.doctor.software.installed", lambda name: "2.13.0" if name == "torch" else None)
    found = {finding.name: finding.verdict for finding in examine([str(tmp_path)])}
    assert {found[name] for name in ("deepspeed", "megatron-core", "kvikio")} == {Verdict.ABSENT}


def test_pipes_get_one_line_per_finding() -> None:
    """A terminal of 40 columns beside a pipe wraps nothing in it."""
    command = [sys.executable, "-m", "ssdtrain", "doctor", os.curdir]
    text = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "40"}).stdout
    assert all(line == line.rstrip() for line in text.splitlines())
    (engine,) = [line for line in text.splitlines() if line.startswith("  engine")]
    assert engine.split()[1] in ("ok", "warn") and len(engine) > 40


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with ssdtrain.offload_activations("~", record="~/run.ssdtrain"):
        pass
    assert run("doctor", "~", "--json").exit_code == 0
