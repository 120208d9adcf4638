"""Two runs side by side, modules as a tree, and what a record says of itself."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from json_outputs import documented
from run_tools import recorded_run
from typer.testing import CliRunner

from ssdtrain.report import describe
from ssdtrain.report.compare import as_text, compare
from ssdtrain.report.page import render
from ssdtrain.report.tables import as_tree
from ssdtrain.run_log import Run, read_run
from ssdtrain.run_log.environment import _command, _commit
from ssdtrain.tools.cli import app


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded_run(tmp_path_factory.mktemp("two"), 4, staging_nbytes="64KiB", prefetch_nbytes="64KiB")[0]


@pytest.fixture(scope="module")
def run(record: Path) -> Run:
    return read_run(record)


def test_rows_are_measurements_and_what_differs(run: Run) -> None:
    first, second = describe(run), describe(run)
    changed = ("typical_seconds", "peak_nbytes", "without_nbytes")
    second["summary"] = second["summary"] | {name: 2 * first["summary"][name] for name in changed}
    second["policy"] = second["policy"] | {"mode": "other"}
    rows = {name: values for name, *values in compare(first, second)}
    assert rows["typical step"][2] == "+100.0 %" and rows["peak of a typical step"][2] == "+0.0 %"
    assert rows["peak of the run"][2] == rows["the same without ssdtrain"][2] == "+100.0 %", "those of the report"
    assert rows["mode"] == [first["policy"]["mode"], "other", ""] and "staging_nbytes" not in rows
    assert len({line.index("other") for line in as_text(compare(first, second)).splitlines() if "other" in line}) == 1


def test_the_command_takes_two_records(record: Path, tmp_path: Path) -> None:
    both, page = [str(record), str(record)], tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", *both, "-o", str(page)])
    assert result.exit_code == 0 and "typical step" in result.stdout and "+0.0 %" in result.stdout, result.output
    assert "<h1>" in page.read_text() and "<script" not in page.read_text()
    printed = documented("report RUN RUN", CliRunner().invoke(app, ["report", *both, "--json"]).stdout)
    assert printed["runs"][0]["summary"] == printed["runs"][1]["summary"]
    for refused in ([*both, str(record)], [*both, "--trace", str(tmp_path / "trace")]):
        result = CliRunner().invoke(app, ["report", *refused])
        assert result.exit_code == 2 and "Expected one record, or two without --trace" in result.stderr


def test_totals_of_modules_are_sums_of_what_is_inside() -> None:
    def row(module: str, nbytes: int) -> dict[str, Any]:
        names = ("num_records", "kept_nbytes", "host_nbytes", "disk_nbytes", "stall_seconds")
        return {"module": module, "nbytes": nbytes, "tier": "drive", **dict.fromkeys(names, 1)}

    rows = [row("h.1.mlp", 8), row("h.0.mlp", 4), row("h.0.attention", 2), row("h.0", 1), row("head", 3)]
    found = [(depth, each["module"], each["nbytes"]) for depth, each in as_tree(rows)]
    assert found == [
        (0, "h.*", 15),
        (1, "h.1.mlp", 8),
        (1, "h.0.*", 7),
        (2, "h.0", 1),
        (2, "h.0.mlp", 4),
        (2, "h.0.attention", 2),
        (0, "head", 3),
    ]


def test_tables_scroll_and_are_read_out_with_their_headings(run: Run) -> None:
    page = render(describe(run))
    page = page[page.index("<main>") : page.index("</main>")]
    named = r'<div class=scroll role=region tabindex=0 aria-label="([^"]+)"><table[^>]* aria-label="([^"]+)"'
    tables = re.findall(named, page)
    assert len(tables) == page.count("<table") >= 6 and all(region == own for region, own in tables)
    assert len(re.findall("<th[ >]", page)) == page.count("<th scope=")


def test_a_record_says_when_where_and_how(run: Run) -> None:
    told = run.environment
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]", told["began"]) and told["host"] and told["command"]
    page = render(describe(run))
    assert told["began"] in page


def test_secrets_on_a_command_line_are_not_recorded() -> None:
    given = ["train.py", "--hub-token", "abc", "--api-key=abc", "--lr", "1", "--seed=3"]
    assert _command(given) == "train.py --hub-token ... --api-key=... --lr 1 --seed=3"


def test_the_commit_is_that_of_the_directory(tmp_path: Path) -> None:
    assert _commit(tmp_path) == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert _commit(tmp_path) == ""
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "one"], check=True)
    expected = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    (tmp_path / "inner").mkdir()
    assert _commit(tmp_path / "inner") == expected
    subprocess.run([*git, "pack-refs", "--all"], check=True)
    assert _commit(tmp_path) == expected
    subprocess.run([*git, "worktree", "add", "-q", str(tmp_path / "beside"), "-b", "other"], check=True)
    assert _commit(tmp_path / "beside") == expected
