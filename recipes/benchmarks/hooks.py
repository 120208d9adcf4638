"""What one saved tensor costs in Python: pack and unpack of ssdtrain above bare hooks that do nothing.

    python recipes/benchmarks/hooks.py /mnt/nvme
    python recipes/benchmarks/hooks.py /mnt/nvme --repeats 1000

A graph of nodes that only save is built and walked under each kind of hooks in turn, round by round, so that a machine
that slows down slows all of them. A row is the median over the rounds of (this kind minus bare hooks in the same
round), per saved tensor, and the quarters of the rounds below and above. "moving" is the time spent waiting for the
drive; it is not part of the overhead and stands beside it. "CPU" is the processor time of the training thread alone:
on a busy machine the wall clock counts other programs too. Writes end outside the clock.

"calls" are Python functions of the package that one saved tensor enters in forward and in backward, and "locks" how
often it takes the lock of the bookkeeping; both are counted in rounds of their own, outside every clock.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import ssdtrain

NUM_NODES = 32
SAVED_PER_NODE = 8
NUM_SAVED = NUM_NODES * SAVED_PER_NODE
NUM_COUNTED = 3  # rounds in which calls are counted
PACKAGE = str(Path(ssdtrain.__file__).parent)


class Save(torch.autograd.Function):
    """A node that saves what it is given, asks for it in backward, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Saves; `anchor` only ties the nodes together."""
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return anchor.view_as(anchor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Unpacks all."""
        return grad, *[None] * len(ctx.saved_tensors)


def small() -> list[torch.Tensor]:
    """Smaller than `min_nbytes`: the quickest way through."""
    return [torch.zeros(16) for _ in range(NUM_SAVED)]


def weights() -> list[torch.Tensor]:
    """Parameters of 4 MiB."""
    return [torch.nn.Parameter(torch.empty(1024, 1024)) for _ in range(SAVED_PER_NODE)] * NUM_NODES


def transposed_weights() -> list[torch.Tensor]:
    """What eager `Linear` saves of them."""
    return [weight.t() for weight in weights()]


def offloaded() -> list[torch.Tensor]:
    """Activations of one page each."""
    return [torch.zeros(1024) for _ in range(NUM_SAVED)]


def offloaded_alone() -> list[torch.Tensor]:
    """Activations of half a slab."""
    return [torch.zeros(1 << 14) for _ in range(NUM_SAVED)]


def bare() -> AbstractContextManager[Any]:
    """The least two Python hooks can do."""
    return saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)


@dataclass(frozen=True)
class Round:
    """Seconds of one forward and backward, the part spent waiting for the drive, and this thread's processor time."""

    forward: float
    backward: float
    waiting: float
    cpu: float

    @property
    def overhead(self) -> float:
        """Without waiting."""
        return self.forward + self.backward - self.waiting


@dataclass
class Case:
    """One kind of saved tensor; each kind of hooks takes its turn in every round."""

    name: str
    make: Callable[[], list[torch.Tensor]]
    target: float
    policy: dict[str, Any] = field(default_factory=dict)
    is_offloaded: bool = False


CASES = [
    Case("small tensor, passed through", small, 2.0),
    Case("weight of 4 MiB, passed through", weights, 2.0),
    Case("transposed weight, passed through", transposed_weights, 2.0),
    Case(
        "activation of 4 KiB, offloaded",
        offloaded,
        20.0,
        # Slabs of 128 KiB: 32 of the tensors fill one and leave together. All fit in flight: packing never waits.
        {"min_nbytes": 0, "mode": "all", "staging_nbytes": "2MiB"},
        is_offloaded=True,
    ),
    Case(
        "activation of 64 KiB, offloaded alone",
        offloaded_alone,
        50.0,
        # Half a slab each, so that every one is a request. Packing waits while 2 MiB are in flight.
        {"min_nbytes": 0, "mode": "all", "staging_nbytes": "2MiB"},
        is_offloaded=True,
    ),
]


@dataclass(frozen=True)
class Row:
    """Microseconds per saved tensor above bare hooks: median, and the quarters; `moving` is waiting for the drive."""

    case: str
    hooks: str
    median_us: float
    low_us: float
    high_us: float
    forward_us: float
    backward_us: float
    cpu_us: float
    moving_us: float
    target_us: float | None
    offloaded: float
    pack_calls: float | None = None
    unpack_calls: float | None = None
    pack_locks: float | None = None
    unpack_locks: float | None = None


@dataclass
class Calls:
    """Python functions of the package that were entered, and how often its lock was taken."""

    num: int = 0
    num_locks: int = 0

    def __call__(self, frame: Any, event: str, argument: object) -> None:
        """Told by the interpreter of every call."""
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            self.num += 1
            self.num_locks += code.co_name == "__enter__" and code.co_filename.endswith("poisonable_lock.py")


def count(make: Callable[[], list[torch.Tensor]], hooks: AbstractContextManager[Any]) -> tuple[Calls, Calls]:
    """Calls of one forward and of its backward."""
    forward, backward = Calls(), Calls()
    groups = grouped(make())
    anchor = torch.zeros((), requires_grad=True)
    with hooks:
        sys.setprofile(forward)
        for group in groups:
            anchor = Save.apply(anchor, *group)
            del group
        sys.setprofile(None)
    groups.clear()
    sys.setprofile(backward)
    anchor.backward()
    del anchor
    sys.setprofile(None)
    return forward, backward


def grouped(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """What every node saves."""
    return [tensors[i : i + SAVED_PER_NODE] for i in range(0, NUM_SAVED, SAVED_PER_NODE)]


def run(
    make: Callable[[], list[torch.Tensor]], hooks: AbstractContextManager[Any], after_forward: Callable[[], float]
) -> Round:
    """One forward and one backward; `after_forward` runs between them and `waiting` is how its result grew."""
    groups = grouped(make())
    anchor = torch.zeros((), requires_grad=True)
    begin, cpu_begin = time.perf_counter(), time.thread_time()
    with hooks:
        for group in groups:
            anchor = Save.apply(anchor, *group)
            del group
    forward, cpu = time.perf_counter() - begin, time.thread_time() - cpu_begin
    groups.clear()
    waited = after_forward()
    begin, cpu_begin = time.perf_counter(), time.thread_time()
    anchor.backward()
    del anchor
    backward, cpu = time.perf_counter() - begin, cpu + time.thread_time() - cpu_begin
    return Round(forward, backward, after_forward() - waited, cpu)


def settle(offload: ssdtrain.ActivationOffload) -> float:
    """Waits until the drive has written what was handed to it; the seconds waited for the drive so far."""
    before = -1
    while (stats := offload.stats).written_nbytes != before:
        before = stats.written_nbytes
        time.sleep(0.005)
    return sum(stats.stalls.values())


def measure(case: Case, directory: str, repeats: int) -> list[Row]:
    """Rows of one case: ssdtrain and `save_on_cpu`, each against bare hooks of the same rounds."""
    offload = ssdtrain.offload_activations(directory, policy=case.policy)
    kinds: dict[str, tuple[Callable[[], AbstractContextManager[Any]], Callable[[], float]]] = {
        "bare hooks": (bare, lambda: 0.0),
        "save_on_cpu": (save_on_cpu, lambda: 0.0),
        "ssdtrain": (lambda: offload, lambda: settle(offload) if case.is_offloaded else 0.0),
        "no hooks": (contextlib.nullcontext, lambda: 0.0),
    }
    rounds: dict[str, list[Round]] = {name: [] for name in kinds}
    with offload:
        keeper = torch.zeros(1 << 20, requires_grad=True).exp()  # a graph that lives keeps the engine open
    for i in range(repeats + 2):
        names = list(kinds)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            hooks, after_forward = kinds[name]
            rounds[name].append(run(case.make, hooks(), after_forward))
    stats = offload.stats
    offloaded = stats.num_offloaded / (NUM_SAVED * (repeats + 2))
    counts = [count(case.make, offload) for _ in range(NUM_COUNTED)]
    del keeper
    offload.close()
    return [
        row_of(
            case,
            name,
            rounds[name][2:],
            rounds["bare hooks"][2:],
            offloaded if name == "ssdtrain" else 0.0,
            counts if name == "ssdtrain" else [],
        )
        for name in kinds
        if name != "bare hooks"
    ]


def row_of(
    case: Case,
    name: str,
    rounds: list[Round],
    base: list[Round],
    offloaded: float,
    counts: list[tuple[Calls, Calls]],
) -> Row:
    """Medians of the differences, round by round, and the least that was counted: another thread may add to it."""

    def per_tensor(seconds: list[float]) -> list[float]:
        return statistics.quantiles([s / NUM_SAVED * 1e6 for s in seconds], n=4) if len(seconds) > 1 else seconds * 3

    pairs = list(zip(rounds, base, strict=True))
    low, median, high = per_tensor([ours.overhead - theirs.overhead for ours, theirs in pairs])
    return Row(
        case.name,
        name,
        round(median, 3),
        round(low, 3),
        round(high, 3),
        round(per_tensor([ours.forward - theirs.forward for ours, theirs in pairs])[1], 3),
        round(per_tensor([ours.backward - ours.waiting - theirs.backward for ours, theirs in pairs])[1], 3),
        round(per_tensor([ours.cpu - theirs.cpu for ours, theirs in pairs])[1], 3),
        round(per_tensor([ours.waiting for ours, _ in pairs])[1], 3),
        case.target if name == "ssdtrain" else None,
        round(offloaded, 3),
        *least(counts),
    )


def least(counts: list[tuple[Calls, Calls]]) -> list[float]:
    """Calls and locks per saved tensor, of forward and of backward."""
    if not counts:
        return []
    ways = [[way[i] for way in counts] for i in (0, 1)]
    calls = [round(min(c.num for c in way) / NUM_SAVED, 1) for way in ways]
    return [*calls, *[round(min(c.num_locks for c in way) / NUM_SAVED, 2) for way in ways]]


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def machine() -> dict[str, object]:
    """Where the numbers were taken."""
    try:
        own = version("ssdtrain")
    except PackageNotFoundError:
        own = ssdtrain.__version__
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ssdtrain": own,
    }


def pair(forward: float | None, backward: float | None) -> str:
    """Two counts, where there are any."""
    return "" if forward is None else f"{f'{forward:g} + {backward:g}':>14}"


def main() -> None:
    """Prints the table; the last line is JSON."""
    parser = argparse.ArgumentParser(description="Cost of ssdtrain per saved tensor, above bare hooks.")
    parser.add_argument(
        "directory", nargs="?", default=None, help="a directory on the drive (default: a temporary one)"
    )
    parser.add_argument("--repeats", type=int, default=200, help="rounds")
    args = parser.parse_args()
    place = machine()
    print("\n".join(f"{name}: {value}" for name, value in place.items()))
    columns = "".join(f"{name:>8}" for name in ("pack", "unpack", "CPU", "moving", "target"))
    columns += f"{'calls':>14}{'locks':>13}"
    head = f"{'saved tensor':36}{'hooks':13}{'us':>8}{'quarters':>17}{columns}"
    print(f"\nmicroseconds per saved tensor above bare hooks\n\n{head}\n{'-' * len(head)}")
    rows: list[Row] = []
    torch.set_num_threads(1)
    gc.disable()
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        for case in CASES:
            for row in measure(case, directory, args.repeats):
                rows.append(row)
                quarters = f"{row.low_us:.2f} .. {row.high_us:.2f}"
                target = f"{row.target_us:g}" if row.target_us is not None else ""
                print(
                    f"{row.case:36}{row.hooks:13}{row.median_us:>8.2f}{quarters:>17}{row.forward_us:>8.2f}"
                    f"{row.backward_us:>8.2f}{row.cpu_us:>8.2f}{row.moving_us:>8.2f}{target:>8}"
                    f"{pair(row.pack_calls, row.unpack_calls)}{pair(row.pack_locks, row.unpack_locks)}",
                    flush=True,
                )
            gc.collect()
    print(json.dumps({"machine": place, "saved_per_round": NUM_SAVED, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
