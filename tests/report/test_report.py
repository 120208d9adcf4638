"""The report: what it says is what was recorded, in JSON, on a page in a real browser, and as a trace."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from json_outputs import documented
from run_tools import browser, recorded_run
from typer.testing import CliRunner

from ssdtrain.report import chrome_trace, describe
from ssdtrain.report.page import render
from ssdtrain.report.timeline import LANES, RESIDENCIES, Stay, bars, levelled, memory, residency, stays
from ssdtrain.report.words import daily_text, seconds_text, share_text
from ssdtrain.run_log import Detail, Run, read_run
from ssdtrain.run_log.encode import COUNTERS
from ssdtrain.stats import nbytes_text
from ssdtrain.tools.cli import app

MIB = 1 << 20


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded_run(tmp_path_factory.mktemp("report"), 10, staging_nbytes="64KiB", prefetch_nbytes="64KiB")[0]


@pytest.fixture(scope="module")
def run(record: Path) -> Run:
    return read_run(record)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_record(run: Run) -> None:
    described = describe(run)
    assert [row["step"] for row in described["steps"]] == list(range(1, 11))
    assert [row["peak_nbytes"] for row in described["steps"]] == [row["peak_nbytes"] for row in run.steps]
    written = sum(row["written_nbytes"] for row in described["steps"])
    assert written == described["wear"]["written_nbytes"] == run.steps[-1]["counters"]["written_nbytes"] > 0
    assert described["summary"]["stall_seconds"] == run.steps[-1]["counters"]["stalled_seconds"]
    half = len(run.steps) // 2
    later = written - run.steps[half - 1]["counters"]["written_nbytes"]
    daily = later / sum(row["seconds"] for row in run.steps[half:]) * 86400
    assert described["wear"]["written_nbytes_per_day"] == pytest.approx(daily)
    assert described["wear"]["life_years"] == pytest.approx(600e12 / daily / 365.25)
    assert {row["reason"] for row in described["kept"]} == set(run.stats["skipped"])
    by_module = sum(row["nbytes"] for row in described["modules"]) * 10
    assert by_module == pytest.approx(sum(kept + host + disk for _, kept, host, disk, _ in run.modules.values()))


def test_the_drawn_peak_without_is_the_recorded_one(run: Run) -> None:
    """Two ways to the same number: from the planner's view of a step, and from what is drawn."""
    for detail in run.details:
        row = run.steps[detail.step - 1]
        drawn = memory(detail)
        assert max(drawn["without"]) == row["peak_if_kept_nbytes"]
        assert max(drawn["with ssdtrain"]) < max(drawn["without"])


def test_residencies_add_up_to_what_was_saved(run: Run) -> None:
    for detail in run.details:
        columns, without = residency(detail), memory(detail)
        totals = {at: sum(columns[name][i] for name in RESIDENCIES) for i, at in enumerate(columns["at"])}
        for at, nbytes in zip(without["at"], without["without"], strict=True):
            assert totals.get(at, nbytes) == nbytes


def hand_made(**changes: Any) -> Detail:
    """One record of 1 MiB: saved at 0, copied by 20, written by 50, back by 80, needed at 90, gone at 100 ms."""
    columns = {
        "nbytes": [MIB], "module": [0], "micro_batch": [0], "saved": [0], "needed": [90_000], "released": [100_000],
        "where": [2], "planned": [],
    }  # fmt: skip
    values: dict[str, Any] = {
        "step": 1,
        "why": "first",
        "began": 5.0,
        "seconds": 0.1,
        "num_omitted": 0,
        "is_wall_time": True,
        "modules": ["h.0"],
        "records": columns,
        "writes": [[0, MIB, 0, 0, 10_000, 11_000, 20_000, 21_000, 50_000]],
        "reads": [[0, MIB, 0, 60_000, 61_000, 80_000]],
        "stalls": [["read", 0, 90_000, 5_000]],
        "other": [],
    }
    return Detail(**(values | changes))


def test_a_record_is_where_its_requests_say() -> None:
    assert stays(hand_made()) == [Stay(MIB, 0, 10_000, 20_000, 50_000, 60_000, 80_000, 100_000, False)]
    columns = residency(hand_made())
    found = dict(zip(columns["at"], zip(*(columns[name] for name in RESIDENCIES), strict=True), strict=True))
    assert found == {
        #        left alone, in memory, leaving, host, drive, coming back
        0: (0, MIB, 0, 0, 0, 0),
        10_000: (0, 0, MIB, 0, 0, 0),
        50_000: (0, 0, 0, 0, MIB, 0),
        60_000: (0, 0, 0, 0, 0, MIB),
        80_000: (0, MIB, 0, 0, 0, 0),
        100_000: (0, 0, 0, 0, 0, 0),
    }
    drawn = memory(hand_made())
    assert dict(zip(drawn["at"], drawn["with ssdtrain"], strict=True)) == {
        0: MIB, 50_000: 0, 60_000: MIB, 100_000: 0,
    }  # fmt: skip


def test_what_never_left_or_was_cancelled_stayed() -> None:
    cancelled = [[0, MIB, 0, 1, 10_000, -1, 12_000, -1, 12_000]]
    for detail in (hand_made(writes=[], reads=[]), hand_made(writes=cancelled, reads=[])):
        assert set(residency(detail)["in memory"]) == {MIB, 0} and not any(residency(detail)["on the drive"])


def test_what_comes_back_before_it_left_is_in_memory_all_the_time() -> None:
    early = hand_made(reads=[[0, MIB, 1, 30_000, -1, 31_000]])
    assert max(residency(early)["on the drive"]) == 0
    assert memory(early)["with ssdtrain"][:-1] == [MIB] * (len(memory(early)["at"]) - 1)


def test_bars_name_what_they_are() -> None:
    found = {(bar.lane, bar.begin, bar.end): bar for bar in bars(hand_made())}
    assert found["copies", 11_000, 20_000].label == "copy out of h.0"
    assert found["writes", 21_000, 50_000].nbytes == MIB
    assert found["reads", 61_000, 80_000].label == "read of h.0"
    assert found["stalls", 90_000, 95_000].label == "waited for a read of h.0"
    assert {bar.lane for bar in found.values()} == set(LANES)


def test_bars_of_one_level_never_overlap(run: Run) -> None:
    last: dict[tuple[str, int], int] = {}
    for bar, level in levelled(bars(run.details[-1])):
        assert last.get((bar.lane, level), 0) <= bar.begin < bar.end
        last[bar.lane, level] = bar.end


@pytest.mark.parametrize(
    "text, expected",
    [
        (seconds_text(0), "0 s"),
        (seconds_text(0.0012345), "1.23 ms"),
        (seconds_text(0.0523), "52.3 ms"),
        (seconds_text(1.234), "1.23 s"),
        (seconds_text(12345.6), "12,346 s"),
        (share_text(0.74), "74 %"),
        (share_text(0.003), "0.3 %"),
        (share_text(0.0001), "less than 0.1 %"),
        (daily_text(1.5e12), "1.50 TB"),
        (daily_text(2e9), "2.00 GB"),
    ],
)
def test_numbers_for_people(text: str, expected: str) -> None:
    assert text == expected


def test_the_headline_says_gain_and_cost(run: Run) -> None:
    gain, cost, wear = describe(run)["headline"]
    summary = describe(run)["summary"]
    assert nbytes_text(summary["peak_nbytes"]) in gain and share_text(summary["saved_share"]) in gain
    assert f"in step {summary['peak_step']}" in gain
    assert summary["peak_nbytes"] == run.stats["peak_memory_nbytes"] >= summary["highest_peak_nbytes"]
    assert "10 steps" in cost and "a day" in wear and "years" in wear


def test_the_headline_says_what_bounds_the_gain(run: Run) -> None:
    plan = "the peak falls by 40%, and nothing waits; the drive's endurance allows 1.0 MiB of the 3.0 MiB of a step"
    bounded = Run(**(vars(run) | {"stats": run.stats | {"plan": plan}}))
    described = describe(bounded)
    typical = nbytes_text(described["summary"]["typical_peak_nbytes"])
    limit = "The drive's endurance allows 1.0 MiB of the 3.0 MiB of a step."
    assert described["headline"][0].endswith(f"less; a typical step's peak is {typical}. {limit}")


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_what_was_asked_for(record: Path, run: Run, tmp_path: Path) -> None:
    page, trace = tmp_path / "report.html", tmp_path / "trace.json"
    result = CliRunner().invoke(app, ["report", str(record), "-o", str(page), "--trace", str(trace), "--json"])
    assert result.exit_code == 0, result.output
    assert documented("report RUN", result.stdout) == json.loads(json.dumps(describe(run)))
    assert page.read_text().startswith("<!doctype html>") and json.loads(trace.read_text())["traceEvents"]
    plain = CliRunner().invoke(app, ["report", str(record)])
    assert plain.stdout.splitlines() == describe(run)["headline"]


@pytest.mark.parametrize("data", [b"", b"hello", b"ssdtrain run record 99\n", b"ssdtrain run record 1\n\0\0"])
def test_what_cannot_be_read_is_one_line_and_exit_code_2(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    for unreadable in (path, tmp_path / "missing", tmp_path):
        result = CliRunner().invoke(app, ["report", str(unreadable)])
        assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "ssdtrain report: " in result.stderr
        assert str(unreadable) in result.stderr


def test_a_place_that_cannot_be_written_to(record: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(record), "--trace", str(tmp_path / "no" / "trace.json")])
    assert result.exit_code == 2 and "No such file" in result.stderr


def test_without_the_package_that_draws_there_is_still_json(
    record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bokeh.embed", None)
    result = CliRunner().invoke(app, ["report", str(record), "-o", str(tmp_path / "report.html")])
    assert result.exit_code == 2 and 'pip install "ssdtrain[report]"' in result.stderr
    assert CliRunner().invoke(app, ["report", str(record), "--json"]).exit_code == 0


# -- the trace ---------------------------------------------------------------------------------------------------------


def test_the_trace_keeps_the_rules_of_the_format(run: Run) -> None:
    """Trace Event Format: what complete, counter and metadata events must have; slices of a thread are apart."""
    events = json.loads(json.dumps(chrome_trace(run)))["traceEvents"]
    for event in events:
        assert event["ph"] in "XCM" and isinstance(event["pid"], int) and isinstance(event["name"], str)
        if event["ph"] != "M":
            assert isinstance(event["ts"], int | float)
    slices = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] >= 0 and isinstance(event["tid"], int) for event in slices)
    by_track: dict[int, list[tuple[int, int]]] = {}
    for event in slices:
        by_track.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in by_track.values():
        spans.sort()
        assert all(end <= begin + 1 for (_, end), (begin, _) in itertools.pairwise(spans))
    counters = [event for event in events if event["ph"] == "C"]
    assert counters and all(
        set(event["args"]) == set(RESIDENCIES) and min(event["args"].values()) >= 0 for event in counters
    )


def test_the_trace_has_named_tracks_for_all_that_happened(run: Run) -> None:
    events = chrome_trace(run)["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"steps", *LANES} <= set(names.values())
    used = {names[event["tid"]].split()[0] for event in events if event["ph"] == "X"}
    assert {"steps", "forward", "backward", "copies", "writes", "reads"} <= used
    steps = [event for event in events if event["ph"] == "X" and event["cat"] == "step"]
    assert [event["name"] for event in steps] == [f"step {i}" for i in range(1, 11)]
    forward = [event for event in events if event["ph"] == "X" and event["cat"] == "forward"]
    assert all(any(s["ts"] <= f["ts"] <= s["ts"] + s["dur"] for s in steps) for f in forward)


# -- the page ----------------------------------------------------------------------------------------------------------


def text_of(page: str) -> str:
    body = page[page.index("<main>") : page.index("</main>")].replace("<wbr>", "")
    return unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body)))


def test_the_page_says_what_json_says(run: Run) -> None:
    described = describe(run)
    text = text_of(render(described))
    for sentence in described["headline"]:
        assert sentence in text
    for row in described["modules"]:
        assert f"{row['module']} {row['num_records']:.0f} {nbytes_text(row['nbytes'])} {row['tier']}" in text
    for row in described["kept"]:
        assert f"{row['reason']} {row['count']:.1f} {nbytes_text(row['nbytes'])}" in text
    for direction in ("write", "read"):
        assert f"{described['bandwidth'][f'{direction}_used_gbs']:.2f} GB/s" in text
    assert described["engine"]["reason"] in text and described["environment"]["packages"]["torch"] in text
    assert "endurance_tbw 600" in text


def test_every_figure_has_a_caption_and_nothing_is_fetched(run: Run) -> None:
    page = render(describe(run))
    assert page.count("<figure>") == page.count("<figcaption>") >= 6
    assert not re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(?!data:)', page)


def test_text_of_the_run_cannot_become_markup(run: Run) -> None:
    described = describe(run)
    described["fallbacks"] = ["<script>alert(1)</script>"]
    page = render(described)
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page


def test_a_cut_record_is_said_on_the_page(record: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.ssdtrain"
    cut.write_bytes(record.read_bytes()[:-30])
    assert "did not close its record" in text_of(render(describe(read_run(cut))))


def long_run(run: Run, num_steps: int) -> Run:
    """The same run over and over."""
    counters = dict.fromkeys(COUNTERS, 0)
    steps = [
        run.steps[i % len(run.steps)] | {"step": i + 1, "counters": counters | {"written_nbytes": i * MIB}}
        for i in range(num_steps)
    ]
    return Run(**(vars(run) | {"steps": steps}))


def test_a_thousand_steps_fit_five_megabytes(run: Run) -> None:
    page = render(describe(long_run(run, 1000)))
    assert len(page.encode()) < 5e6
    assert len(describe(long_run(run, 5500))["steps"]) <= 1000


@pytest.mark.needs_browser
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_a_browser_draws_it_without_network(run: Run, tmp_path: Path, width: int, scheme: str) -> None:
    from PIL import Image

    page, frame, picture = (tmp_path / name for name in ("report.html", "frame.html", "picture.png"))
    page.write_text(render(describe(long_run(run, 1000))), encoding="utf-8")
    # In a frame, since a browser's own window has a least width; the frame's document decides what is wide and dark.
    frame.write_text(
        f'<!doctype html><meta name="color-scheme" content="light dark"><body style="margin:0">'
        f'<iframe id=f src="{page.as_uri()}" style="border:0;width:{width}px;height:4000px"></iframe>'
    )
    log = chromium(tmp_path, f"--screenshot={picture}", f"--window-size={max(width, 500)},4000", frame, scheme=scheme)
    dom = chromium(tmp_path, "--dump-dom", "--window-size=1280,4000", page, scheme=scheme)
    drawn = re.search(r'<html[^>]* data-drawn="(\d+)" data-errors="([^"]*)"', dom)
    assert drawn is not None and drawn[2] == "", log[-2000:]
    assert not re.findall(r"CONSOLE.*(?:[Ee]rror|Uncaught|Refused|ERR_)", log + dom)
    assert int(drawn[1]) < 10_000  # about 1000 here; in a test on a shared machine only "not stuck" can be said
    image = Image.open(picture).convert("RGB")
    corner = image.getpixel((2, 2))
    assert isinstance(corner, tuple) and (sum(corner) < 200) == (scheme == "dark")
    colours = {pixel for _, pixel in image.getcolors(1 << 24) or []}
    for colour in ("#2f7ed8", "#5b6bd6", "#e0b01e", "#3f9d6b"):  # forward, backward, copies, reads: figures have them
        assert tuple(bytes.fromhex(colour[1:])) in colours, colour


def chromium(folder: Path, *arguments: str | Path, scheme: str) -> str:
    program = browser()
    assert program is not None
    options = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-extensions",
        "--allow-file-access-from-files", "--enable-logging=stderr", "--v=0", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--virtual-time-budget=10000", f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
    ]  # fmt: skip
    last = [argument.as_uri() if isinstance(argument, Path) else argument for argument in arguments]
    result = subprocess.run([program, *options, *last], capture_output=True, text=True, timeout=90)
    return result.stdout + result.stderr
