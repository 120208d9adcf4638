"""Graphs beside offloading: no capture breaks, and what is replayed is what it is without ssdtrain."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import pytest
import standin_gpu
import torch
from standin_tools import TIERS, Context, are_equal, blocks, make, on_host, train

NUM = 1 << 18  # elements of 1 MiB


def sines(context: Context, x: torch.Tensor, num: int = 12) -> torch.Tensor:
    with context:
        y = x
        for _ in range(num):
            y = y.sin()
    return y


@pytest.mark.parametrize("mode", ["all", "auto"])
@pytest.mark.parametrize("tier", ["drive", "host"])
def test_a_capture_while_the_drive_still_gets_what_was_saved(make: Any, mode: str, tier: str) -> None:
    """The engine's threads ask for events. While any thread captures in global mode, PyTorch's default, CUDA takes that
    as unsafe: it breaks the capture, and refuses the answer."""
    offload = make(tier, mode=mode, staging_nbytes="256KiB", **({"engine": "threads"} if tier == "drive" else {}))
    x = torch.linspace(0, 1, NUM, device="cuda", requires_grad=True)
    sines(contextlib.nullcontext(), x).sum().backward()
    assert x.grad is not None
    expected = x.grad.cpu()
    before = standin_gpu.counts()["unsafe_calls"]
    for _ in range(6):
        x.grad = None
        y = sines(offload, x)
        static, graph = torch.zeros(16, device="cuda"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            static.add_(1)
            time.sleep(0.02)  # a capture takes a while, in which the engine goes on
            static.add_(1)
        y.sum().backward()
        graph.replay()
        assert torch.equal(x.grad.cpu(), expected)
        assert static.tolist() == [2.0] * 16
    assert standin_gpu.counts()["unsafe_calls"] == before


@pytest.mark.parametrize("tier", ["drive", "host"])
def test_a_capture_inside_the_context(make: Any, tier: str) -> None:
    """Nothing that a graph replays moves; what was saved before and is saved after does."""

    def run(context: Context) -> list[torch.Tensor]:
        x = torch.linspace(0, 1, NUM, device="cuda", requires_grad=True)
        w = torch.ones(64, device="cuda", requires_grad=True)
        graph = torch.cuda.CUDAGraph()
        (w * w).sum().backward()  # so that a gradient is there
        torch.cuda.synchronize()
        with context:
            y = x.sin().sin()
            with torch.cuda.graph(graph):
                (w * w).sin().sum().backward()
            y = y.sin().sin()
        graph.replay()
        graph.replay()
        y.sum().backward()
        return [x.grad.cpu(), w.grad.cpu()]

    expected = run(contextlib.nullcontext())
    offload = make(tier, mode="all", min_nbytes=0)
    for _ in range(3):
        assert all(map(torch.equal, run(offload), expected))
    assert offload.stats.num_offloaded > 0


def captured_training(context: Context, *, is_warm: bool) -> list[torch.Tensor]:
    """A whole step in a graph, with the context inside, replayed with other inputs; then steps without a graph."""
    model, x = blocks(), torch.zeros(256, 128, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> torch.Tensor:
        with context:
            loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss.detach()

    side, graph, losses = torch.cuda.Stream(), torch.cuda.CUDAGraph(), []
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(x).sum().backward()  # so that gradients are there
        if is_warm:
            losses.append(step())
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        loss = step()
    for number in range(3):
        x.fill_(number + 1)
        graph.replay()
        losses.append(loss.clone())
    losses += [step(), step()]
    return on_host([*losses, *(p.detach() for p in model.parameters())])


@pytest.mark.parametrize("is_warm", [True, False])
@pytest.mark.parametrize("mode, tier", TIERS)
def test_a_captured_step(make: Any, mode: str, tier: str, is_warm: bool) -> None:
    """Hooks are entered in the capture, for the first time where nothing was warmed up; they leave all of it alone."""
    expected = captured_training(contextlib.nullcontext(), is_warm=is_warm)
    offload = make(tier, mode=mode, min_nbytes=0)
    before = standin_gpu.counts()["unsafe_calls"]
    assert are_equal(captured_training(offload, is_warm=is_warm), expected)
    assert standin_gpu.counts()["unsafe_calls"] == before
    assert offload.stats.skipped["CUDA graph capture"].count > 0
    assert offload.stats.num_offloaded > 0  # what was not captured


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # PyTorch warms up on another stream
@pytest.mark.parametrize("mode, tier", TIERS)
def test_a_model_with_a_captured_part(make: Any, mode: str, tier: str) -> None:
    """Forward and backward of its middle are replayed inside a step whose ends are offloaded."""

    def run(context: Context) -> list[torch.Tensor]:
        model = blocks()
        sample = torch.zeros(256, 128, device="cuda", requires_grad=True)
        middle = torch.cuda.make_graphed_callables(model[4:8], (sample,))
        return on_host(train(torch.nn.Sequential(*model[:4], middle, *model[8:]), context))

    expected = run(contextlib.nullcontext())
    offload = make(tier, mode=mode, min_nbytes=0)
    assert are_equal(run(offload), expected)
    assert offload.stats.num_offloaded > 0


@pytest.mark.parametrize("capture_mode", ["thread_local", "relaxed"])  # a global one is broken by PyTorch's allocator
@pytest.mark.parametrize("tier", ["drive", "host"])
def test_another_thread_captures_while_we_train(make: Any, tier: str, capture_mode: str) -> None:
    """No capture breaks, no step of the training fails, and both get their numbers."""

    def run(context: Context) -> list[torch.Tensor]:
        model, is_over, replayed = blocks(), threading.Event(), []
        w = torch.ones(64, device="cuda", requires_grad=True)
        (w * w).sum().backward()
        torch.cuda.synchronize()

        def capture() -> None:
            side = torch.cuda.Stream()
            while not is_over.is_set() or not replayed:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.stream(side):  # `torch.cuda.graph` would wait for what the other thread does
                    w.grad.zero_()
                    graph.capture_begin(capture_error_mode=capture_mode)
                    (w * w).sin().sum().backward()
                    graph.capture_end()
                    graph.replay()
                    replayed.append(w.grad.clone())
                side.synchronize()  # a graph has to outlive what it queued

        thread = threading.Thread(target=capture)
        thread.start()
        try:
            results = train(model, context, steps=6)
        finally:
            is_over.set()
            thread.join()
        assert all(torch.equal(value, replayed[0]) for value in replayed)
        return on_host([replayed[0], *results])

    expected = run(contextlib.nullcontext())
    offload = make(tier, mode="all", min_nbytes=0)
    before = standin_gpu.counts()["unsafe_calls"]
    assert are_equal(run(offload), expected)
    assert standin_gpu.counts()["unsafe_calls"] == before
    assert offload.stats.num_offloaded > 0
