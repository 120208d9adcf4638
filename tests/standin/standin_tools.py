"""What the tests on the stand-in share: contexts of each tier, a training, and gates that hold a stream still."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import standin_gpu
import torch

import ssdtrain

POLICY = {"min_nbytes": "64KiB", "staging_nbytes": "16MiB", "decline_below_nbytes": 0}
TIERS = [(mode, tier) for mode in ("all", "auto") for tier in ("drive", "host")]
Make = Callable[..., ssdtrain.ActivationOffload]
Context = contextlib.AbstractContextManager[Any]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes contexts of a tier, closed at the end; whatever a kernel raised on the way fails the test."""
    made: list[ssdtrain.ActivationOffload] = []

    def make_context(tier: str = "drive", **fields: Any) -> ssdtrain.ActivationOffload:
        made.append(ssdtrain.offload_activations(tmp_path if tier == "drive" else None, POLICY | fields))
        return made[-1]

    yield make_context
    for offload in made:
        offload.close()
    failed, standin_gpu.errors[:] = list(standin_gpu.errors), []
    assert not failed


class Gate:
    """Holds the current stream still until it is opened, so that the device is far behind the process."""

    def __init__(self) -> None:
        self._is_open = threading.Event()
        standin_gpu.enqueue(lambda: self._is_open.wait(30))

    def open(self) -> None:
        self._is_open.set()


@pytest.fixture
def gates() -> Iterator[Callable[[], Gate]]:
    """Makes gates, which are open at the end."""
    made: list[Gate] = []

    def make_gate() -> Gate:
        made.append(Gate())
        return made[-1]

    yield make_gate
    for gate in made:
        gate.open()


def blocks(layers: int = 6, width: int = 128) -> torch.nn.Sequential:
    torch.manual_seed(0)
    parts = [part for _ in range(layers) for part in (torch.nn.Linear(width, width), torch.nn.GELU())]
    return torch.nn.Sequential(*parts).cuda()


def train(model: torch.nn.Module, context: Context, steps: int = 3) -> list[torch.Tensor]:
    """Losses and parameters; the process never waits for the device."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator("cuda").manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(256, 128, generator=generator, device="cuda")
        with context:
            loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*losses, *(p.detach() for p in model.parameters())]


def on_host(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    torch.cuda.synchronize()
    return [tensor.cpu() for tensor in tensors]


def are_equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))
