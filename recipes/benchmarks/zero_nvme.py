"""Beside DeepSpeed ZeRO-3 with its optimizer on NVMe: peak memory and time of the same steps, taken in turn.

    python recipes/benchmarks/zero_nvme.py /mnt/nvme
    python recipes/benchmarks/zero_nvme.py /mnt/nvme --layers 24 --rounds 10

Both train the same GPT with AdamW in float32, from the same values on the same tokens, each in a process of its own;
one steps while the other waits. DeepSpeed keeps optimizer state and master weights on the drive (`offload_optimizer`
with `pipeline_read` and `pipeline_write`), ssdtrain state and parameters. DeepSpeed builds its `async_io` when it is
first used (minutes; needs libaio's headers). The last line is JSON. Run it with `OMP_NUM_THREADS` at the number of
cores.
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
import time
from importlib.metadata import version
from typing import Any

import torch

import ssdtrain
from ssdtrain.demo.model import GPT, GPTConfig

METHODS = ("deepspeed", "ssdtrain")
MIB = 1 << 20


def model_of(args: argparse.Namespace) -> GPT:
    """With the same values every time."""
    torch.manual_seed(0)
    return GPT(GPTConfig(args.layers, args.width, args.width // 64, args.sequence))


class DeepSpeed:
    """ZeRO-3, its optimizer on the drive."""

    def __init__(self, args: argparse.Namespace) -> None:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("MASTER_PORT", str(20_000 + os.getpid() % 20_000))
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": args.batch,
            "zero_force_ds_cpu_optimizer": False,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": not args.cpu_adam}},
            "zero_optimization": {
                "stage": 3,
                "sub_group_size": args.sub_group,
                "offload_optimizer": {
                    "device": "nvme",
                    "nvme_path": args.directory,
                    "pin_memory": False,
                    "buffer_count": 4,
                    "pipeline_read": True,
                    "pipeline_write": True,
                },
            },
            "aio": {"block_size": 1 << 20, "queue_depth": 16, "single_submit": False, "overlap_events": True},
            "log_level": "error",
        }
        self._engine = deepspeed.initialize(model=model_of(args), config=config)[0]

    def step(self, tokens: torch.Tensor) -> float:
        """One step's loss."""
        loss = self._engine(tokens, tokens)
        self._engine.backward(loss)
        self._engine.step()
        return float(loss.item())


class Ours:
    """Parameters and optimizer state on the drive."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._model = ssdtrain.offload_parameters(model_of(args), args.directory)
        home = ssdtrain.parameter_offload(self._model)
        optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4, fused=True)
        self._optimizer = ssdtrain.offload_optimizer(optimizer, home, {"step_in_backward": not args.step_after})

    def step(self, tokens: torch.Tensor) -> float:
        """One step's loss."""
        loss = self._model(tokens, tokens)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.item())


def work(args: argparse.Namespace) -> None:
    """Steps when told to, over standard input and output."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    trainer = DeepSpeed(args) if args.worker == "deepspeed" else Ours(args)
    print(json.dumps({"ready": True}), file=answer, flush=True)
    for line in sys.stdin:
        tokens = torch.randint(0, 256, (args.batch, args.sequence), generator=torch.Generator().manual_seed(int(line)))
        begin = time.perf_counter()
        loss = trainer.step(tokens)
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_nbytes": peak}), file=answer, flush=True)


class Worker:
    """One method in a process of its own."""

    def __init__(self, name: str, argv: list[str]) -> None:
        command = [sys.executable, __file__, *argv, "--worker", name]
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.steps: list[dict[str, Any]] = []

    def receive(self) -> dict[str, Any]:
        """Its next answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} gave no answer; its error is above")
        found: dict[str, Any] = json.loads(line)
        return found

    def step(self, number: int) -> None:
        """Has it take a step."""
        assert self._process.stdin is not None
        print(number, file=self._process.stdin, flush=True)
        self.steps.append(self.receive())
        print(f"  {self.name}, step {number + 1}: {self.steps[-1]['seconds']:.2f} s", file=sys.stderr, flush=True)

    def end(self) -> None:
        """No more steps."""
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Prints the table; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", help="a directory on the drive")
    for name, default in {"layers": 12, "width": 768, "sequence": 256, "batch": 4, "rounds": 6}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sub-group", type=int, default=20_000_000, help="DeepSpeed's: parameters updated at once")
    parser.add_argument(
        "--cpu-adam", action="store_true", help="DeepSpeed's own CPU Adam, which it builds at first use"
    )
    parser.add_argument("--step-after", action="store_true", help="ssdtrain updates after backward, as DeepSpeed does")
    parser.add_argument("--worker", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    workers = [Worker(name, sys.argv[1:]) for name in METHODS]
    try:
        for worker in workers:
            worker.receive()
        for number in range(args.rounds + 1):
            for worker in workers if number % 2 else reversed(workers):
                worker.step(number)
    finally:
        for worker in workers:
            worker.end()
    rows = {}
    for worker in workers:
        seconds = statistics.median(step["seconds"] for step in worker.steps[1:])
        rows[worker.name] = {"step_seconds": seconds, "peak_nbytes": worker.steps[-1]["peak_nbytes"]}
        rows[worker.name]["losses"] = [step["loss"] for step in worker.steps]
        print(f"{worker.name:10s} {rows[worker.name]['peak_nbytes'] / MIB:7.0f} MiB  {seconds:6.2f} s a step")
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(workers[1].steps[1:], workers[0].steps[1:], strict=True)]
    print(f"ssdtrain against DeepSpeed: x {statistics.median(ratios):.2f} in time")
    size = {name: value for name, value in vars(args).items() if name not in ("worker", "directory")}
    machine = {"cores": os.cpu_count(), "system": platform.platform(), "device": "cpu"}
    versions = {"torch": torch.__version__, "ssdtrain": ssdtrain.__version__, "deepspeed": version("deepspeed")}
    print(json.dumps({"machine": machine, "versions": versions, "size": size, "rows": rows, "ratios": ratios}))


if __name__ == "__main__":
    main()
