"""The measurement of a drive, at toy size; figures are not looked at, only that they are there and hang together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from drives import Drive
from json_outputs import documented
from typer.testing import CliRunner

from ssdtrain.policy import ActivationPolicy
from ssdtrain.tools.bench import Options, Report, Row, advise, bench_drive
from ssdtrain.tools.cli import app

KIB, MIB = 1 << 10, 1 << 20
TOY = Options(8 * MIB, 16 * MIB, 1.0, (256 * KIB, MIB), (1, 4), 1)


def run(*options: str) -> Any:
    return CliRunner().invoke(app, ["bench", *options])


def test_everything_is_measured(tmp_path: Path) -> None:
    seen: list[float] = []
    report = bench_drive(str(tmp_path), TOY, lambda _, done: seen.append(done))
    assert [(row.request_nbytes, row.depth) for row in report.rows] == [
        (256 * KIB, 1),
        (256 * KIB, 4),
        (MIB, 1),
        (MIB, 4),
    ]
    for row in report.rows:
        assert min(row.write_gbs, row.read_gbs, row.write_ceiling_gbs, row.read_ceiling_gbs) > 0
        assert 0 < row.write_seconds < 10 and 0 < row.read_seconds < 10
    assert report.steady_gbs > 0 and report.mixed_gbs > 0
    assert MIB <= report.sustained_written_nbytes <= 24 * MIB
    assert seen == sorted(seen) and seen[-1] == 1.0
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def row(request: int, depth: int, write: float, read: float) -> Row:
    return Row(request, depth, write, read, write, read, 0.001, 0.001)


def test_advice() -> None:
    """The smallest staging that reaches nearly all of the bandwidth, and what the drive hides in the long run."""
    rows = [row(MIB, 1, 1.0, 2.0), row(4 * MIB, 8, 2.95, 2.0), row(4 * MIB, 32, 3.0, 2.0)]
    report = Report("/x", "io_uring", "", "fio", 64 * MIB, rows, [3.0, 3.0, 1.2, 1.0], 1)
    advice = advise(report)
    assert advice.policy == {"staging_nbytes": 64 * MIB, "prefetch_nbytes": 64 * MIB}
    assert ActivationPolicy.of(advice.policy).staging_nbytes == 64 * MIB
    assert report.steady_gbs == pytest.approx(1.1) and advice.hidden_gb_per_forward_second == pytest.approx(1.1)
    report.sustained_gbs = [9.0]
    assert advise(report).hidden_gb_per_forward_second == pytest.approx(4.0), "reading is the bound"


def test_command(tmp_path: Path) -> None:
    result = run(str(tmp_path), "--quick", "--json")
    assert result.exit_code == 0
    values = documented("bench", result.stdout)
    assert values["rows"] and values["policy"]["staging_nbytes"] and values["hidden_gb_per_forward_second"] > 0
    assert list(tmp_path.iterdir()) == []


def test_table(tmp_path: Path) -> None:
    result = run(str(tmp_path), "--size", "8MiB", "--total", "16MiB", "--seconds", "0.2")
    assert result.exit_code == 0
    words = " ".join(result.stdout.split())
    assert "of activations per second of forward" in words and "GB/s in the long run" in words


@pytest.mark.parametrize(
    "options, message",
    [(["--size", "many"], "size"), (["--size", "1KiB"], "--size"), (["--total", "0"], "--total")],
)
def test_bad_options(tmp_path: Path, options: list[str], message: str) -> None:
    result = run(str(tmp_path), *options)
    assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_no_directory(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").touch()
    result = run(str(tmp_path / kind))
    assert result.exit_code == 2 and kind in result.stderr


def test_a_drive_that_is_too_full(small_ext4: Drive) -> None:
    result = run(str(small_ext4.directory), "--quick")
    assert result.exit_code == 1 and "free" in result.stderr
