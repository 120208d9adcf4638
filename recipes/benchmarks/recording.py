"""What a record of the run costs: step times with and without one, in turn, in one process.

    python recipes/benchmarks/recording.py /mnt/nvme
    python recipes/benchmarks/recording.py /mnt/nvme --layers 12 --width 512 --rounds 40

Two copies of a GPT train the same batches in mode "all", one of them with record=...; they take turns, and the one that
goes first changes from round to round, so that a machine that slows down slows both. The figure is the median over the
rounds of (with / without - 1), beside the quarters of the rounds below and above. "thread" is the processor time that
the training thread spends in handing a step over, measured by itself, as a share of the step: what the record costs on
a machine where another core is free for its writer. The target is 0.5 % of the step. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import ssdtrain
from ssdtrain.tools.demo.model import GPT, GPTConfig


class Trainer:
    """One copy of the model and its offload."""

    def __init__(self, args: argparse.Namespace, directory: str, record: Path | None) -> None:
        """Prepares, and takes no step."""
        torch.manual_seed(0)
        self.model = GPT(GPTConfig(args.layers, args.width, args.heads, args.sequence))
        policy = {"mode": args.mode, "min_nbytes": args.min_nbytes, "decline_below_nbytes": 0}
        self.offload = ssdtrain.offload_activations(directory, policy, self.model, record=record)
        self.offload.keep_open()
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def step(self, tokens: torch.Tensor) -> tuple[float, float]:
        """Seconds and loss of one step."""
        begin = time.perf_counter()
        with self.offload:
            loss = self.model(tokens, tokens)
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        return time.perf_counter() - begin, loss.item()


def handing_over(offload: ssdtrain.ActivationOffload) -> list[float]:
    """Has the seconds of the training thread in every review of a step noted from now on."""
    watch, seconds = offload._observers, []
    tell = watch._tell

    def timed(finished: Any) -> None:
        begin = time.thread_time()
        tell(finished)
        seconds.append(time.thread_time() - begin)

    watch._tell = timed  # type: ignore[method-assign]
    return seconds


def main() -> None:
    """Prints the cost; the last line is JSON."""
    parser = argparse.ArgumentParser(description="Cost of a run record.")
    parser.add_argument("directory", nargs="?", help="a directory on the drive (default: a temporary one)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--mode", choices=("auto", "all"), default="all")
    parser.add_argument("--min-nbytes", default="256KiB")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        record = Path(directory) / "run.ssdtrain"
        trainers = {"without": Trainer(args, directory, None), "with": Trainer(args, directory, record)}
        handed = handing_over(trainers["with"].offload)
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for i in range(args.rounds + 2):
            tokens = torch.randint(256, (args.batch, args.sequence))
            losses = set()
            for name in sorted(trainers, reverse=bool(i % 2)):
                duration, loss = trainers[name].step(tokens)
                seconds[name].append(duration)
                losses.add(loss)
            assert len(losses) == 1, f"Expected equal losses, got {losses}"
        for trainer in trainers.values():
            trainer.offload.close()
        nbytes = record.stat().st_size
    pairs = zip(seconds["with"][2:], seconds["without"][2:], strict=True)
    costs = [with_record / without - 1 for with_record, without in pairs]
    step = statistics.median(seconds["without"][2:])
    low, _, high = statistics.quantiles(costs, n=4)
    result = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"torch": torch.__version__, "ssdtrain": ssdtrain.__version__},
        "arguments": vars(args),
        "step_seconds": step,
        "cost": statistics.median(costs),
        "cost_quartiles": [low, high],
        "thread_seconds": statistics.median(handed),
        "thread_share": statistics.median(handed) / step,
        "record_nbytes_per_step": nbytes / (args.rounds + 2),
    }
    print(f"a step takes {step:.3f} s; with a record {result['cost']:+.2%} (quarters {low:+.2%} to {high:+.2%})")
    print(f"handing over: {result['thread_share']:.3%} of a step; {nbytes:,} bytes in all; target: 0.5 %")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
