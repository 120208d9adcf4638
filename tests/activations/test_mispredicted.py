"""Backward goes elsewhere than it did: what was prefetched for nothing makes room, what will be wanted stays."""

from __future__ import annotations

import pytest
import torch
from conftest import MakeOffload, gauges, send

import ssdtrain

pytestmark = pytest.mark.cpu_only

KIB = 1024
SIZE = 4096  # elements of 16 KiB
AHEAD = 4  # records that may be prefetched
HALF = 8  # operators


def chain(x: torch.Tensor) -> torch.Tensor:
    """Each operator saves its result."""
    for _ in range(HALF):
        x = (x * 1).tanh()
    return x


class Program:
    """Two branches; the first has a middle, at which backward can stop. All of them are on the drive."""

    def __init__(self, offload: ssdtrain.ActivationOffload) -> None:
        self.offload = offload
        self.x = torch.linspace(0, 1, SIZE).requires_grad_()
        with offload:
            self.middle = chain(self.x)
            self.first = chain(self.middle).sum()
            self.second = chain(self.x).sum()
            send()
        gauges(offload)

    def upper(self) -> torch.Tensor:
        """From the end of the first branch to its middle; reloads of what follows are over after it."""
        (gradient,) = torch.autograd.grad(self.first, self.middle, retain_graph=True)
        gauges(self.offload)
        return gradient

    def num_demanded(self) -> int:
        return self.offload.stats.num_demand_reloads


@pytest.fixture
def offload(make_offload: MakeOffload) -> ssdtrain.ActivationOffload:
    """Knows that backward goes through the first branch, then through the second."""
    offload = make_offload(prefetch_nbytes=AHEAD * 16 * KIB)
    program = Program(offload)
    program.middle.backward(program.upper())
    program.second.backward()
    del program
    return offload


def test_what_was_guessed_wrong_makes_room(offload: ssdtrain.ActivationOffload) -> None:
    """After the first half backward goes to the other branch: all that may be prefetched is taken by what it does not
    want. Had that stayed, every reload of the branch would be waited for."""
    program = Program(offload)
    gradient = program.upper()
    before = program.num_demanded()
    program.second.backward()
    assert program.num_demanded() - before == 1  # its first, which told
    program.middle.backward(gradient)
    x = program.x.detach().requires_grad_()
    (chain(chain(x)).sum() + chain(x).sum()).backward()
    assert torch.equal(program.x.grad, x.grad)  # type: ignore[arg-type]


def test_what_is_wanted_later_stays(offload: ssdtrain.ActivationOffload) -> None:
    """The first half is walked again: a miss, but what was prefetched comes after it, and is there when it is asked
    for."""
    program = Program(offload)
    gradient = program.upper()
    assert gauges(offload)[1] == AHEAD * 16 * KIB
    num_prefetched = offload.stats.num_prefetched
    assert torch.equal(program.upper(), gradient)
    assert gauges(offload)[1] == AHEAD * 16 * KIB
    assert offload.stats.num_prefetched == num_prefetched, "dropped, and read once more"
    before = program.num_demanded()
    program.middle.backward(gradient)
    assert program.num_demanded() == before
