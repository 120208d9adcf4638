"""The end of the interpreter finds threads inside the extension: they are left where they are, and nothing aborts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ssdtrain._C", reason="about threads inside the extension")

PROGRAM = """
import sys, threading
from ssdtrain import _C

num_opened, are_many = [0], threading.Event()

def open_files():
    while True:
        _C.SpillFile(sys.argv[1])
        num_opened[0] += 1
        if num_opened[0] > 200:
            are_many.set()

for _ in range(4):
    threading.Thread(target=open_files, daemon=True).start()
are_many.wait()
"""


def test_daemon_threads_in_system_calls_do_not_abort_the_process(tmp_path: Path) -> None:
    """A file that is opened too late, by a helper thread that nobody waits for, used to end in "terminate called"."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    for _ in range(3):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
