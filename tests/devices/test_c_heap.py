"""What the C library keeps of freed memory: given back where that costs little time, or where it was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import nn

import ssdtrain
from ssdtrain.devices.c_heap import CHeap

MIB = 1 << 20


class Library:
    """A C library whose trims take a time and return a number of bytes that are ours to choose."""

    def __init__(self, seconds: float, nbytes: int) -> None:
        self.now, self.resident, self.num_trims = 0.0, 1 << 40, 0
        self.seconds, self.nbytes = seconds, nbytes

    def trim(self) -> None:
        self.now += self.seconds
        self.resident -= self.nbytes
        self.num_trims += 1

    def heap(self, when: Literal["auto", "always", "never"]) -> CHeap:
        return CHeap(when, self.trim, lambda: self.resident, lambda: self.now)

    def train(self, heap: CHeap, num_steps: int, step_seconds: float) -> list[int]:
        """Steps that free 16 times 64 MiB of 512 MiB that they save; how many trims each of them has."""
        counts = []
        for _ in range(num_steps):
            before = self.num_trims
            for _ in range(16):
                self.now += step_seconds / 16
                heap.note(64 * MIB, 512 * MIB)
                if heap.is_due:
                    heap.give_back()
            counts.append(self.num_trims - before)
        return counts


def test_what_costs_little_is_given_back_all_through_a_step() -> None:
    library = Library(0.001, 64 * MIB)
    assert library.train(library.heap("auto"), 3, step_seconds=16.0) == [16, 16, 16]


def test_what_costs_much_is_given_back_every_few_steps_or_never_unless_it_was_asked_for() -> None:
    library = Library(0.05, 64 * MIB)
    counts = library.train(library.heap("auto"), 12, step_seconds=1.0)
    assert 0 < counts[0] < 16 and sum(counts[4:]) in (2, 3, 4) and max(counts[4:]) == 1
    library = Library(0.5, 64 * MIB)
    assert library.train(library.heap("auto"), 24, step_seconds=1.0)[-8:] == [0] * 8
    library = Library(0.05, 64 * MIB)
    assert library.train(library.heap("always"), 2, step_seconds=1.0) == [16, 16]
    library = Library(0.001, 64 * MIB)
    assert library.train(library.heap("never"), 2, step_seconds=16.0) == [0, 0]


def test_what_returns_nothing_ends() -> None:
    library = Library(0.001, 0)
    assert library.train(library.heap("auto"), 16, step_seconds=16.0)[-4:] == [0] * 4


def test_the_process_is_smaller_where_it_was_asked_for(tmp_path: Path) -> None:
    """Small tensors that stay lie between large ones that leave: the heap keeps what these free."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(24)])

    def resident_after_forward(when: str) -> int:
        policy = {"mode": "all", "min_nbytes": MIB, "staging_nbytes": "8MiB", "trim_memory": when}
        with ssdtrain.offload_activations(tmp_path, policy) as offload:
            for _ in range(3):
                loss = model(torch.randn(16384, 64)).square().mean()
                resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 - offload.stats.held_nbytes
                loss.backward()
        return resident

    kept, given_back = resident_after_forward("never"), resident_after_forward("always")
    assert given_back < kept - 32 * MIB
