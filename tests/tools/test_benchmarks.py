"""The benchmarks at toy size: they run, measure what they say, and end with JSON. No number is a gate here."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from doses import dose
from folders import RECIPES, ROOT
from forks import Forks

BENCHMARKS = RECIPES / "benchmarks"


def run(forks: Forks, script: str, *arguments: str) -> Any:
    (done,) = forks.run([BENCHMARKS / script, *arguments])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_hooks(forks: Forks, tmp_path: Path) -> None:
    """Tensors were offloaded in the case that says so, and in no other."""
    result = run(forks, "hooks.py", str(tmp_path), "--repeats", "3")
    assert {"processor", "cores", "torch", "ssdtrain"} <= result["machine"].keys()
    ours = {row["case"]: row for row in result["rows"] if row["hooks"] == "ssdtrain"}
    assert len(ours) == 5 and all(row["target_us"] > 0 for row in ours.values())
    for case, row in ours.items():
        assert (row["offloaded"] > 0.8) == ("offloaded" in case)
        assert (row["pack_calls"] > 20 and row["unpack_locks"] >= 1) == ("offloaded" in case)
    assert list(tmp_path.iterdir()) == []


def test_planning(forks: Forks) -> None:
    result = run(forks, "planning.py", "--records", "50", "--repeats", "1")
    assert [row["step"] for row in result["rows"]] == ["tower"] * 3 + ["scattered"] * 3
    assert all(row["seconds"] > 0 for row in result["rows"])


@pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio (Debian: apt-get install fio)")
def test_engine(forks: Forks, tmp_path: Path) -> None:
    """Both directions and all engines, each beside fio."""
    size = ["--request-mib", "1", "--depth", "2", "--file-mib", "8", "--repeats", "1"]
    result = run(forks, "engine.py", str(tmp_path), *size)
    rows = {(row["direction"], row["engine"]) for row in result["rows"]}
    assert rows == {(d, e) for d in ("write", "read") for e in ("fio", "io_uring", "threads")}
    assert list(tmp_path.iterdir()) == []


def test_gpu(forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs without a GPU: every way gives the same gradients, and bytes left in ours."""
    size = "--hidden 64 --heads 2 --layers 3 --sequence 64 --batch 2 --dtype float32 --repeats 1 --warm-up 1".split()
    policy = '{"min_nbytes": 0, "staging_nbytes": "256KiB"}'
    written = tmp_path / "gpu.json"
    result = run(forks, "gpu.py", str(tmp_path), *size, "--policy", policy, "--json", str(written))
    assert json.loads(written.read_text()) == result and result["is_complete"]
    rows = {row["variant"]: row for row in result["rows"]}
    assert {"plain", "ssdtrain drive auto", "ssdtrain drive all", "save_on_cpu", "recompute"} <= rows.keys()
    assert all(row["is_equal"] for row in rows.values())
    assert rows["ssdtrain drive all"]["stats"]["written_nbytes"] > 0
    assert result["saved_nbytes"] > 0 and result["machine"]["torch"]
    moved = [rows[f"ssdtrain drive {mode}"] for mode in ("all", "auto")]
    assert all(0 < row["moved_nbytes"] <= result["saved_nbytes"] for row in moved[:1])
    assert not result["drive_gbs"] or all(0 < row["fraction_of_bound"] < 2 for row in moved)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_tables

    for table in (gpu_tables.gpu_section, gpu_tables.gpu_summary):
        text = table({"drive-64": result})
        assert result["machine"]["torch"] in text and "| ssdtrain drive all" in text, text


def test_gpu_leaves_what_it_measured_whenever_it_ends(tmp_path: Path) -> None:
    """In the middle of the rounds that only teach: the file is whole at any time, and SIGINT also leaves the table."""
    size = "--hidden 64 --heads 2 --layers 2 --sequence 64 --batch 2 --dtype float32".split()
    size += "--warm-up 100000 --seconds 3600".split()  # it does not end by itself
    written, begun = tmp_path / "gpu.json", False
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), str(tmp_path), *size, "--json", str(written)]
    deadline = time.monotonic() + 300  # it imports PyTorch first, on a machine that may be busy
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            while not begun and process.poll() is None and time.monotonic() < deadline:
                begun = written.exists() and len(json.loads(written.read_text())["rows"]) > 1
                time.sleep(0.01)
            printed = interrupted(process)
        finally:
            process.kill()
    result = json.loads(written.read_text())
    assert not result["is_complete"]
    assert [row["num_steps"] for row in result["rows"]][:2] == [0, 0]
    assert all(row["step_seconds"] > 0 for row in result["rows"][:2])
    assert "equal\nplain " in printed and json.loads(printed.splitlines()[-1]) == result


def interrupted(process: subprocess.Popen[str]) -> str:
    """What it printed until SIGINT ended it: Python swallows one that comes inside a destructor, and a user repeats."""
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=60)[0]
    raise AssertionError("Expected the benchmark to end after SIGINT, got one that goes on")


def test_gpu_keeps_what_it_measured(forks: Forks, tmp_path: Path) -> None:
    """Without time for all rounds, those that were counted are in the file and in the table."""
    size = "--hidden 64 --heads 2 --layers 2 --sequence 64 --batch 2 --dtype float32 --repeats 1000 --warm-up 1".split()
    result = run(forks, "gpu.py", str(tmp_path), *size, "--seconds", "3")
    assert 1 <= result["rows"][0]["num_steps"] < 1000


def test_gpu_script_is_well_formed() -> None:
    """It cannot run without a GPU; its syntax and the files it names can be checked."""
    script = BENCHMARKS / "gpu.sh"
    subprocess.run(["bash", "-n", script], check=True)
    named = [
        word for word in script.read_text().replace("\\\n", " ").split() if word.startswith(("tests/", "recipes/"))
    ]
    assert named and all((ROOT / word).exists() for word in named), named


def test_readme_shows_the_recorded_results(tmp_path: Path) -> None:
    """Tables and pictures of README and docs are made from the data, not by hand."""
    names = "demo compare curve engine memory_cap resident state_cap state_compare throttle throttle_large".split()
    results = [f"recipes/benchmarks/results/{name}.json" for name in names]
    scripts = [f"recipes/benchmarks/{name}.py" for name in ("tables", "gpu_tables", "picture", "state_figures")]
    pages = ["README.md", "docs/explanation/benchmarks.md", "docs/explanation/on-a-gpu.md"]
    for name in (*scripts, *results, *pages):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([sys.executable, str(tmp_path / "recipes/benchmarks/tables.py")], check=True)
    pictures = [f"docs/explanation/{name}.svg" for name in ("compare", "curve")]
    for name in (*pages, *pictures):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), name


def test_resident(tmp_path: Path) -> None:
    """Whole processes, hence in processes of their own."""
    size = "--sizes 1 --steps 2 --width 32 --sequence 32 --threads 1".split()
    script = BENCHMARKS / "resident.py"
    ran = subprocess.run(
        [sys.executable, str(script), str(tmp_path), *size], check=True, capture_output=True, text=True
    )
    (row,) = json.loads(ran.stdout.splitlines()[-1])["rows"]
    plain, ours, trimmed = (row["methods"][name] for name in ("plain", "ssdtrain", "trimmed"))
    assert row["is_equal"] and min(m["resident_nbytes"] for m in (plain, ours, trimmed)) > 64 << 20
    assert ours["saved_nbytes"] > 0 and ours["estimated_nbytes"] >= ours["resident_nbytes"]


def test_compare(forks: Forks, tmp_path: Path) -> None:
    """Every method that runs here learns the same, and one that cannot says why."""
    size = "--layers 2 --width 32 --heads 2 --sequence 32 --batch 2 --steps 1 --threads 1".split()
    size += ["--min-nbytes", "1KiB", "--staging", "64KiB"]  # small ones would wait for company
    able = ["plain", "checkpoint per block", "ssdtrain, mode all"]
    others = dose([], ["DeepSpeed checkpoint_in_cpu"]) + ["Transformers offload", "torchtune OffloadActivations"]
    options = ["--models", "llama", "--methods", *able, *others, *size]
    rows = run(forks, "compare.py", str(tmp_path), *options)["models"]["llama"]
    ran = {row["method"]: row for row in rows if "unavailable" not in row}
    assert set(able) <= ran.keys()
    assert all(row["is_equal"] and row["peak_nbytes"] > 0 and row["step_ratio"] > 0 for row in ran.values())
    assert ran["ssdtrain, mode all"]["written_nbytes"] > 0
    assert all(row["unavailable"] for row in rows if row["method"] not in ran)


def test_curve(forks: Forks, tmp_path: Path) -> None:
    """Every branch has its points, all learn the same, and a budget below what plain training saves sends bytes."""
    size = "--layers 3 --width 64 --heads 2 --sequence 64 --batch 2 --steps 1 --threads 1 --shares 0.2".split()
    rows = run(forks, "curve.py", str(tmp_path), *size, "--min-nbytes", "4KiB", "--staging", "128KiB")["points"]
    assert [row["branch"] for row in rows] == ["plain", "recompute", "offload", "mix", "recompute"]
    assert all(row["is_equal"] and row["peak_nbytes"] > 0 and row["step_ratio"] > 0 for row in rows)
    plain, offload = rows[0], rows[2]
    assert offload["memory_budget"] < plain["peak_saved_nbytes"] and offload["written_nbytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_state_compare(forks: Forks, tmp_path: Path) -> None:
    """Losses are those of plain training."""
    size = ["--layers", "2", "--width", "64", "--sequence", "16", "--batch", "1", "--rounds", "1"]
    methods = ["plain", "ssdtrain", "ssdtrain, optimizer only"]
    result = run(forks, "state_compare.py", str(tmp_path), *size, "--methods", *methods)
    assert [row["method"] for row in result["rows"]] == methods
    assert all(row["is_equal"] and row["step_seconds"] > 0 for row in result["rows"])
    assert list(tmp_path.iterdir()) == []


def test_state_cap(forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a cap that a toy does not feel: losses and parameters are those of plain training, and it was offloaded."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from memory_group import why_not

    if why_not() or not os.access("/sys/fs/cgroup/blkio", os.W_OK):
        pytest.skip("needs root and cgroups")
    size = ["--layers", "2", "--width", "128", "--sequence", "16", "--batch", "1", "--steps", "2", "--share", "3"]
    result = run(forks, "state_cap.py", str(tmp_path), *size, "--ceiling", "16")
    assert result["is_equal"] and result["capped"]["group_peak_nbytes"] <= result["cap_nbytes"]
    for run_name, what in (("capped", "parameters"), ("capped", "optimizer"), ("paged", "optimizer")):
        assert result[run_name]["stats"][what]["away_nbytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_the_ceiling_of_an_update_reads_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of reserved room that was never written ask no drive: half of the bytes of the ceiling were free.

    A file system that has no such holes to show passes in any case.
    """
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from state_cap import Ceiling

    ceiling = Ceiling(str(tmp_path), nbytes := 8 << 20)
    os.fsync(ceiling.fd)
    assert os.lseek(ceiling.fd, 0, os.SEEK_HOLE) == 2 * nbytes
    assert ceiling.measure() > 0
    os.close(ceiling.fd)


def test_recording(forks: Forks, tmp_path: Path) -> None:
    """Both copies trained, and a record was written."""
    size = "--layers 2 --width 64 --heads 2 --sequence 32 --batch 2 --rounds 4 --min-nbytes 4KiB".split()
    result = run(forks, "recording.py", str(tmp_path), *size)
    assert result["step_seconds"] > 0 and result["record_nbytes_per_step"] > 100 and result["thread_seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_needs_more_than_the_cap_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import memory_group as groups

    if reason := groups.why_not():
        pytest.skip(reason)
    for nbytes, killed in ((16 << 20, 0), (256 << 20, 1)):
        with groups.memory_group(128 << 20) as group:
            script = f"b'x' * {nbytes}"
            done = subprocess.run([*group.command, sys.executable, "-c", script], timeout=60)
            assert (done.returncode != 0, group.num_kills) == (killed == 1, killed)
            assert nbytes < group.peak_nbytes or killed


@pytest.mark.parametrize("limit", [1, 5, 64, 140, 1290])
def test_the_largest_batch_is_found_to_an_eighth(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search alone; what a trial needs is said by the kernel, in the test above."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import memory_cap

    tried: list[int] = []

    def try_batch(name: str, batch: int, args: Namespace) -> dict[str, Any] | None:
        tried.append(batch)
        return {"batch": batch} if batch <= limit else None

    monkeypatch.setattr(memory_cap, "try_batch", try_batch)
    found = memory_cap.largest("plain", Namespace(first=64, cap=0))["batch"]
    assert found <= limit <= found + max(1, 1.15 * found / 8) and len(tried) < 16
    limit = 0
    with pytest.raises(SystemExit, match="larger --cap"):
        memory_cap.largest("plain", Namespace(first=64, cap=0))
