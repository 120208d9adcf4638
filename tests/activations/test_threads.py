"""Threads: forward here and backward there, two at once, and the garbage collector in between."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import MakeOffload, Send, assert_same, grads_of, mlp, send

import ssdtrain

pytestmark = pytest.mark.cpu_only  # a simulated accelerator computes in one thread

Offload = ssdtrain.ActivationOffload


def in_thread(function: Callable[[], Any]) -> Any:
    """Result, or exception, of a function run in another thread."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def test_backward_in_another_thread(offload: Offload) -> None:
    def run(send: Send) -> Any:
        model, x = mlp(), torch.randn(4, 32)
        loss = model(x).square().sum()
        send()
        in_thread(loss.backward)
        return grads_of(model)

    assert_same(run, offload)


def test_hooks_belong_to_the_thread_that_entered(offload: Offload) -> None:
    """Saved-tensor hooks are the thread's: another one saves as if there were no context."""
    with offload:
        in_thread(lambda: torch.randn(8, requires_grad=True).exp().sum().backward())
    assert offload.stats.num_saved == 0


@pytest.mark.parametrize("shared", [True, False], ids=["one object", "two objects"])
def test_two_threads_train_at_once(make_offload: MakeOffload, shared: bool) -> None:
    """Locks taken in different order would hang here, records filed under the wrong thread mix gradients up."""

    def train(index: int, offload: Offload | None, barrier: threading.Barrier | None) -> list[Any]:
        with lock:  # the seed is global
            torch.manual_seed(index)
            model, xs = mlp(width=64), torch.randn(12, 32, 64)
        for x in xs:
            if barrier is not None:
                barrier.wait(timeout=60)
            if offload is None:
                loss = model(x).square().sum()
            else:
                with offload:
                    loss = model(x).square().sum()
                    send()
            loss.backward()
        return grads_of(model)

    lock = threading.Lock()
    expected = [train(i, None, None) for i in range(2)]
    first = make_offload()
    offloads = [first, first if shared else make_offload()]
    barrier = threading.Barrier(2)
    actual: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i: actual.__setitem__(i, train(i, offloads[i], barrier))) for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    for i in range(2):
        assert all(map(torch.equal, actual[i], expected[i]))
    assert all(offload.stats.read_nbytes > 0 for offload in offloads)


def test_two_threads_walk_one_graph(offload: Offload) -> None:
    """Each unpack asks for a record the other thread may be reloading, lending or has just been given."""

    def run(send: Send) -> Any:
        model, x = mlp(layers=8, width=64), torch.randn(16, 64, requires_grad=True)
        loss = model(x * 1).square().sum()
        send()
        results: list[Any] = []
        barrier = threading.Barrier(3)

        def walk() -> None:
            barrier.wait(timeout=60)
            results.extend(torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=True) for _ in range(5))

        threads = [threading.Thread(target=walk) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assert len(results) == 15
        return results

    assert_same(run, offload)


def test_graphs_in_cycles_die_in_the_middle_of_everything(offload: Offload) -> None:
    """A model that remembers its output is a cycle: the collector frees the graph while some hook holds the lock."""

    def run(send: Send) -> Any:
        model, results = mlp(), []
        for _ in range(20):
            cycle: dict[str, Any] = {"output": model(torch.randn(4, 32))}
            cycle["self"] = cycle
            loss = cycle["output"].square().sum()
            send()
            loss.backward(retain_graph=True)
            results.append([p.grad.clone() for p in model.parameters()])
        return results

    threshold = gc.get_threshold()
    gc.set_threshold(20)
    try:
        assert_same(run, offload)
    finally:
        gc.set_threshold(*threshold)
