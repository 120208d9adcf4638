"""The benchmark of the hooks, at toy size: it runs, measures what it says, and ends with JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "recipes" / "benchmarks" / "hooks.py"


def test_hooks(tmp_path: Path) -> None:
    """No number is a gate here; that tensors travelled in the case that says so is."""
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--repeats", "3"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.splitlines()
    result = json.loads(lines[-1])
    assert {"processor", "cores", "torch", "ssdtrain"} <= result["machine"].keys()
    ours = {row["case"]: row for row in result["rows"] if row["hooks"] == "ssdtrain"}
    assert len(ours) == 4 and all(row["target_us"] > 0 for row in ours.values())
    for case, row in ours.items():
        assert (row["travelled"] > 0.8) == case.endswith("travels")
    assert list(tmp_path.iterdir()) == []
