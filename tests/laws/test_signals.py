"""Ctrl-C and other signals are heard wherever they come, also while autograd lets go of a graph."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import ssdtrain

MIB = 1 << 20


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def drop_as_a_signal_comes(graphs: list[torch.Tensor]) -> None:
    """No line of Python lies between the two: the first one that is there answers the signal."""
    calls: list[Any] = [partial(ctypes.pythonapi.PyErr_SetInterrupt), partial(graphs.clear)]
    list(map(partial.__call__, calls))


def train_and_drop(offload: Any, num_after: int) -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(3)])
    with offload:
        graphs = [model(torch.randn(64, 64)).sum()]
        drop_as_a_signal_comes(graphs)
        for _ in range(num_after):
            model(torch.randn(64, 64)).sum().backward()


@pytest.mark.cpu_only
@pytest.mark.parametrize("num_after", [0, 1])
@pytest.mark.parametrize("min_nbytes", [0, MIB], ids=["offloaded", "kept"])
@pytest.mark.parametrize("engine", ["threads", "python"])
def test_a_signal_while_a_graph_is_dropped_ends_the_loop(
    tmp_path: Path, ctrl_c: None, engine: str, min_nbytes: int, num_after: int
) -> None:
    """Python drops what is raised in a `__del__`: three of ten Ctrl-C did nothing, and training ran on."""
    offload = ssdtrain.offload_activations(tmp_path, mode="all", min_nbytes=min_nbytes, engine=engine)
    with pytest.raises(KeyboardInterrupt):
        train_and_drop(offload, num_after)
    assert offload.stats.num_live_records == 0
    assert offload.stats.held_nbytes == 0


@pytest.mark.cpu_only
def test_training_goes_on_after_a_signal_was_heard(tmp_path: Path, ctrl_c: None) -> None:
    """What the signal cut short is not missed."""
    offload = ssdtrain.offload_activations(tmp_path, mode="all", min_nbytes=0)
    with pytest.raises(KeyboardInterrupt):
        train_and_drop(offload, 1)
    torch.manual_seed(0)
    weight, x = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64)
    (plain,) = torch.autograd.grad((x @ weight).sigmoid().square().sum(), weight)
    with offload:
        (gradient,) = torch.autograd.grad((x @ weight).sigmoid().square().sum(), weight)
    assert torch.equal(plain, gradient)
    assert offload.stats.num_live_records == 0
