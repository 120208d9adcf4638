"""Graphs beside offloading: no capture breaks, and what is replayed is what it is without ssdtrain."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest
import standin_gpu
import torch
from standin_tools import make

NUM = 1 << 18  # elements of 1 MiB


def sines(context: Any, x: torch.Tensor, num: int = 12) -> torch.Tensor:
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

    def run(context: Any) -> list[torch.Tensor]:
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
