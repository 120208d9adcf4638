"""Does the process need less memory? Plain training and ssdtrain over sizes from 16 MiB to 2 GiB, on the CPU.

    python recipes/benchmarks/resident.py /mnt/nvme

For each size a GPT trains a few steps in processes of their own: plain, with the defaults, and with
`trim_memory="always"`. What counts is the largest resident size of each process (`ru_maxrss`), PyTorch and all code
included. "estimated" is what a run with ssdtrain says its process would need without (`without_process_nbytes`; where
nothing moves its own size). Losses are compared. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

MIB = 1 << 20
METHODS: dict[str, dict[str, Any] | None] = {"plain": None, "ssdtrain": {}, "trimmed": {"trim_memory": "always"}}
SIZES = [(4, 1), (8, 1), (8, 2), (8, 4), (8, 8), (8, 16), (8, 32), (8, 64)]
"""Layers, and sequences of a batch: about 16, 33, 66 ... MiB saved at width 256."""


def train(job: dict[str, Any]) -> dict[str, Any]:
    """One process: its largest size, and what it says of itself."""
    from contextlib import nullcontext

    import torch

    from ssdtrain.tools.demo.model import GPT, GPTConfig

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    model = GPT(GPTConfig(job["layers"], job["width"], 4, job["sequence"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    context: Any = nullcontext()
    if job["policy"] is not None:
        import ssdtrain

        context = ssdtrain.offload_activations(job["directory"], job["policy"])
    seconds, losses = [], []
    with context as offload:
        for i in range(job["steps"]):
            generator = torch.Generator().manual_seed(i)
            tokens = torch.randint(256, (job["batch"], job["sequence"]), generator=generator)
            begin = time.perf_counter()
            loss = model(tokens, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - begin)
            losses.append(loss.item().hex())
    found = {
        "resident_nbytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "step_seconds": statistics.median(seconds[len(seconds) // 3 :]),
        "losses": losses,
    }
    if offload is None:
        return found
    stats = offload.stats
    estimated = stats.without_process_nbytes or found["resident_nbytes"]
    held = {"saved_nbytes": stats.without_nbytes, "held_nbytes": stats.peak_memory_nbytes, "plan": stats.plan}
    return found | held | {"estimated_nbytes": estimated}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", json.dumps(job)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def row_of(args: argparse.Namespace, directory: str, layers: int, batch: int) -> dict[str, Any]:
    """All methods at one size."""
    size = {"layers": layers, "batch": batch, "width": args.width, "sequence": args.sequence}
    job = size | {"directory": directory, "threads": args.threads, "steps": args.steps}
    found = {name: measure(job | {"policy": policy}) for name, policy in METHODS.items()}
    losses = {tuple(method.pop("losses")) for method in found.values()}
    return size | {"is_equal": len(losses) == 1, "methods": found}


def as_text(row: dict[str, Any]) -> str:
    plain, ours, trimmed = (row["methods"][name] for name in METHODS)
    return (
        f"{ours['saved_nbytes'] / MIB:7.0f} MiB saved: process {plain['resident_nbytes'] / MIB:.0f} MiB plain,"
        f" {ours['resident_nbytes'] / MIB:.0f} with (estimated {ours['estimated_nbytes'] / MIB:.0f} without),"
        f" {trimmed['resident_nbytes'] / MIB:.0f} trimmed (estimated {trimmed['estimated_nbytes'] / MIB:.0f} without);"
        f" steps x {ours['step_seconds'] / plain['step_seconds']:.2f},"
        f" x {trimmed['step_seconds'] / plain['step_seconds']:.2f};"
        f" {'equal' if row['is_equal'] else 'NOT EQUAL'}; {ours['plan']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Resident memory of plain training and of ssdtrain, over sizes.")
    parser.add_argument("directory", nargs="?", help="a directory on the drive (default: a temporary one)")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many, from the smallest on")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(train(json.loads(args.worker))))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        for layers, batch in SIZES[: args.sizes]:
            rows.append(row_of(args, directory, layers, batch))
            print(as_text(rows[-1]), flush=True)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    options = {name: getattr(args, name) for name in ("width", "sequence", "steps", "threads")}
    print(json.dumps({"machine": machine, "arguments": options, "rows": rows}))


if __name__ == "__main__":
    main()
