"""Parameters and optimizer state off memory: plain, ssdtrain and DeepSpeed ZeRO-3 on NVMe, their steps taken in turn.

    python recipes/benchmarks/state_compare.py /mnt/nvme
    OMP_NUM_THREADS=1 python recipes/benchmarks/state_compare.py /mnt/nvme --batch 16 --methods plain ssdtrain

All train the same GPT with AdamW in float32, from the same values on the same tokens, each in a process of its own
that waits while another one steps. DeepSpeed keeps optimizer state and master weights on the drive
(`offload_optimizer` with `pipeline_read` and `pipeline_write`); it builds its `async_io` at first use (minutes; needs
libaio's headers). Memory is the peak that is resident. The last line is JSON.
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
from ssdtrain.tools.demo.model import GPT, GPTConfig

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
                    "buffer_count": args.buffers,
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


class Plain:
    """All in memory."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._model = model_of(args)
        self._optimizer: torch.optim.Optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4, fused=True)

    def step(self, tokens: torch.Tensor) -> float:
        """One step's loss."""
        loss = self._model(tokens, tokens)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.item())


class State(Plain):
    """Optimizer state on the drive, updated after backward."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self._optimizer = ssdtrain.offload_optimizer(self._optimizer, args.directory)


class Everything(Plain):
    """Parameters and optimizer state on the drive, updated in backward."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        parameters = ssdtrain.parameter_offload(ssdtrain.offload_parameters(self._model, args.directory))
        self._optimizer = ssdtrain.offload_optimizer(self._optimizer, parameters, {"step_in_backward": True})


METHODS = {"plain": Plain, "ssdtrain": Everything, "ssdtrain, optimizer only": State, "deepspeed": DeepSpeed}


def work(args: argparse.Namespace) -> None:
    """Steps when told to, over standard input and output."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    trainer = METHODS[args.worker](args)
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
    parser.add_argument("--sub-group", type=int, default=8_000_000, help="DeepSpeed's: parameters updated at once")
    parser.add_argument("--buffers", type=int, default=12, help="DeepSpeed's buffer_count; with few its pipeline fails")
    parser.add_argument(
        "--cpu-adam", action="store_true", help="DeepSpeed's own CPU Adam, which it builds at first use"
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--worker", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    workers = [Worker(name, sys.argv[1:]) for name in args.methods]
    try:
        for worker in workers:
            worker.receive()
        for number in range(args.rounds + 1):
            for worker in workers if number % 2 else workers[::-1]:
                worker.step(number)
    finally:
        for worker in workers:
            worker.end()
    rows = []
    for worker in workers:
        seconds = [step["seconds"] for step in worker.steps[1:]]
        against = [a / b["seconds"] for a, b in zip(seconds, workers[0].steps[1:], strict=True)]
        row = {"method": worker.name, "step_seconds": statistics.median(seconds), "ratio": statistics.median(against)}
        row |= {"peak_nbytes": worker.steps[-1]["peak_nbytes"], "losses": [step["loss"] for step in worker.steps]}
        row["is_equal"] = row["losses"] == [step["loss"] for step in workers[0].steps]
        rows.append(row)
        equal = "equal to the bit" if row["is_equal"] else "not equal"
        memory = f"{row['peak_nbytes'] / MIB:7.0f} MiB"
        print(f"{worker.name:26s}{memory}  {row['step_seconds']:6.2f} s a step, x {row['ratio']:.3f}  {equal}")
    size = {name: value for name, value in vars(args).items() if name not in ("worker", "directory")}
    machine = {"cores": os.cpu_count(), "system": platform.platform(), "device": "cpu"}
    versions = {"torch": torch.__version__, "ssdtrain": ssdtrain.__version__, "deepspeed": version("deepspeed")}
    print(json.dumps({"machine": machine, "versions": versions, "size": size, "rows": rows}))


if __name__ == "__main__":
    main()
