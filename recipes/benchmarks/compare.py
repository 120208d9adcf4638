"""ssdtrain beside what else a user could pick, in 10 minutes on two cores: peak memory, step time, equal to the bit?

    python recipes/benchmarks/compare.py /mnt/nvme
    python recipes/benchmarks/compare.py /mnt/nvme --models gpt --layers 14 --width 384 --batch 8 --threads 1

Every method trains the same model on the same batches in a process of its own, and the processes take their steps in
turn, so that what else the machine does hits all of them. Memory is the peak above the level before the first step
(resident size; with a GPU, what PyTorch allocated there); time is the median over steps of the ratio to the plain step
of the same round. The first steps, in which ssdtrain learns, do not count. What cannot run here says why. Every step
of `--steps` adds a minute; `--models` and `--methods` choose.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from compare_methods import METHODS, PLAIN
from compare_models import MODELS

import ssdtrain

HERE = Path(__file__).parent
MIB = 1 << 20
SETTLING_STEPS = 3
_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Worker:
    """The process of one method.

    `name` is what its row is called, where one method runs with several policies; `command` comes before its own.
    """

    def __init__(self, method: str, job: dict[str, Any], name: str | None = None, command: Sequence[str] = ()) -> None:
        self.name = name or method
        self.seconds: list[float] = []
        self._process = subprocess.Popen(
            [*command, sys.executable, str(HERE / "compare_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | _MALLOC,
        )
        self._send(json.dumps(job | {"method": method}))
        self.unavailable: str | None = None
        self.remark: str | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def get_ready(self) -> None:
        """Waits until it is, or says why it never will."""
        answer = self._receive()
        self.unavailable, self.remark = answer.get("unavailable"), answer.get("remark")

    def step(self) -> None:
        """Has it take one."""
        self.seconds.append(self._ask("step")["seconds"])

    def settle(self) -> None:
        """Its peaks count from now on."""
        self._ask("settle")

    def finish(self) -> dict[str, Any]:
        """Its peaks, and what it learned."""
        return self._ask("finish")

    def _ask(self, line: str) -> dict[str, Any]:
        self._send(line)
        return self._receive()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"Expected an answer of {self.name!r}, got none; its error is above")
        found: dict[str, Any] = json.loads(answer)
        return found


def job_of(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """What every worker of one model is told."""
    size = {name: getattr(args, name) for name in ("layers", "width", "heads", "sequence", "batch")}
    policy = {"staging_nbytes": args.staging, "prefetch_nbytes": args.staging, "min_nbytes": args.min_nbytes}
    policy["decline_below_nbytes"] = 0
    return {"model": model, "size": size, "directory": args.directory, "threads": args.threads, "policy": policy}


def compare(model: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per method."""
    job = job_of(model, args)
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(method, job)) for method in args.methods]
        return measure(model, workers, args.steps)


def measure(title: str, workers: list[Worker], steps: int, *, is_settled: bool = False) -> list[dict[str, Any]]:
    """Has all take their steps in turn; one row each. `is_settled`: peaks of the first steps do not count either."""
    for worker in workers:
        worker.get_ready()
    able = [worker for worker in workers if worker.unavailable is None]
    for number in range(steps + SETTLING_STEPS):
        print(f"{title}: step {number + 1} of {steps + SETTLING_STEPS}", file=sys.stderr)
        for worker in able if number % 2 else able[::-1]:
            worker.step()
            if is_settled and number == SETTLING_STEPS - 1:
                worker.settle()
    results = {worker.name: worker.finish() for worker in able}
    return [row(worker, results, workers) for worker in workers]


def row(worker: Worker, results: dict[str, Any], workers: list[Worker]) -> dict[str, Any]:
    """A method against plain."""
    if worker.unavailable is not None:
        return {"method": worker.name, "unavailable": worker.unavailable}
    plain = next(other for other in workers if other.name == PLAIN)
    mine, base = results[worker.name], results[PLAIN]
    pairs = list(zip(worker.seconds, plain.seconds, strict=True))[SETTLING_STEPS:]
    found = {
        "method": worker.name,
        "peak_nbytes": mine["peak_nbytes"],
        "peak_ratio": mine["peak_nbytes"] / base["peak_nbytes"],
        "peak_saved_nbytes": mine["peak_saved_nbytes"],
        "step_seconds": statistics.median(seconds for seconds, _ in pairs),
        "step_ratio": statistics.median(seconds / plain_seconds for seconds, plain_seconds in pairs),
        "is_equal": mine["learned"] == base["learned"],
        "written_nbytes": mine["written_nbytes"],
    }
    return found if worker.remark is None else found | {"remark": worker.remark}


def as_text(model: str, rows: list[dict[str, Any]]) -> str:
    """A table for people."""
    lines = [f"{model:<30}{'peak MiB':>10}{'':>8}{'saved MiB':>11}{'step s':>9}{'':>9}  equal"]
    for entry in rows:
        if "unavailable" in entry:
            lines.append(f"{entry['method']:<30}n/a: {entry['unavailable']}")
            continue
        saved = "" if entry["peak_saved_nbytes"] is None else f"{entry['peak_saved_nbytes'] / MIB:.0f}"
        lines.append(
            f"{entry['method']:<30}{entry['peak_nbytes'] / MIB:>10.0f}{entry['peak_ratio'] - 1:>+8.0%}{saved:>11}"
            f"{entry['step_seconds']:>9.3f}{entry['step_ratio']:>8.3f}x  {'yes' if entry['is_equal'] else 'NO'}"
            + (f"  ({entry['remark']})" if "remark" in entry else "")
        )
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that decide what is trained and how often."""
    parser.add_argument("directory", help="folder on the drive")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help=f"that count, after {SETTLING_STEPS} that do not")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--staging", default="32MiB")
    parser.add_argument("--min-nbytes", default="256KiB")


def circumstances(args: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions and size of a result."""
    size = {name: getattr(args, name) for name in ("layers", "width", "heads", "sequence", "batch", "threads")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    machine = {"cores": os.cpu_count(), "system": platform.platform(), "device": device}
    versions = {"torch": torch.__version__, "ssdtrain": ssdtrain.__version__}
    return {"machine": machine, "versions": versions, "size": size}


def main() -> None:
    parser = argparse.ArgumentParser(description="ssdtrain beside its alternatives.")
    add_options(parser)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    args = parser.parse_args()
    if PLAIN not in args.methods:
        parser.error(f"--methods needs {PLAIN!r}, which the others are compared with")
    tables = {}
    for model in args.models:
        tables[model] = compare(model, args)
        print(as_text(model, tables[model]) + "\n")
    print(json.dumps(circumstances(args) | {"models": tables}))


if __name__ == "__main__":
    main()
