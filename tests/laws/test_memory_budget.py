"""Law 9: `memory_budget` bounds what a context holds in every step, the first and those unlike a plan included."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import budget_programs
import pytest
import torch
from doses import dose
from torch import nn

import ssdtrain

KIB = 1 << 10


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


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_under_a_budget_that_cannot_be_met_reloads_come_ahead_of_need(tmp_path: Path, num_steps: int) -> None:
    """Small tensors take ten times the budget: the others still leave, and backward waits for hardly any of them."""
    num = 40

    def grads(context: AbstractContextManager[object]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(num)])
        for _ in range(num_steps):
            small, large = torch.ones(128, 32), torch.ones(512, 32)
            with context:
                for layer in layers:
                    large = layer(large).tanh()
                    for _ in range(8):
                        small = layer(small).sigmoid()
            (small.sum() + large.sum()).backward()
        return [grad for p in layers.parameters() if (grad := p.grad) is not None]

    expected = grads(nullcontext())
    policy = {"memory_budget": "512KiB", "staging_nbytes": "128KiB", "min_nbytes": 32 * KIB}
    offload = ssdtrain.offload_activations(tmp_path, policy)
    assert all(map(torch.equal, grads(offload), expected))
    stats = offload.stats
    assert stats.num_offloaded > 0.8 * num * num_steps and stats.num_demand_reloads < 0.1 * stats.num_offloaded
    small_nbytes = 2 * 8 * num * 128 * 32 * 4  # each is saved by two operators
    assert small_nbytes > 8 * (512 * KIB) and stats.peak_saved_nbytes < small_nbytes + 1024 * KIB
    if offload.plan is not None:
        assert "by this estimate memory_budget=" in offload.plan.statement


def test_staging_takes_an_eighth_of_a_budget_unless_it_is_set(tmp_path: Path) -> None:
    with ssdtrain.offload_activations(tmp_path, memory_budget="16MiB") as offload:
        assert offload.stats.staging_limit_nbytes == 2 << 20
    with ssdtrain.offload_activations(tmp_path, memory_budget="16MiB", staging_nbytes="4MiB") as offload:
        assert offload.stats.staging_limit_nbytes == 4 << 20


def test_what_an_earlier_backward_used_comes_back_with_its_own_bytes(tmp_path: Path) -> None:
    """A part of a larger tensor that two losses need: after the first it is in memory of its own, and leaves again."""

    def grads(context: AbstractContextManager[object]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        first, second, third = [torch.ones(1, 64 * KIB, requires_grad=True) for _ in range(3)]
        with context:
            parts = [torch.randn(16, 64 * KIB)[12:13] for _ in range(6)]
            losses = [((first * part).sum(), (second * part).sum()) for part in parts]
            del parts
            for loss, _ in losses:
                loss.backward()
            more = [(third * torch.randn(1, 64 * KIB)).sum() for _ in range(12)]
            for _, loss in losses:
                loss.backward()
            sum(more).backward()
        return [t.grad.clone() for t in (first, second, third) if t.grad is not None]

    expected = grads(nullcontext())
    offload = ssdtrain.offload_activations(tmp_path, memory_budget="1600KiB", min_nbytes=KIB)
    assert all(map(torch.equal, grads(offload), expected))
    assert offload.stats.num_offloaded > 6 + 12, "some left a second time"


def test_what_is_freed_behind_autograds_back_does_not_leave_for_a_budget(tmp_path: Path) -> None:
    """Its owner refills it before backward; until then there are no bytes to copy."""
    weight, large = torch.ones(64 * KIB, requires_grad=True), torch.ones(28 * 64 * KIB, requires_grad=True)
    with ssdtrain.offload_activations(tmp_path, memory_budget="8MiB", min_nbytes=KIB, staging_nbytes="256KiB") as o:
        for step in range(6):
            inputs = [torch.ones(64 * KIB) for _ in range(8)]
            losses = [(weight * x).sum() for x in inputs]
            if step == 5:
                assert o.plan is not None and "everything fits" in o.plan.statement
                storage = inputs[0].untyped_storage()
                storage.resize_(0)
                losses.append((large * torch.ones(28 * 64 * KIB)).sum())
                storage.resize_(4 * 64 * KIB)
                inputs[0].data.fill_(1.0)
            sum(losses).backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.full((64 * KIB,), 48.0))


@pytest.mark.parametrize("num_small", [100, 400])
def test_small_tensors_after_the_last_record_count(tmp_path: Path, num_small: int) -> None:
    """A large encoder, then a loop of tensors too small to leave: what is large leaves while that goes on."""
    budget = 8456 * KIB

    def grads(context: AbstractContextManager[object]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])
        for _ in range(5):
            small, big, middle = torch.ones(64, 32), torch.ones(8192, 32), torch.ones(512, 32)
            with context:
                for _ in range(3):
                    big = layers[0](big).sigmoid()
                for _ in range(29):
                    middle = layers[1](middle).tanh()
                for _ in range(num_small):
                    small = layers[2](small).sigmoid()
            (small.sum() + middle.sum() + big.sum()).backward()
        return [grad for p in layers.parameters() if (grad := p.grad) is not None]

    expected = grads(nullcontext())
    offload = ssdtrain.offload_activations(
        tmp_path, memory_budget=budget, min_nbytes=32 * KIB, decline_below_nbytes=0, staging_nbytes=256 * KIB
    )
    assert all(map(torch.equal, grads(offload), expected))
    assert offload.stats.peak_memory_nbytes <= budget, str(offload.stats)
