"""What tests of updates by the CPU share: the plain optimizer on copies in host memory, and optimizers to hold back."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, ClassVar

import torch
from state_tools import EAGER_STATE, WIDTH, batch, model_of, train, trainable
from torch import nn

from ssdtrain.devices.simulated import SimulatedDevice
from ssdtrain.optimizer.optimizer import OffloadedOptimizer
from ssdtrain.policy import OptimizerPolicy
from ssdtrain.store.state_store import StateStore

ON_CPU = EAGER_STATE | {"chunk_nbytes": 40_000, "update_on": "cpu"}


class OnCopies:
    """The plain optimizer on copies in host memory: what it is to be equal to."""

    def __init__(self, model: nn.Module, make: Any, dtype: torch.dtype | None = None) -> None:
        self.parameters = trainable(model)
        self.copies = [nn.Parameter(p.detach().to("cpu", dtype, copy=True)) for p in self.parameters]
        with torch.device("cpu"):
            self.optimizer: torch.optim.Optimizer = make(self.copies)
        self.param_groups = self.optimizer.param_groups

    @torch.no_grad()
    def step(self) -> None:
        for parameter, there in zip(self.parameters, self.copies, strict=True):
            there.grad = None if parameter.grad is None else parameter.grad.to("cpu", there.dtype)
        with torch.device("cpu"):
            self.optimizer.step()
        for parameter, there in zip(self.parameters, self.copies, strict=True):
            parameter.copy_(there)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def store_of(folder: Path | None, device: SimulatedDevice | None, policy: Any) -> StateStore:
    return StateStore([] if folder is None else [str(folder)], policy, device)


def on_cpu(
    optimizer: torch.optim.Optimizer, folder: Path | None, device: SimulatedDevice | None, **fields: Any
) -> OffloadedOptimizer:
    policy = OptimizerPolicy(**(ON_CPU | fields))
    return OffloadedOptimizer(optimizer, lambda: store_of(folder, device, policy), policy)


def run_on_copies(make: Any, num_steps: int = 4, kind: str = "mlp") -> tuple[list[torch.Tensor], Any, nn.Module]:
    model = model_of(kind)
    expected = OnCopies(model, make)
    return train(model, expected, num_steps), expected.optimizer, model  # type: ignore[arg-type]


def low_precision() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3))).to(torch.bfloat16)


def train_low(model: nn.Module, optimizer: Any, steps: range) -> list[torch.Tensor]:
    losses = []
    for step in steps:
        x = batch(step).to(next(model.parameters()).device, torch.bfloat16)
        loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


class Gated(torch.optim.AdamW):
    """Begins only when it is told to."""

    gate = threading.Event()
    entered = threading.Event()
    threads: ClassVar[set[int]] = set()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        Gated.gate.set()  # for the trial

    def step(self, closure: Any = None) -> Any:
        Gated.threads.add(threading.get_ident())
        Gated.entered.set()
        assert Gated.gate.wait(20), "backward waits for the update"
        return super().step(closure)
