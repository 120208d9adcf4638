"""`python -m ssdtrain.launch`: trainings that cannot be edited, with ssdtrain in the trainer they import."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from folders import JOBS, ROOT

from ssdtrain.launch import options

SCRIPT = """
import sys
print("before", [name for name in ("deepspeed", "transformers", "lightning", "torch") if name in sys.modules])
from pathlib import Path
import trainers_hf, trainers_lightning
own = trainers_hf.trainer(Path(sys.argv[1]) / "out", max_steps=2)
own.train()
sessions = [c.session for c in own.callback_handler.callbacks if type(c).__name__ == "Offload"]
fitted, _ = trainers_lightning.fit(Path(sys.argv[1]))
sessions += [c.session for c in fitted.callbacks if type(c).__name__ == "Offload"]
print("sessions", [(bool(s.stats.num_saved), bool(s.state_stats[0].read_nbytes)) for s in sessions])
"""


def launch(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """With Lightning's entry points as the package declares them; an older installation may not have them yet."""
    declared = (ROOT / "pyproject.toml").read_text()
    found = re.findall(r'^\[project\.entry-points\."(.*)"\]\n((?:\w.*\n)*)', declared, re.M)
    assert found
    missing = [(group, lines) for group, lines in found if not entry_points(group=group, name="ssdtrain")]
    info = folder / "points" / "declared-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\nVersion: 0\n")
    points = "\n".join(f"[{group}]\n{lines}" for group, lines in missing)
    (info / "entry_points.txt").write_text(points.replace('"', ""))
    path = os.pathsep.join([str(folder / "points"), str(ROOT), str(JOBS), *(p for p in sys.path if p)])
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "ssdtrain.launch", *arguments], env=os.environ | environment | variables,
        capture_output=True, text=True, cwd=folder, timeout=600, check=False,
    )  # fmt: skip


def test_options_before_the_script() -> None:
    given = "--local_rank=1 --dir /a --dir=/b --optimizer --parameters false -m x --dir".split()
    expected = {"SSDTRAIN_DIR": "/a:/b", "SSDTRAIN_OPTIMIZER": "true", "SSDTRAIN_PARAMETERS": "false"}
    assert options(given) == (expected, ["--local_rank=1", "-m", "x", "--dir"])
    assert options(["--optimizer", '{"a": 1}', "x.py"]) == ({"SSDTRAIN_OPTIMIZER": '{"a": 1}'}, ["x.py"])
    assert options(["x.py", "--dir", "/a"]) == ({}, ["x.py", "--dir", "/a"])
    with pytest.raises(SystemExit, match="Expected a value after --dir, got nothing"):
        options(["--dir"])


def test_a_wrong_setting_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('began')")
    done = launch(tmp_path, "--dir", str(tmp_path), "train.py", SSDTRAIN_OPTIMISER="1")
    assert done.returncode == 1 and "got SSDTRAIN_OPTIMISER. Did you mean SSDTRAIN_OPTIMIZER" in done.stderr
    assert "began" not in done.stdout and "Traceback" not in done.stderr


STARTS = """
import subprocess, sys
subprocess.run([sys.executable, "-c", ""], check=True)
subprocess.run(["./torchrun", "--nproc_per_node", "2", "-m", "ssdtrain.launch", "x.py"], check=True)
for command in (["./torchrun", "x.py"], ["deepspeed", "x.py"], [sys.executable, "-m", "torch.distributed.run", "x.py"]):
    try:
        subprocess.run(command)
    except RuntimeError as error:
        print(error)
"""


def test_processes_that_would_train_without_are_refused(tmp_path: Path) -> None:
    """Those that a script starts; with ssdtrain in them, and of other programs, all may be started."""
    (tmp_path / "train.py").write_text(STARTS)
    (tmp_path / "torchrun").write_text("#!/bin/sh\n")
    (tmp_path / "torchrun").chmod(0o700)
    done = launch(tmp_path, "--dir", str(tmp_path), "train.py")
    assert done.returncode == 0, done.stderr
    for name in ("torchrun", "deepspeed", "torch.distributed.run"):
        assert f"Expected a script that trains in its own process, got one that starts {name}, whose" in done.stdout


def test_launchers_come_first(tmp_path: Path) -> None:
    done = launch(tmp_path, "--dir", str(tmp_path), "-m", "torch.distributed.run", "x.py")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "run that first, as in torchrun --nproc-per-node 8 -m ssdtrain.launch" in done.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("lightning") is None,
    reason="needs transformers and lightning (make test installs them)",
)
def test_every_trainer_of_a_script_offloads(tmp_path: Path) -> None:
    """Nothing is imported before the script does."""
    (tmp_path / "train.py").write_text(SCRIPT)
    optimizer = '{"min_nbytes": "1KiB", "chunk_nbytes": "64KiB"}'
    done = launch(
        tmp_path, "--dir", str(tmp_path), "--optimizer", optimizer, "train.py", str(tmp_path),
        SSDTRAIN_MODE="all", SSDTRAIN_MIN_NBYTES="1KiB", SSDTRAIN_STAGING_NBYTES="256KiB",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "before ['torch']" in done.stdout
    assert "sessions [(True, True), (True, True)]" in done.stdout, done.stdout
