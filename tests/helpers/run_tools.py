"""What the tests of run records and reports share: a small training loop, and a record of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

import ssdtrain

POLICY: dict[str, Any] = {
    "mode": "all",
    "min_nbytes": "16KiB",
    "staging_nbytes": "512KiB",
    "prefetch_nbytes": "256KiB",
    "endurance_tbw": 600,
    "decline_below_nbytes": 0,
}


def network(*, num_blocks: int = 4, width: int = 64) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.GELU()) for _ in range(num_blocks)]
    return torch.nn.Sequential(*layers)


def train(offload: ssdtrain.ActivationOffload, model: torch.nn.Module, num_steps: int, width: int = 64) -> list[float]:
    """Losses of steps of plain SGD inside `offload`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    with offload:
        for step in range(num_steps):
            torch.manual_seed(step)
            loss = model(torch.randn(256, width)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def recorded_run(folder: Path, num_steps: int = 8, **policy: Any) -> tuple[Path, ssdtrain.Stats]:
    """The record of a run, and the statistics at its end."""
    folder.mkdir(exist_ok=True)
    path, model = folder / "run.ssdtrain", network()
    offload = ssdtrain.offload_activations(folder, POLICY | policy, model, record=path)
    train(offload, model, num_steps)
    stats = offload.stats
    offload.close()
    return path, stats


def browser() -> str | None:
    """A Chromium that can run without a screen."""
    names = (os.environ.get("SSDTRAIN_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if name and (found := shutil.which(name))), None)
