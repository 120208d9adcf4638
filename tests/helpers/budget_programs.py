"""Random training under random memory budgets and drives: no step may hold more than the budget.

    python tests/helpers/budget_programs.py --count 500      # prints the seed of every failure
    python tests/helpers/budget_programs.py --first 1234 --count 1

Each case draws a model, a budget, and steps: like the last, of another length, with several micro-batches alive, with a
branch that backward never asks for, or interrupted in the middle. The drive takes no time, or is slow. Results are
compared with those without ssdtrain.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn

import ssdtrain

KIB, MIB = 1 << 10, 1 << 20
_LEAST = 32 * KIB  # what is smaller stays


@dataclass(frozen=True)
class Outcome:
    """What one case came to."""

    budget: int
    peak_nbytes: int
    without_nbytes: int
    are_equal: bool
    fallbacks: tuple[str, ...]

    @property
    def is_right(self) -> bool:
        return self.are_equal and self.peak_nbytes <= self.budget


class Program:
    """A drawn model and its steps."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._draw = draw = random.Random(seed)
        widths = [draw.choice([32, 64, 128, 256]) for _ in range(draw.randint(5, 14))]
        torch.manual_seed(seed)
        kinds: list[Callable[[], nn.Module]] = [nn.GELU, nn.Tanh, nn.Identity, lambda: nn.Softmax(-1)]
        layers = [nn.Sequential(nn.Linear(a, b), draw.choice(kinds)()) for a, b in itertools.pairwise(widths)]
        self.layers = nn.ModuleList(layers)
        self.width = widths[0]
        rows = draw.choice([256, 512, 1024])
        self.steps = []
        for _ in range(draw.randint(4, 9)):
            again = draw.random() < 0.6
            self.steps.append((rows if again else draw.choice([rows // 4, rows // 2, rows, 2 * rows]), draw.random()))
        self.most_rows = max(rows for rows, _ in self.steps)
        self.largest_nbytes = 4 * self.most_rows * max(widths)
        self.seconds_per_mib = draw.choice([0.0, 0.0, 0.001, 0.004])
        self.engine = "python" if self.seconds_per_mib else draw.choice(["auto", "threads", "python"])

    def forward(self, rows: int) -> torch.Tensor:
        x = torch.randn(rows, self.width)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()

    def run(self, context: Any) -> list[torch.Tensor]:
        """The gradients after each step."""
        torch.manual_seed(self.seed)
        found: list[torch.Tensor] = []
        for rows, kind in self.steps:
            self.layers.zero_grad()
            with context:
                self._step(rows, kind)
            found += [p.grad.clone() for p in self.layers.parameters() if p.grad is not None]
        return found

    def _step(self, rows: int, kind: float) -> None:
        if kind < 0.2:  # a pipeline's order
            alive = [self.forward(rows // 2) for _ in range(3)]
            for loss in alive:
                loss.backward()
        elif kind < 0.3:  # forward is given up
            self.forward(rows)
        elif kind < 0.4:
            loss = self.forward(rows)
            loss.backward(retain_graph=True)
            loss.backward()
        else:
            self.forward(rows).backward()


@contextmanager
def _slow_drive(seconds_per_mib: float) -> Iterator[None]:
    """What the engine in Python writes and reads takes so long."""
    write, read = os.pwrite, os.preadv

    def slow_write(fd: int, part: Any, at: int) -> int:
        time.sleep(seconds_per_mib * len(part) / MIB)
        return write(fd, part, at)

    def slow_read(fd: int, parts: Any, at: int) -> int:
        time.sleep(seconds_per_mib * sum(map(len, parts)) / MIB)
        return read(fd, parts, at)

    with mock.patch.object(os, "pwrite", slow_write), mock.patch.object(os, "preadv", slow_read):
        yield


def play(seed: int, directory: str) -> Outcome:
    """Runs one case without and with ssdtrain."""
    program = Program(seed)
    expected = program.run(nullcontext())
    draw = random.Random(seed + 1)
    budget = int(program.largest_nbytes * draw.choice([4, 5, 6, 8, 12]))
    policy = {"memory_budget": budget, "min_nbytes": _LEAST, "engine": program.engine}
    with _slow_drive(program.seconds_per_mib) if program.seconds_per_mib else nullcontext():
        offload = ssdtrain.offload_activations(directory, policy)
        offload.keep_open()
        actual = program.run(offload)
        stats = offload.stats
        offload.close()
    are_equal = len(expected) == len(actual) and all(map(torch.equal, expected, actual))
    return Outcome(budget, stats.peak_memory_nbytes, stats.without_nbytes, are_equal, stats.fallbacks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    num_wrong = num_tight = 0
    with tempfile.TemporaryDirectory() as directory:
        for seed in range(options.first, options.first + options.count):
            outcome = play(seed, directory)
            num_tight += outcome.without_nbytes > outcome.budget
            if not outcome.is_right:
                num_wrong += 1
                print(f"seed {seed}: {outcome}", flush=True)
    print(f"{options.count} programs, {num_tight} of which would hold more without ssdtrain; {num_wrong} wrong")
    return bool(num_wrong)


if __name__ == "__main__":
    sys.exit(main())
