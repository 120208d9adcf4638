"""What is wrong on one rank of two is an error on both, before anything has changed, and nobody waits for anybody."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from drives import fill, tmpfs_drive
from folders import HELPERS, JOBS, ROOT

LIMIT_SECONDS = 600

# By case: what the rank says on which it is, and what both say where it is on both.
ON_ONE = {
    "missing": ("FileNotFoundError", "does not exist"),
    "file": ("NotADirectoryError", "file"),
    "full": ("OSError", "Expected room for"),
    "optimizer": ("ValueError", "needs no closure, got LBFGS"),
    "switch": ("ValueError", "turn activation_offloading off"),
    "save_on_cpu": ("ValueError", "save_on_cpu"),
}
ON_BOTH = {
    "yaml": "got 'optimiser'. Did you mean 'optimizer'?",
    "variable": "got SSDTRAIN_DIRR. Did you mean SSDTRAIN_DIR?",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each rank heard, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join(map(str, (ROOT, HELPERS)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, str(JOBS / "begin_worker.py")]
    with (folder / "output").open("w") as output, tmpfs_drive(folder / "tmpfs", 6 << 20) as drive:
        fill(drive.directory, 64 << 10)
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(folder), str(drive.directory)], env=environment, stdout=output, stderr=output
            )
            for rank in range(2)
        ]
        try:
            codes = [rank.wait(LIMIT_SECONDS) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    assert codes == [0, 0], (folder / "output").read_text()[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", ON_ONE)
def test_on_one_rank(said: list[dict[str, str]], case: str) -> None:
    kind, text = ON_ONE[case]
    good, bad = (rank[case] for rank in said)
    assert bad.startswith(kind) and text in bad
    assert good.startswith(f"RuntimeError: Expected ssdtrain to start on every rank, got an error on rank 1 {kind}")
    assert text in good


@pytest.mark.parametrize("case", ON_BOTH)
def test_on_both_ranks(said: list[dict[str, str]], case: str) -> None:
    for rank in said:
        assert rank[case].startswith("ValueError: ") and ON_BOTH[case] in rank[case]


def test_then_it_trains(said: list[dict[str, str]]) -> None:
    assert [rank["left"] for rank in said] == ["[]", "[]"]
