"""Threads that are interrupted between almost any two instructions: equal results, no error, nothing left.

The interpreter normally lets a thread run for 5 ms, so that what is wrong between two neighbouring instructions of the
hooks shows once in a million steps. Here it switches as often as it can.
"""

from __future__ import annotations

import gc
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import inside
import pytest
import torch
from conftest import MakeOffload, gauges, same_bits, send
from doses import dose

import ssdtrain

NUM_THREADS = 4
NUM_ROUNDS = dose(12, 60)
HANG_SECONDS = 120
ENGINES = ["threads", "python"]

pytestmark = pytest.mark.cpu_only  # a simulated accelerator computes in one thread

Offload = ssdtrain.ActivationOffload


@pytest.fixture(autouse=True)
def switching() -> Iterator[None]:
    """Threads switch after a microsecond."""
    interval, num_threads = sys.getswitchinterval(), torch.get_num_threads()
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(num_threads)


def at_once(bodies: list[Callable[[], Any]]) -> list[Any]:
    """What each body returns; they begin together, and the first exception of any of them is raised."""
    results: list[Any] = [None] * len(bodies)
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(bodies))

    def run(i: int) -> None:
        try:
            barrier.wait(timeout=HANG_SECONDS)
            results[i] = bodies[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=HANG_SECONDS)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]
    return results


class Trainer:
    """One thread's training, drawn from a seed: the same with and without ssdtrain."""

    def __init__(self, seed: int, offload: Offload | None) -> None:
        self.draw = random.Random(seed)
        self.noise = random.Random(~seed)  # of its own: it must not change what is computed
        self.offload = offload
        self.generator = torch.Generator().manual_seed(seed)
        self.weights = [torch.nn.Parameter(self.random(24, 24) / 5) for _ in range(3)]
        self.kept: list[Any] = []  # graphs that wait for their backward, or for nothing

    def random(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self.generator)

    def context(self) -> AbstractContextManager[Any]:
        return self.offload if self.offload is not None else nullcontext()

    def train(self) -> list[torch.Tensor]:
        """All gradients of all rounds."""
        return [grad for _ in range(NUM_ROUNDS) for grad in self.round()]

    def round(self) -> list[torch.Tensor]:
        with self.context():
            loss = self.forward()
            if self.draw.random() < 0.3:
                with self.context():  # entered again while it is active
                    loss = loss + self.forward()
            self.disturb()
            if self.draw.random() < 0.5 and self.offload is not None:
                send()
        self.disturb()
        return self.backward(loss)

    def forward(self) -> torch.Tensor:
        hidden = self.random(16, 24) * 1
        for weight in self.weights:
            left, right = torch.nn.functional.linear(hidden, weight).chunk(2, -1)
            hidden = torch.cat([torch.sin(left) * right, torch.exp(-right * right)], -1)
            self.disturb()
            if self.draw.random() < 0.2:
                torch.tanh(hidden * 3).exp()  # a branch that is dropped at once
        return hidden.square().mean()

    def backward(self, loss: torch.Tensor) -> list[torch.Tensor]:
        choice = self.draw.choice(["once", "once", "twice", "double", "drop", "later", "cycle"])
        if choice == "drop":
            return []
        if choice == "later":  # the graph of an earlier round, if there is one
            self.kept.append(loss)
            loss = self.kept.pop(0)
        if choice == "cycle":  # the collector drops this graph, in whichever thread it runs
            cycle = [loss]
            cycle.append(cycle)  # type: ignore[arg-type]
        grads: list[torch.Tensor] = []
        if choice == "twice":
            grads += torch.autograd.grad(loss, self.weights, retain_graph=True)
            self.disturb()
        if choice == "double":
            first = torch.autograd.grad(loss, self.weights, create_graph=True)
            return [g.detach() for g in first] + list(
                torch.autograd.grad(sum(g.square().sum() for g in first), self.weights)
            )
        return grads + list(torch.autograd.grad(loss, self.weights, retain_graph=choice == "cycle"))

    def disturb(self) -> None:
        """What other code of a training loop may do at any moment."""
        choice = self.noise.random()
        if self.offload is None:
            return
        if choice < 0.1:
            str(self.offload.stats)
        elif choice < 0.2:
            gc.collect(self.noise.choice([0, 1, 2]))
        elif choice < 0.3:
            with self.offload:
                pass


@pytest.mark.parametrize("is_shared", [True, False], ids=["one offload", "several"])
@pytest.mark.parametrize("engine", ENGINES)
def test_threads_train_in_each_others_way(make_offload: MakeOffload, engine: str, is_shared: bool) -> None:
    """Drops, second backwards, cycles, re-entered contexts, snapshots and collections, in all threads at once."""
    expected = [Trainer(seed, None).train() for seed in range(NUM_THREADS)]
    tight = {"engine": engine, "prefetch_nbytes": "16KiB"}
    first = make_offload(**tight)
    offloads = [first] + [first if is_shared else make_offload(**tight) for _ in range(NUM_THREADS - 1)]
    trainers = [Trainer(seed, offload) for seed, offload in enumerate(offloads)]
    actual = at_once([trainer.train for trainer in trainers])
    assert same_bits(expected, actual)
    assert any(offload.stats.num_offloaded for offload in offloads)
    del trainers
    gc.collect()
    for offload in offloads:
        assert offload.stats.num_live_records == 0
        assert gauges(offload) == (0, 0, 0)
        assert inside.transport(offload) is None, "idle, and still open"


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_walk_one_graph(make_offload: MakeOffload, engine: str) -> None:
    """One pass, one order, one cursor: every thread asks for the records that another is reloading, has just been given
    or lets go of, and prefetches from where the other stands."""
    offload = make_offload(engine=engine, prefetch_nbytes="16KiB")
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 24 * 24).reshape(24, 24)) for _ in range(8)]

    def loss() -> torch.Tensor:
        hidden = torch.linspace(-1, 1, 16 * 24).reshape(16, 24) * 1
        for weight in weights:
            hidden = torch.sin(hidden @ weight).exp()
        return hidden.square().mean()

    expected = torch.autograd.grad(loss(), weights)
    for _ in range(dose(8, 60)):
        with offload:
            shared = loss()
            send()

        def walk(shared: torch.Tensor = shared) -> list[Any]:
            return [torch.autograd.grad(shared, weights, retain_graph=True) for _ in range(10)]

        for grads in at_once([walk] * NUM_THREADS):
            assert all(same_bits(grad, expected) for grad in grads)
        del shared, walk
    assert offload.stats.num_live_records == 0


def test_threads_drop_what_others_hold(make_offload: MakeOffload) -> None:
    """One thread packs, others unpack and drop: the last handle of a record dies anywhere, also in the middle of a save
    of the same storage, whose new handle must then find the record alive or make another."""
    offload = make_offload(engine="threads", prefetch_nbytes="16KiB")
    source = torch.linspace(0, 1, 3000)

    def save_and_drop(seed: int) -> None:
        draw = random.Random(seed)
        handles: list[Any] = []
        with offload:
            for _ in range(300):
                if handles and draw.random() < 0.45:
                    handles.pop(draw.randrange(len(handles)))
                elif handles and draw.random() < 0.4:
                    start, handle = draw.choice(handles)
                    assert torch.equal(inside.unpack(offload, handle), source[start:])
                else:
                    start = draw.choice([0, 7, 100])
                    handles.append((start, inside.pack(offload, source[start:])))

    at_once([lambda seed=seed: save_and_drop(seed) for seed in range(NUM_THREADS)])
    assert offload.stats.num_live_records == 0
    assert gauges(offload) == (0, 0, 0)
