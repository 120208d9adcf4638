"""Children and the end of a process, with copies under way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from standin_tools import make
from torch.utils.data import DataLoader

import ssdtrain

UNFINISHED = """
import sys, torch, ssdtrain
directory = sys.argv[1] if len(sys.argv) > 1 else None
offload = ssdtrain.offload_activations(directory, {"mode": "all", "min_nbytes": "64KiB", "staging_nbytes": "1MiB"})
x = torch.ones(1 << 18, device="cuda", requires_grad=True)
with offload:
    y = x
    for _ in range(8): y = y.sin()
print("over")
"""


def test_workers_of_a_data_loader_are_forked_while_copies_are_under_way(make: Any, tmp_path: Path) -> None:
    x = torch.linspace(0, 1, 1 << 18, device="cuda", requires_grad=True)

    def epoch(offload: ssdtrain.ActivationOffload | None) -> torch.Tensor:
        x.grad = None
        entered = offload.__enter__() if offload is not None else None
        y = x
        for _ in range(6):
            y = y.sin()
        if entered is not None:
            assert [len(batch) for batch in DataLoader(range(32), batch_size=8, num_workers=2)] == [8] * 4
            offload.__exit__(None, None, None)
        y.sum().backward()
        return x.grad.cpu()

    expected = epoch(None)
    offload = make("drive", mode="all", staging_nbytes="1MiB")
    for _ in range(3):
        assert torch.equal(epoch(offload), expected)
    assert offload.stats.num_offloaded > 0


def test_a_process_may_end_with_work_under_way(tmp_path: Path) -> None:
    for arguments in ([str(tmp_path)], []):
        command = [sys.executable, "-c", UNFINISHED, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, "over\n"), done.stderr
    assert list(tmp_path.iterdir()) == []
