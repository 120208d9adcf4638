"""Random programs over parameters and optimizer state (`helpers/fuzz_state.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from doses import dose
from folders import HELPERS


@pytest.mark.parametrize(("count", "ranks"), [(dose(30, 2000), 1), (dose(4, 20), 2)], ids=["alone", "on two ranks"])
def test_random_programs_are_equal_or_refused_by_name(tmp_path: Path, count: int, ranks: int) -> None:
    """Casts, averages, penalties, clipping, edits, checkpoints and exceptions, in any order: the same losses and values
    to the bit, or an error that names the cause and changed nothing. The seed of a failure is in the output."""
    command = [
        sys.executable,
        str(HELPERS / "fuzz_state.py"),
        f"--count={count}",
        f"--ranks={ranks}",
        f"--directory={tmp_path}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=dose(900, 7200))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert done.stdout.count("nothing wrong") == ranks, done.stdout[-4000:]
