"""What a process takes with ssdtrain and without, over the size of what training saves: measured, and as promised.

    python recipes/benchmarks/rss.py /mnt/nvme
    python recipes/benchmarks/rss.py /mnt/nvme --saved 64 256 1024

A row is two processes that train the same blocks, one of them inside `offload_activations` at its defaults. Resident
memory is the kernel's high-water mark above the level before the first step, over the whole run: allocator, staging and
idle memory count, and the first steps, in which there is no plan, do too. "promised" is what the plain run took, less
what the plan in force says that saved tensors and our buffers will take less.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

MIB = 1 << 20
WIDTH, ROWS = 256, 4096
SAVED_PER_BLOCK = 3 * WIDTH * ROWS * 4  # what a linear, a GELU and another linear save


def status(field: str) -> int:
    """One size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def train(directory: str, num_blocks: int, num_steps: int, is_plain: bool) -> dict[str, Any]:
    """Trains in this process."""
    import torch

    import ssdtrain

    def block() -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU(), torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh()
        )

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[block() for _ in range(num_blocks)])
    policy = ssdtrain.ActivationPolicy(enabled=not is_plain)
    offload = ssdtrain.offload_activations(directory, policy=policy)
    Path("/proc/self/clear_refs").write_text("5")
    level = status("VmRSS")
    with offload if not is_plain else contextlib.nullcontext():
        for _ in range(num_steps):
            model(torch.randn(ROWS, WIDTH)).square().mean().backward()
            model.zero_grad()
    found: dict[str, Any] = {"rss_nbytes": status("VmHWM") - level}
    if not is_plain:
        plan, stats = offload.plan, offload.stats
        fall = 0 if plan is None else plan.kept_peak_nbytes - plan.peak_nbytes - plan.buffers_nbytes
        found |= {"saved_nbytes": stats.without_nbytes, "fall_nbytes": max(0, fall), "plan": stats.plan}
    offload.close()
    return found


def measure(directory: str, saved_mib: int, num_steps: int) -> dict[str, Any]:
    """One row."""
    num_blocks = max(1, saved_mib * MIB // SAVED_PER_BLOCK)

    def run(kind: str) -> dict[str, Any]:
        command = [sys.executable, __file__, directory, "--run", kind, str(num_blocks), str(num_steps)]
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if result.returncode:
            raise RuntimeError(f"Expected a run that ends, got code {result.returncode}:\n{result.stderr}")
        found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
        return found

    plain, ours = run("plain"), run("ssdtrain")
    saved, fall = ours["saved_nbytes"], ours["fall_nbytes"]
    return {
        "saved_nbytes": saved,
        "plain_rss_nbytes": plain["rss_nbytes"],
        "rss_nbytes": ours["rss_nbytes"],
        "promised_rss_nbytes": plain["rss_nbytes"] - fall,
        "fall_of_saved": (plain["rss_nbytes"] - ours["rss_nbytes"]) / saved,
        "plan": ours["plan"],
    }


def main() -> None:
    """Prints a row per size, and JSON at last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--saved", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512, 1024, 2048], help="MiB")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        kind, num_blocks, num_steps = arguments.run
        print(json.dumps(train(arguments.directory, int(num_blocks), int(num_steps), kind == "plain")))
        return
    print(f"{'saved':>8} {'plain':>8} {'ssdtrain':>8} {'promised':>8}  MiB of resident memory")
    rows = []
    for saved in arguments.saved:
        row = measure(arguments.directory, saved, arguments.steps)
        rows.append(row)
        names = ("saved_nbytes", "plain_rss_nbytes", "rss_nbytes", "promised_rss_nbytes")
        print(" ".join(f"{row[name] / MIB:8.0f}" for name in names), f" {row['plan']}", flush=True)
    machine = {"cores": os.cpu_count(), "system": platform.platform()}
    print(json.dumps({"machine": machine, "steps": arguments.steps, "rows": rows}))


if __name__ == "__main__":
    main()
