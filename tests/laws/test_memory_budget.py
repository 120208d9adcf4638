"""Law 9: `memory_budget` bounds what a context holds in every step, the first and those unlike a plan included."""

from __future__ import annotations

from pathlib import Path

import budget_programs
import pytest
import torch
from doses import dose
from torch import nn

import ssdtrain


@pytest.mark.parametrize("first", range(0, dose(20, 500), 10))
def test_no_step_of_random_programs_is_over_its_budget(tmp_path: Path, first: int) -> None:
    num_tight = 0
    for seed in range(first, first + 10):
        outcome = budget_programs.play(seed, str(tmp_path))
        assert outcome.is_right, (seed, outcome)
        num_tight += outcome.without_nbytes > outcome.budget
    assert num_tight, "of ten programs some need the budget"


def test_what_a_budget_cannot_bound_is_said(tmp_path: Path) -> None:
    """What one operator saves is in memory while it runs, whatever the budget."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    with ssdtrain.offload_activations(tmp_path, memory_budget="128KiB", min_nbytes=0) as offload:
        model(torch.randn(1024, 64)).square().sum().backward()
    (text,) = [text for text in offload.stats.fallbacks if text.startswith("memory_budget=")]
    assert "of which nothing can leave now" in text and "raise the budget" in text


def test_staging_takes_an_eighth_of_a_budget_unless_it_is_set(tmp_path: Path) -> None:
    with ssdtrain.offload_activations(tmp_path, memory_budget="16MiB") as offload:
        assert offload.stats.staging_limit_nbytes == 2 << 20
    with ssdtrain.offload_activations(tmp_path, memory_budget="16MiB", staging_nbytes="4MiB") as offload:
        assert offload.stats.staging_limit_nbytes == 4 << 20
