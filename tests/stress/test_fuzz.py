"""A few hundred random faults in every test run; `python tests/helpers/fuzz.py` plays ten thousand."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from doses import dose
from folders import HELPERS


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_random_faults(tmp_path: Path) -> None:
    """Random programs under random faults of the drive: equal to the bit, or an error that says where; no leak, no
    hang. The seed of a failure is in the output."""
    command = [
        sys.executable,
        str(HELPERS / "fuzz.py"),
        "--faults",
        str(dose(400, 10_000)),
        "--directory",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=dose(600, 3600))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "nothing wrong" in done.stdout
