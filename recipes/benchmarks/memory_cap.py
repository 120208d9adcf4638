"""How much trains under a fixed amount of memory, in 7 minutes on two cores: the largest batch, and time per token.

    python recipes/benchmarks/memory_cap.py /mnt/nvme
    python recipes/benchmarks/memory_cap.py /mnt/nvme --cap 2GiB --layers 24 --width 512 --first 1

Every trial trains a GPT in a process that the kernel kills when it needs more than the cap (a memory control group,
without swap; needs root). The batch is doubled until a trial dies, then the gap is halved until it is an eighth.
Time per token is measured twice: at the largest batch of plain training, where all methods take their steps in turn,
each under the cap, and at the largest batch of each method. Losses and parameters are compared at the common batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from contextlib import ExitStack
from typing import Any

from compare import Worker, add_options, circumstances, job_of
from compare_methods import PLAIN
from memory_group import MemoryGroup, memory_group, why_not
from pydantic import TypeAdapter

from ssdtrain.policy import Nbytes

MODEL = "gpt"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    PLAIN: (PLAIN, {}),
    "checkpoint per block": ("checkpoint per block", {}),
    "ssdtrain": ("ssdtrain", {"mode": "all"}),
    "ssdtrain, recompute all": ("ssdtrain", {"mode": "all", "recompute": "all"}),
}
"""Name of each row, the method of the comparison, and its policy."""


class Trial:
    """One method at one batch in a process under the cap."""

    def __init__(self, name: str, batch: int, args: argparse.Namespace, stack: ExitStack) -> None:
        self.name, self.batch = name, batch
        self._tokens = batch * args.sequence
        method, changes = METHODS[name]
        job = job_of(MODEL, args)
        job["size"] |= {"batch": batch}
        job["policy"] |= changes
        self._group: MemoryGroup = stack.enter_context(memory_group(args.cap))
        self._worker = stack.enter_context(Worker(method, job, name, self._group.command))

    def get_ready(self) -> None:
        """Waits until the process is."""
        self._worker.get_ready()

    def step(self) -> None:
        """Takes one."""
        self._worker.step()

    def took(self, after: int) -> dict[str, Any]:
        """Seconds per token, the first `after` steps aside, memory, and what was learned."""
        seconds = statistics.median(self._worker.seconds[after:])
        found = self._worker.finish()
        return {
            "method": self.name,
            "batch": self.batch,
            "tokens": self._tokens,
            "token_seconds": seconds / self._tokens,
            "peak_nbytes": self._group.peak_nbytes,
            "learned": found["learned"],
        }

    @property
    def was_killed(self) -> bool:
        """Whether it needed more than the cap."""
        return self._group.num_kills > 0


def try_batch(name: str, batch: int, args: argparse.Namespace) -> dict[str, Any] | None:
    """What a method does at a batch; None when the cap does not let it."""
    with ExitStack() as stack:
        trial = Trial(name, batch, args, stack)
        try:
            trial.get_ready()
            for _ in range(args.steps):
                trial.step()
            found = trial.took(after=1)
        except (RuntimeError, BrokenPipeError):
            if not trial.was_killed:
                raise
            found = None
    took = "killed" if found is None else f"{found['token_seconds'] * 1e6:.0f} us a token"
    print(f"{name}: batch {batch}: {took}", file=sys.stderr, flush=True)
    return found


def largest(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The largest batch of a method, to an eighth."""
    batch, best, too_large = args.first, None, None
    while True:
        found = try_batch(name, batch, args)
        if found is None:
            too_large = batch
        else:
            best = found
        least = best["batch"] if best else 0
        if best and too_large and too_large - least <= max(1, too_large // 8):
            return best
        if too_large == 1:
            sys.exit(f"Expected a cap of {args.cap} bytes to hold a batch of 1 with {name!r}; pass a larger --cap")
        batch = (least + too_large) // 2 if too_large else 2 * least


def common(batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All methods at one batch, their steps in turn, each under its own cap."""
    with ExitStack() as stack:
        trials = [Trial(name, batch, args, stack) for name in METHODS]
        for trial in trials:
            trial.get_ready()
        for number in range(args.steps + 1):
            for trial in trials if number % 2 else trials[::-1]:
                trial.step()
        return [trial.took(after=1) for trial in trials]


def as_text(rows: list[dict[str, Any]]) -> str:
    """A table for people."""
    lines = [f"{'':<28}{'batch':>7}{'tokens':>9}{'us a token':>12}{'at plain batch':>16}  equal"]
    for row in rows:
        lines.append(
            f"{row['method']:<28}{row['batch']:>7}{row['tokens']:>9}{row['token_seconds'] * 1e6:>12.0f}"
            f"{row['common_token_seconds'] * 1e6:>16.0f}  {'yes' if row['is_equal'] else 'NO'}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    size = {"layers": 8, "width": 64, "sequence": 64, "threads": 1}  # small: the batches are large
    parser.set_defaults(**size, steps=2, staging="16MiB", min_nbytes="64KiB")
    nbytes = TypeAdapter(Nbytes).validate_python
    parser.add_argument("--cap", type=nbytes, default="512MiB", help="bytes for every process, PyTorch included")
    parser.add_argument("--first", type=int, default=64, help="batch to begin with")
    args = parser.parse_args()
    if args.first < 1 or args.steps < 2:  # the first step does not count
        parser.error(f"expected --first of at least 1 and --steps of at least 2, got {args.first} and {args.steps}")
    if reason := why_not():
        sys.exit(f"Expected to be able to cap memory; it {reason}")
    rows = [largest(name, args) for name in METHODS]
    together = common(rows[0]["batch"], args)
    for row, beside in zip(rows, together, strict=True):
        row["common_token_seconds"] = beside["token_seconds"]
        row["common_peak_nbytes"] = beside["peak_nbytes"]
        row["is_equal"] = beside["learned"] == together[0]["learned"]
        del row["learned"]
    print(as_text(rows) + "\n")
    print(json.dumps(circumstances(args) | {"model": MODEL, "cap_nbytes": args.cap, "rows": rows}))


if __name__ == "__main__":
    main()
