"""A run record has one writer and is a file; and whatever is read as one, the report says what it is in one line."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from record_mutations import EVIL, blocks_of, mutated, outcome_of, record_of
from run_tools import POLICY, network, recorded_run, train
from typer.testing import CliRunner, Result

import ssdtrain
from ssdtrain.report import describe
from ssdtrain.report.page import render
from ssdtrain.report.timeline import Bar, levelled
from ssdtrain.run_log import RecordError, read_run
from ssdtrain.run_log.format import _FRAME
from ssdtrain.tools.cli import app

# -- one writer --------------------------------------------------------------------------------------------------------


def test_a_record_has_one_writer(tmp_path: Path) -> None:
    """Two runs wrote into one file in turns, and `ssdtrain report` called the mixture complete."""
    path = tmp_path / "run.ssdtrain"
    first = ssdtrain.offload_activations(tmp_path, POLICY, record=path)
    train(first, network(), 2)
    with pytest.raises(FileExistsError, match=r"in use; close\(\) the other offload") as raised:
        ssdtrain.offload_activations(tmp_path, POLICY, record=path)
    assert raised.value.filename == str(path)
    train(first, network(), 2)
    first.close()
    run = read_run(path)
    assert run.num_steps == 4 and run.is_complete and not run.num_damaged
    second = ssdtrain.offload_activations(tmp_path, POLICY, record=path)
    train(second, network(), 1)
    second.close()
    assert read_run(path).num_steps == 1


def test_a_record_that_another_process_writes_is_refused_until_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "run.ssdtrain"
    code = (
        "import sys, ssdtrain\n"
        f"offload = ssdtrain.offload_activations({str(tmp_path)!r}, record={str(path)!r})\n"
        "print('open', flush=True); sys.stdin.read()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, env=environment) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(FileExistsError, match="in use"):
            ssdtrain.offload_activations(tmp_path, record=path)
        other.kill()
        other.wait()
    recorded_run(tmp_path, 1)


def test_a_child_that_outlives_a_record_does_not_lock_it(tmp_path: Path) -> None:
    """A worker that a data loader forked has the descriptor too, and may live on when the offload is closed."""
    path = tmp_path / "run.ssdtrain"
    first = ssdtrain.offload_activations(tmp_path, record=path)
    own = next(fd for fd in map(int, os.listdir("/proc/self/fd")) if links_to(fd, path))
    with subprocess.Popen(["cat"], stdin=-1, pass_fds=[own]) as child:
        first.close()
        ssdtrain.offload_activations(tmp_path, record=path).close()
        assert child.poll() is None


def links_to(fd: int, path: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == str(path)
    except FileNotFoundError:  # of the listing itself
        return False


@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "folder", "read fifo"])
def test_only_files_are_recorded_to(tmp_path: Path, kind: str) -> None:
    """A pipe hung until somebody read it; a device was overwritten."""
    path = tmp_path / "record"
    reader = None
    if "fifo" in kind:
        os.mkfifo(path)
        if kind == "read fifo":
            reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as own:
            own.bind(str(path))
    else:
        path.mkdir()
    with pytest.raises(FileExistsError, match="Expected a regular file or none for the record"):
        ssdtrain.offload_activations(tmp_path, record=path)
    if reader is not None:
        assert os.read(reader, 10) == b""
        os.close(reader)


# -- what is read as one -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded_run(tmp_path_factory.mktemp("record"), 6)[0]


@pytest.fixture(scope="module")
def blocks(record: Path) -> list[dict[str, Any]]:
    return blocks_of(record)


def report(path: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["report", str(path), *options])


def test_mutated_records_are_read_or_refused_in_one_line(blocks: list[dict[str, Any]], tmp_path: Path) -> None:
    """Of 1,500 mutated records, 658 ended in a traceback: `KeyError`, `TypeError`, `OverflowError` and others."""
    path, outcomes = tmp_path / "run.ssdtrain", Counter[str]()
    for seed in range(300):
        path.write_bytes(mutated(blocks, random.Random(seed)))
        try:
            outcomes[outcome_of(path, is_drawn=seed % 60 == 0)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
    assert sum(outcomes.values()) == 300 and not [name for name in outcomes if name.startswith("badly")], outcomes
    assert outcomes["refused"] > 50 and outcomes["read"] > 50, outcomes


def texts_replaced(value: Any) -> Any:
    """Every text that is not a keyword of the format."""
    if isinstance(value, dict):
        return {key: item if key in ("kind", "why") else texts_replaced(item) for key, item in value.items()}
    if isinstance(value, list):
        return [texts_replaced(item) for item in value]
    return f"{value}{EVIL}" if isinstance(value, str) else value


def test_no_text_of_a_record_becomes_markup(blocks: list[dict[str, Any]], record: Path, tmp_path: Path) -> None:
    """A step's number could be a script."""
    pytest.importorskip("bokeh")
    evil = texts_replaced(blocks)
    for plain, block in zip(blocks, evil, strict=True):
        if block["kind"] == "run":
            block["counters"] = plain["counters"]
            block["environment"]["packages"] = {EVIL: EVIL}
            block["policy"][EVIL] = [EVIL]
        elif block["kind"] == "state":
            block["modules"] = {f"{EVIL}{name}": sums for name, sums in plain["modules"].items()}
            block["stats"]["skipped"] = {EVIL: {"count": 1, "nbytes": 1}}
            block["stats"]["fallbacks"] = [EVIL]
    path = tmp_path / "run.ssdtrain"
    path.write_bytes(record_of(evil))
    page, harmless = render(describe(read_run(path))), render(describe(read_run(record)))
    assert page.count("<script") == harmless.count("<script") and page.count("</script") == harmless.count("</script")
    assert page.count("&lt;script&gt;alert(1)") > 10
    for field in ("step", "num_steps", "seconds", "peak_nbytes"):
        crafted = [block | {field: EVIL} if block["kind"] == "step" else block for block in blocks]
        path.write_bytes(record_of(crafted))
        result = report(path, "-o", str(tmp_path / "page.html"))
        assert result.exit_code == 2 and result.stderr.count("\n") == 1 and field in result.stderr
        assert not (tmp_path / "page.html").exists()


def test_a_headline_cannot_steer_the_terminal(blocks: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "run.ssdtrain"
    for block in blocks:
        if block["kind"] == "state":
            block["stats"]["plan"] = "x; \x1b]0;gone\x07"
    path.write_bytes(record_of(blocks))
    result = report(path)
    assert result.exit_code == 0 and "\x1b" not in result.stdout and "]0;gone" in result.stdout


def framed(payload: bytes) -> bytes:
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def deflated(text: bytes) -> bytes:
    return framed(zlib.compress(text, 9))


BOMBS = {
    "one text": lambda: deflated(b'{"kind":"' + b" " * (300 << 20) + b'"}'),
    "many lists": lambda: deflated(b'{"kind":"step","counters":[' + b"[]," * (20 << 20) + b"[]]}"),
    "deep": lambda: deflated(b"[" * (8 << 20)),
    "many blocks": lambda: deflated(b'{"kind":"state","stats":{"x":"' + b" " * (50 << 20) + b'"}}') * 400,
    "cut in the middle": lambda: framed(zlib.compress(b'{"kind":"end"}' + b" " * 1000)[:-8]),
    "no zlib": lambda: framed(b"hello"),
    "nothing": lambda: framed(b""),
    "no JSON": lambda: deflated(b"hello"),
    "no object": lambda: deflated(b"[1]"),
    "digits": lambda: deflated(b'{"kind":"state","step":' + b"9" * (10 << 20) + b"}"),
}


@pytest.mark.parametrize("what", BOMBS)
def test_what_swells_is_refused_at_once(blocks: list[dict[str, Any]], tmp_path: Path, what: str) -> None:
    """A few hundred kilobytes took minutes and all memory. What a file may hold is bounded by its size."""
    path = tmp_path / "run.ssdtrain"
    path.write_bytes(record_of(blocks) + BOMBS[what]())
    assert path.stat().st_size < 25 << 20
    result = report(path)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "that no run wrote" in result.stderr, result


def test_only_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    for own in (path, Path("/dev/zero"), tmp_path):
        result = report(own)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1


def test_a_record_that_is_still_written_can_be_read(record: Path, tmp_path: Path) -> None:
    """Reading takes no lock, and what comes after it has begun is left for the next time."""
    path = tmp_path / "run.ssdtrain"
    offload = ssdtrain.offload_activations(tmp_path, POLICY, record=path)
    train(offload, network(), 3)
    with contextlib.suppress(RecordError):  # the writing thread may not have begun
        assert read_run(path).num_steps >= 1
    offload.close()
    assert read_run(path).num_steps == 3


def test_an_older_record_is_read(blocks: list[dict[str, Any]], tmp_path: Path) -> None:
    """Before parameters and optimizer state shared the drive there were fewer counters; unknown blocks are left out."""
    path = tmp_path / "run.ssdtrain"
    older: list[dict[str, Any]] = []
    for block in json.loads(json.dumps(blocks)):
        if block["kind"] == "run":
            dropped = block["counters"].index("hosted_nbytes")
        if block["kind"] in ("run", "step"):
            del block["counters"][dropped]
        older.append(block)
    path.write_bytes(record_of([*older, {"kind": "of tomorrow", "x": [1]}]))
    assert read_run(path).num_steps == 6 and describe(read_run(path))["summary"]["totals"]["hosted_nbytes"] == 0


def test_bars_side_by_side_take_the_lowest_free_level() -> None:
    """It took minutes to place a hundred thousand requests that were all under way at once."""
    spans = [(0, 10), (0, 4), (1, 3), (3, 9), (4, 5), (5, 8), (10, 12)]
    placed = levelled([Bar("reads", begin, end, "") for begin, end in spans])
    assert [level for _, level in placed] == [0, 1, 2, 2, 1, 1, 0]
    many = levelled([Bar("reads", i, 10**6 + i, "") for i in range(100_000)])
    assert [level for _, level in many] == list(range(100_000))
