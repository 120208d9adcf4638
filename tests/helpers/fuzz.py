"""Random training under random faults of the drive: nothing may be wrong, hang or leak.

    python tests/helpers/fuzz.py --faults 10000            # prints a seed with every failure
    python tests/helpers/fuzz.py --replay 1234             # one case again

Each case draws a policy and a small program (chains, views, branches, dropped graphs, second backwards, changes in
place), runs it without ssdtrain, then with it while reads, writes and reservations of the spill files fail as drawn
from the same seed. Allowed outcomes: the same numbers to the bit, the same autograd error, or an OSError in backward,
after which a step without faults must be right. Threads still decide who meets which fault: a replay draws the same
program, policy and faults, not the same interleaving.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import logging
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import inside
import torch
from fault_tools import check_holdings, holdings
from folders import HELPERS

import ssdtrain

HANG_SECONDS = 60
Outcome = list[torch.Tensor] | str


def compile_library(folder: Path) -> Path:
    """The preload library, built in `folder`."""
    library = folder / "fuzz.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, HELPERS / "fuzz.c", "-ldl"], check=True)
    return library


class Program:
    """A drawn training step, the same with and without ssdtrain."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        draw = random.Random(seed)
        self.size = draw.choice([16, 40, 64, 100])
        self.actions = [
            draw.choice(["sin", "exp", "mul", "chunk", "transpose", "linear", "slice", "branch", "drop", "alias"])
            for _ in range(draw.randint(4, 30))
        ]
        self.is_retained = draw.random() < 0.3
        self.is_mutated = draw.random() < 0.15

    def run(self, context: Any, pause: Any) -> Outcome:
        """Loss and gradients, or the error autograd raised."""
        torch.manual_seed(self.seed)
        size = self.size
        x = torch.randn(size, size, requires_grad=True)
        weight = torch.nn.Parameter(torch.randn(size, size) / size)
        with context:
            loss, hidden = self.forward(x, weight)
        pause()
        if self.is_mutated:
            with torch.no_grad():
                hidden.mul_(2)
        del hidden
        try:
            for retain in [True] * self.is_retained + [False]:
                loss.backward(retain_graph=retain)
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            return "modified"
        return [loss.detach(), x.grad, weight.grad if weight.grad is not None else x.grad]  # type: ignore[list-item]

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The drawn operators."""
        y = x * 1
        hidden = y
        total = y.sum() * 0
        for action in self.actions:
            if action == "sin":
                y = torch.sin(y)
            elif action == "exp":
                y = torch.exp(-y * y)
            elif action == "mul":
                y = y * y
            elif action == "chunk":
                a, b = y.chunk(2, -1)
                y = torch.cat([a * b, torch.tanh(a)], -1)
            elif action == "transpose":
                y = torch.sigmoid(y.t())
            elif action == "linear":
                y = torch.nn.functional.linear(y, weight)
            elif action == "slice":
                total = total + (y[1:3] ** 2).sum()
            elif action == "branch":
                total = total + torch.sin(y * 3).sum()
                hidden = y
            elif action == "drop":
                torch.exp(y * 2).sum()
            else:
                y = y.detach().requires_grad_(False) * y
        return total + y.square().mean(), hidden


def draw_policy(seed: int, engine: str) -> dict[str, Any]:
    """A policy with tight bounds."""
    draw = random.Random(seed ^ 0xABCDEF)
    return {
        "engine": engine,
        "min_nbytes": draw.choice([0, 512, 4096]),
        "mode": draw.choice(["all", "all", "auto"]),
        "staging_nbytes": draw.choice(["64KiB", "128KiB", "1MiB"]),
        "prefetch_nbytes": draw.choice([0, "16KiB", "256KiB"]),
        "disk_nbytes": draw.choice([None, "64KiB", "256KiB"]),
        "checksum": draw.random() < 0.3,
        "decline_below_nbytes": draw.choice([0, 0, "32KiB"]),
    }


class Fuzz:
    """Runs cases and judges them."""

    def __init__(self, directory: str) -> None:
        self.library = ctypes.CDLL(None)
        self.library.fuzz_num_faults.restype = ctypes.c_uint64
        self.library.fuzz_start.argtypes = [ctypes.c_uint64, ctypes.c_uint32]
        self.directory = directory
        self.outcomes: Counter[str] = Counter()

    @property
    def num_faults(self) -> int:
        """Faults played so far."""
        return int(self.library.fuzz_num_faults())

    def case(self, seed: int) -> None:
        """One program under one policy; AssertionError when something is wrong."""
        draw = random.Random(~seed)
        engine = draw.choice(["threads", "threads", "threads", "python"])
        program, policy = Program(seed), draw_policy(seed, engine)
        expected = program.run(nothing(), lambda: None)
        before = holdings()
        offload = ssdtrain.offload_activations([self.directory], policy)
        self.library.fuzz_start(seed, draw.choice([20, 100, 300, 600]))
        try:
            self.judge(program, expected, offload, is_patient=draw.random() < 0.7)
        finally:
            self.library.fuzz_start(0, 0)
        assert_equal(program.run(offload, lambda: None), expected)
        flush_failed_backward()
        gc.collect()
        stats = offload.stats
        assert stats.num_live_records == 0, stats
        assert inside.counters(offload).held_nbytes == inside.counters(offload).prefetched_nbytes == 0, stats
        offload.close()
        check_holdings(before)
        assert os.listdir(self.directory) == []

    def judge(self, program: Program, expected: Outcome, offload: ssdtrain.ActivationOffload, is_patient: bool) -> None:
        """Runs a program under faults, with its bytes on the drive before backward when `is_patient`."""

        def pause() -> None:
            transport = inside.transport(offload)
            if transport is not None and is_patient:
                transport.engine.drain()
                offload.stats  # noqa: B018  takes note of what the engine did

        try:
            got = program.run(offload, pause)
        except OSError as error:
            if not error.errno or error.filename != self.directory or "record" not in str(error):
                raise AssertionError("the error does not say where") from error
            self.outcomes["read error raised"] += 1
            return
        assert_equal(got, expected)
        self.outcomes["equal error" if isinstance(got, str) else "equal"] += 1


def flush_failed_backward() -> None:
    """PyTorch itself keeps what was ready to run of a failed backward until this thread's next one."""
    x = torch.ones(2, requires_grad=True)
    (x * x).sum().backward()


def nothing() -> Any:
    """A null context."""
    return ssdtrain.offload_activations(".", {"enabled": False})


def assert_equal(got: Outcome, expected: Outcome) -> None:
    """Equal to the bit, or the same error."""
    if isinstance(got, str) or isinstance(expected, str):
        assert got == expected, f"expected {expected}, got {got}"
        return
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.numpy().tobytes() == theirs.numpy().tobytes(), "wrong numbers"


def main() -> int:
    """Plays faults until there were enough."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=10_000, help="stop after so many faults")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case")
    parser.add_argument("--replay", type=int, help="run one case only")
    parser.add_argument("--directory", help="where to spill; default: a temporary directory")
    options = parser.parse_args()
    if "fuzz.so" not in os.environ.get("LD_PRELOAD", ""):
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"LD_PRELOAD": str(compile_library(Path(folder)))}
            return subprocess.run([sys.executable, __file__, *sys.argv[1:]], env=environment).returncode
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        return play(Fuzz(directory), options)


def play(fuzz: Fuzz, options: argparse.Namespace) -> int:
    """Cases in order of their seeds; stops at the first failure."""
    fuzz.case(10**9)  # whatever the first case loads or opens for good
    seed = options.seed if options.replay is None else options.replay
    num_cases = 0
    while fuzz.num_faults < options.faults:
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        try:
            fuzz.case(seed)
        except BaseException:
            print(f"FAILED: replay with --replay {seed}", flush=True)
            raise
        faulthandler.cancel_dump_traceback_later()
        seed, num_cases = seed + 1, num_cases + 1
        if options.replay is not None:
            break
        if num_cases % 100 == 0:
            print(f"{num_cases} cases, {fuzz.num_faults} faults, {dict(fuzz.outcomes)}", flush=True)
    print(f"{num_cases} cases, {fuzz.num_faults} faults, nothing wrong: {dict(fuzz.outcomes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
