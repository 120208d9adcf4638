"""Training on a drive that is too slow: what mode "auto" makes of it, predicted and measured.

    python recipes/benchmarks/throttle.py /mnt/nvme
    python recipes/benchmarks/throttle.py /mnt/nvme --layers 14 --width 384 --batch 8 --sequence 512

A GPT trains with ssdtrain on the drive as it is, then with the drive throttled by the kernel (blkio cgroup, needs
root) to parts of what it would take to write everything during forward. The same GPT trains without ssdtrain in a
second process; the two take steps in turn, one at a time, and the ratio is the median of those of a step and of the
two plain steps around it, so that a machine whose speed changes cancels out. First both processes train without it:
what that ratio is off by, and how far its quartiles are apart, the others may be too. Then the second one copies memory
on one thread during every other step: where cores share caches, memory or a physical core, that alone slows a step
down, and so does moving bytes, whoever moves them. A row begins after `SETTLING_STEPS`. A turn is the time from one
step's beginning to the next one's, the plain step included. "allowed" is what the drive could write during forward,
which is what could lower a peak at its end; "moved" is what was written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import ssdtrain
from ssdtrain.tools.demo.model import GPT, GPTConfig

CGROUPS = Path("/sys/fs/cgroup/blkio")
SETTLING_STEPS = 10
COPIED_NBYTES = 64 << 20
"""More than processors cache."""


@dataclass
class Row:
    """One drive."""

    drive: str
    bandwidth: float | None
    """Bytes per second each way; None is not throttled."""
    ratio: float
    """Step time against plain."""
    ratio_quartiles: tuple[float, float]
    step_seconds: float
    plain_seconds: float
    peak_nbytes: float
    predicted_peak_nbytes: float
    highest_peak_nbytes: int
    turn_seconds: float
    predicted_turn_seconds: float
    moved_nbytes: float
    """Written per step."""
    allowed_nbytes: float | None
    """What the bandwidth allowed to write during forward."""
    demand_share: float
    """Of all reloads."""
    stall_seconds: float
    plan: str


class Trainer:
    """A GPT and its optimizer."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        shape = GPTConfig(options.layers, options.width, 4, options.sequence)
        self.model = GPT(shape)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4)
        self.forward_seconds = 0.0
        self._tokens = torch.randint(0, 256, (options.batch, options.sequence))

    def step(self) -> float:
        """Takes one step; its seconds."""
        begin = time.perf_counter()
        loss = self.model(self._tokens, self._tokens)
        self.forward_seconds = time.perf_counter() - begin
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return time.perf_counter() - begin


class Plain:
    """The same training without ssdtrain, in a process of its own that takes a step when told to."""

    def __init__(self, options: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(options, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def step(self) -> float:
        """Takes one step; its seconds."""
        self._connection.send("step")
        seconds: float = self._connection.recv()
        return seconds

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """Inside, it copies memory on one thread and does nothing else."""
        self._connection.send("copy")
        self._connection.recv()
        try:
            yield
        finally:
            self._connection.send("stop")
            self._connection.recv()


def _serve(options: argparse.Namespace, connection: Connection) -> None:
    trainer = Trainer(options)
    source = torch.zeros(COPIED_NBYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the benchmark is over
        while True:
            if connection.recv() == "step":
                connection.send(trainer.step())
                continue
            connection.send(None)
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            while not connection.poll():
                target.copy_(source)
            torch.set_num_threads(threads)
            connection.send(connection.recv())


@contextlib.contextmanager
def throttled(directory: str, bandwidth: float | None) -> Iterator[None]:
    """Inside, this process reads and writes the drive of `directory` at most at `bandwidth` bytes per second."""
    if bandwidth is None:
        yield
        return
    group = CGROUPS / f"ssdtrain-{os.getpid()}"
    group.mkdir()
    device = os.stat(directory).st_dev
    try:
        for way in ("read", "write"):
            (group / f"blkio.throttle.{way}_bps_device").write_text(
                f"{os.major(device)}:{os.minor(device)} {int(bandwidth)}"
            )
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (CGROUPS / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def compare(plains: list[float], seconds: list[float]) -> tuple[float, tuple[float, float]]:
    """Median and quartiles of steps against the plain steps before and after each."""
    ratios = [2 * step / (a + b) for step, a, b in zip(seconds, plains, plains[1:], strict=False)]
    first, _, third = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), (first, third)


def calibrate(trainer: Trainer, plain: Plain, options: argparse.Namespace) -> tuple[float, tuple[float, float]]:
    """The same comparison with no difference: both processes train without ssdtrain."""
    plains, seconds = [plain.step()], []
    for _ in range(options.steps):
        seconds.append(trainer.step())
        plains.append(plain.step())
    return compare(plains, seconds)


def beside_copies(trainer: Trainer, plain: Plain, options: argparse.Namespace) -> tuple[float, tuple[float, float]]:
    """A plain step while another core copies memory all the time, against plain steps by themselves."""
    alone, beside = [trainer.step()], []
    for _ in range(options.steps):
        with plain.copying():
            beside.append(trainer.step())
        alone.append(trainer.step())
    return compare(alone, beside)


def measure(trainer: Trainer, plain: Plain, options: argparse.Namespace, drive: str, bandwidth: float | None) -> Row:
    """One row: a plain step and one with ssdtrain, in turn."""
    with tempfile.TemporaryDirectory(dir=options.directory) as folder, throttled(folder, bandwidth):
        with ssdtrain.offload_activations(folder, json.loads(options.policy), trainer.model) as offload:
            for _ in range(SETTLING_STEPS):
                plain.step()
                trainer.step()
            before, plains, seconds, told = offload.stats, [plain.step()], [], []
            for _ in range(options.steps):
                seconds.append(trainer.step())
                plains.append(plain.step())
                told.append(offload.stats)
            after, told = offload.stats, told[1:]  # a step is told of when the next one begins
            print(offload.plan, flush=True)
        offload.close()
    reloads = (after.num_prefetched - before.num_prefetched) + (after.num_demand_reloads - before.num_demand_reloads)
    ratio, quartiles = compare(plains, seconds)
    return Row(
        drive=drive,
        bandwidth=bandwidth,
        ratio=ratio,
        ratio_quartiles=quartiles,
        step_seconds=statistics.median(seconds),
        plain_seconds=statistics.median(plains),
        peak_nbytes=statistics.median([stats.measured_peak_nbytes for stats in told]),
        predicted_peak_nbytes=statistics.median([stats.predicted_peak_nbytes for stats in told]),
        highest_peak_nbytes=max(stats.measured_peak_nbytes for stats in told),
        turn_seconds=statistics.median([stats.measured_step_seconds for stats in told]),
        predicted_turn_seconds=statistics.median([stats.predicted_step_seconds for stats in told]),
        allowed_nbytes=bandwidth and bandwidth * trainer.forward_seconds,
        moved_nbytes=(after.written_nbytes - before.written_nbytes) / options.steps,
        demand_share=(after.num_demand_reloads - before.num_demand_reloads) / max(1, reloads),
        stall_seconds=(after.stall_seconds - before.stall_seconds) / options.steps,
        plan=after.plan,
    )


def saved_nbytes(trainer: Trainer, options: argparse.Namespace) -> int:
    """Bytes that could be offloaded in one step."""
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        policy = json.loads(options.policy) | {"mode": "all"}
        with ssdtrain.offload_activations(folder, policy) as offload:
            trainer.step()
        return offload.stats.offloaded_nbytes


def text(row: Row) -> str:
    """One line for people."""
    allowed = f"{row.allowed_nbytes / 2**20:.1f}" if row.allowed_nbytes else "-"
    return (
        f"{row.drive:>15}  x {row.ratio:.3f} ({row.ratio_quartiles[0]:.3f} to {row.ratio_quartiles[1]:.3f})"
        f"  turn {row.turn_seconds:.3f} s ({row.predicted_turn_seconds:.3f} predicted)"
        f"  peak {row.peak_nbytes / 2**20:.1f} MiB ({row.predicted_peak_nbytes / 2**20:.1f} predicted)"
        f"  moved {row.moved_nbytes / 2**20:.1f} of {allowed} MiB  {row.demand_share:.1%} on demand"
        f"  stalled {row.stall_seconds:.3f} s"
    )


def main() -> None:
    """Prints a line per drive, and everything as JSON last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    for name, default in (("layers", 4), ("width", 192), ("batch", 4), ("sequence", 256), ("steps", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shares", type=float, nargs="*", default=[1.0, 0.5, 0.25, 0.1])
    parser.add_argument(
        "--policy", default='{"min_nbytes": "256KiB", "staging_nbytes": "8MiB", "decline_below_nbytes": 0}'
    )
    options = parser.parse_args()
    trainer = Trainer(options)
    nbytes = saved_nbytes(trainer, options)
    plain = Plain(options)
    for _ in range(2):
        plain.step()
        trainer.step()
    need = nbytes / trainer.forward_seconds
    print(f"{nbytes / 2**20:.1f} MiB saved in {trainer.forward_seconds:.3f} s of forward: {need / 1e6:.1f} MB/s")
    equal, (low, high) = calibrate(trainer, plain, options)
    print(f"{'plain twice':>15}  x {equal:.3f} ({low:.3f} to {high:.3f})", flush=True)
    copies, copies_quartiles = beside_copies(trainer, plain, options)
    print(f"{'beside copies':>15}  x {copies:.3f} ({copies_quartiles[0]:.3f} to {copies_quartiles[1]:.3f})", flush=True)
    rows: list[Row] = []
    drives: list[tuple[str, float | None]] = [("as it is", None)]
    drives += [(f"{share:g} of the need", share * need) for share in options.shares]
    for drive, bandwidth in drives:
        rows.append(measure(trainer, plain, options, drive, bandwidth))
        print(text(rows[-1]), flush=True)
    versions: dict[str, Any] = {"torch": torch.__version__, "ssdtrain": ssdtrain.__version__}
    machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), **versions}
    size = {name: getattr(options, name) for name in ("layers", "width", "batch", "sequence", "steps")}
    plain_twice = {"ratio": equal, "ratio_quartiles": (low, high)}
    found = {"plain_twice": plain_twice, "beside_copies": {"ratio": copies, "ratio_quartiles": copies_quartiles}}
    print(json.dumps({**machine, "size": size, "need": need, **found, "rows": list(map(asdict, rows))}))


if __name__ == "__main__":
    main()
