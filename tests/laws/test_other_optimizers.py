"""Optimizers of others page equal to the bit, or are refused before anything changes, with the reason.

A trial on throw-away tensors decides; it leaves no trace.
"""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from other_optimizers import (
    SAM,
    SOAP,
    Adam8bit,
    DAdaptSGD,
    FusedAdam,
    Global,
    Lion,
    Prodigy,
    ScheduleFree,
    TensorCounting,
)
from state_tools import EAGER_STATE, check_same, check_same_state, model_of, train, values
from torch import nn

import ssdtrain

SMALL = EAGER_STATE | {"chunk_nbytes": 40_000, "min_nbytes": 128}
APART: dict[str, Any] = {
    "FusedAdam": FusedAdam,
    "counts everywhere": TensorCounting,
    "schedule-free": ScheduleFree,
    "Lion": Lion,
    "SOAP": SOAP,
    "8-bit": Adam8bit,
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "Muon": lambda p: torch.optim.Muon([w for w in p if w.dim() == 2], lr=1e-2),
}
TOGETHER: dict[str, Any] = {"Prodigy": Prodigy, "D-Adaptation": DAdaptSGD, "global norm": Global}


def offloaded(optimizer: torch.optim.Optimizer, folder: Path, **policy: Any) -> Any:
    return ssdtrain.offload_optimizer(optimizer, folder, SMALL | policy)


def begin(optimizer: Any) -> Any:
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def check_training(make: Any, folder: Path, **policy: Any) -> None:
    """Losses, parameters, groups and state, after a step without gradients, too, and after a checkpoint."""
    plain, model = model_of("mlp"), model_of("mlp")
    expected = begin(make(plain.parameters()))
    optimizer = begin(offloaded(make(model.parameters()), folder, **policy))
    for first in (0, 4):
        check_same(train(model, optimizer, 4, first=first), train(plain, expected, 4, first=first))
        optimizer.step()
        expected.step()
    check_same(values(model), values(plain))
    check_same_state(optimizer.state_dict(), expected.state_dict())
    assert optimizer.stats.read_nbytes > 0 and not optimizer.stats.fallbacks
    resumed, again = offloaded(make(model.parameters()), folder, **policy), make(plain.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    again.load_state_dict(expected.state_dict())
    optimizer.close()
    check_same(train(model, resumed, 3, first=8), train(plain, again, 3, first=8))
    check_same_state(resumed.state_dict(), again.state_dict())
    resumed.close()


@pytest.mark.parametrize("name", APART)
def test_those_that_update_parameters_apart(name: str, tmp_path: Path) -> None:
    """Counters in groups and attributes count once per step, in however many chunks it is taken."""
    check_training(APART[name], tmp_path)


@pytest.mark.parametrize("name", ["FusedAdam", "counts everywhere", "schedule-free"])
def test_counters_of_a_step_in_backward(name: str, tmp_path: Path) -> None:
    plain, model = model_of("mlp"), model_of("mlp")
    expected = begin(APART[name](plain.parameters()))
    optimizer = begin(offloaded(APART[name](model.parameters()), tmp_path, step_in_backward=True))
    check_same(train(model, optimizer, 4), train(plain, expected, 4))
    check_same_state(optimizer.state_dict(), expected.state_dict())


@pytest.mark.parametrize("name", TOGETHER)
def test_those_that_need_all_parameters_together(name: str, tmp_path: Path) -> None:
    """Where everything is one chunk the step is the plain one; else they are refused, and nothing has changed."""
    model = model_of("mlp")
    before, inner = values(model), TOGETHER[name](model.parameters())
    groups = [dict(group) for group in inner.param_groups]
    with pytest.raises(ValueError, match=r"chunk_nbytes of at least .* cannot update parameters apart"):
        offloaded(inner, tmp_path)
    with pytest.raises(ValueError, match="step_in_backward=False"):
        offloaded(inner, tmp_path, chunk_nbytes=1 << 22, step_in_backward=True)
    check_same(values(model), before)
    assert inner.param_groups == groups and not inner.state and "step" not in vars(inner)
    check_training(TOGETHER[name], tmp_path, chunk_nbytes=1 << 22)


def test_one_that_wraps_another_is_refused_and_wraps_an_offloaded_one(tmp_path: Path) -> None:
    """SAM: `first_step` would find no state, and its inner optimizer would keep its own in memory, without a word."""

    def run(model: nn.Module, base: Any) -> list[torch.Tensor]:
        optimizer, losses = SAM(model.parameters(), base), []
        for step in range(4):
            for half in (optimizer.first_step, optimizer.second_step):
                loss = model(torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(step))).square().mean()
                loss.backward()
                half()
                optimizer.zero_grad()
                losses.append(loss.detach())
        return losses

    with pytest.raises(ValueError, match="SAM, which has FusedAdam do it, its 'base_optimizer': offload that one"):
        offloaded(SAM(model_of("mlp").parameters(), FusedAdam), tmp_path)
    plain, model = model_of("mlp"), model_of("mlp")
    check_same(run(model, lambda groups: offloaded(FusedAdam(groups), tmp_path)), run(plain, FusedAdam))
    check_same(values(model), values(plain))


class Closure(FusedAdam):
    """Needs a closure, and says so only when it steps."""

    def step(self, closure: Any = None) -> None:
        raise RuntimeError("step() needs a closure")


class Alias(FusedAdam):
    """Has its state in a list besides, and updates that: what comes back from the drive is not in there."""

    averages: list[torch.Tensor]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if not hasattr(self, "averages"):
            self.averages = [torch.zeros_like(p) for group in self.param_groups for p in group["params"]]
        for p, average in zip([p for g in self.param_groups for p in g["params"]], self.averages):  # noqa: B905
            if p.grad is not None:
                average.lerp_(p.grad, 0.1)
                self.state[p].setdefault("exp_avg", average)
                p.sub_(self.state[p]["exp_avg"])


@pytest.mark.parametrize("kind, why", [(Closure, "needs a closure"), (Alias, "its attribute 'averages'")])
def test_what_cannot_be_paged_is_refused(kind: Any, why: str, tmp_path: Path) -> None:
    model = model_of("mlp")
    with pytest.raises(ValueError, match=f"Expected an optimizer whose state can leave memory.*{kind.__name__}.*{why}"):
        offloaded(kind(model.parameters()), tmp_path, chunk_nbytes=1 << 22)


class Noisy(FusedAdam):
    """Draws random numbers, warns and notes what it did."""

    num_steps = 0

    def step(self, closure: Any = None) -> None:
        warnings.warn("of the trial", stacklevel=1)
        self.num_steps += 1
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                p.data.add_(torch.randn_like(p), alpha=random.random() * 1e-3)
        super().step()


def test_the_trial_leaves_no_trace(tmp_path: Path) -> None:
    """Neither random numbers nor attributes, groups, state, parameters, hooks or gradients are others after it."""
    model = model_of("mlp")
    inner = Noisy(model.parameters())
    calls: list[str] = []
    inner.register_step_post_hook(lambda *_: calls.append("post"))
    before = values(model), torch.get_rng_state(), random.getstate()
    optimizer = offloaded(inner, tmp_path)
    check_same(values(model), before[0])
    assert torch.equal(torch.get_rng_state(), before[1]) and random.getstate() == before[2]
    assert inner.num_steps == 0 and not calls and not inner.state and "step" not in inner.param_groups[0]
    assert all(p.grad is None for p in model.parameters())
    with pytest.warns(UserWarning, match="of the trial"):
        train(model, optimizer, 1)


def test_a_group_that_comes_later_is_tried_too(tmp_path: Path) -> None:
    """Of another kind than those before: refused when it is added, before a step."""

    class Picky(FusedAdam):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            if any(p.dim() > 2 for group in self.param_groups for p in group["params"]):
                raise NotImplementedError("only matrices")
            super().step()

    model = model_of("mlp")
    optimizer = offloaded(Picky(model.parameters()), tmp_path)
    train(model, optimizer, 2)
    with pytest.raises(ValueError, match="only matrices"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 3, 3))]})


def test_existing_state_is_part_of_the_trial(tmp_path: Path) -> None:
    """State made in the constructor, as Adagrad's, or by steps before; a group comes when all of it is away."""
    plain, model = model_of("mlp"), model_of("mlp")

    def run(module: Any, folder: Path | None) -> Any:
        blocks = list(module.blocks)
        optimizer: Any = torch.optim.Adagrad([p for block in blocks[:3] for p in block.parameters()])
        train(module, optimizer, 2)
        if folder is not None:
            optimizer = offloaded(optimizer, folder)
        train(module, optimizer, 2, first=2)
        optimizer.add_param_group({"params": list(blocks[3].parameters())})
        for p in blocks[3].parameters():
            optimizer.state[p] = {"step": torch.tensor(0.0), "sum": torch.zeros_like(p)}
        train(module, optimizer, 2, first=4)
        return optimizer

    expected, optimizer = run(plain, None), run(model, tmp_path)
    check_same(values(model), values(plain))
    check_same_state(optimizer.state_dict(), expected.state_dict())


class Langevin(torch.optim.SGD):
    """Adds noise to every parameter, in their order."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in [p for group in self.param_groups for p in group["params"] if p.grad is not None]:
            p.add_(torch.randn_like(p), alpha=1e-3)
        return super().step(closure)


def test_one_that_draws_random_numbers(tmp_path: Path) -> None:
    """In the step the order is that of the parameters; in backward every parameter got another one's noise."""

    def run(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        train(model, optimizer, 3)
        return values(model)

    plain, model = model_of("mlp"), model_of("mlp")
    expected = run(plain, Langevin(plain.parameters(), lr=0.1))
    check_same(run(model, offloaded(Langevin(model.parameters(), lr=0.1), tmp_path)), expected)
    with pytest.raises(
        ValueError, match="Expected step_in_backward=False with Langevin, whose step draws random numbers"
    ):
        offloaded(Langevin(model.parameters(), lr=0.1), tmp_path, step_in_backward=True)


class JointNorm(torch.optim.Optimizer):
    """Divides the updates of a group by their common norm where the group says so."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"joint": 0.0, "name": ""})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            ours = [p for p in group["params"] if p.grad is not None]
            if group["joint"] and ours:
                norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in ours if p.grad is not None]))
                torch._foreach_add_(ours, torch._foreach_div([p.grad for p in ours if p.grad is not None], -norm))
            for p in ours:
                self.state[p].setdefault("seen", torch.zeros_like(p)).add_(1)
        return None


@pytest.mark.parametrize("how", ["frozen first", "only the third group", "only the last of many names"])
def test_what_couples_parameters_is_tried_wherever_it_hides(how: str, tmp_path: Path) -> None:
    """In parameters that are thawed later, in one group of many alike, or in the last of many kinds."""
    names = 12 if how.endswith("names") else 3
    parameters = [[nn.Parameter(torch.randn(8, 8)) for _ in range(3)] for _ in range(names)]
    groups: list[dict[str, Any]] = [{"params": own} for own in parameters]
    groups[-1]["joint"] = 1.0
    for number, group in enumerate(groups):
        group["name"] = str(number) if names > 3 else ""
        for p in group["params"]:
            p.requires_grad_(how != "frozen first" or group.get("joint", 0.0) == 0.0)
    with pytest.raises(ValueError, match="JointNorm, which cannot update parameters apart"):
        offloaded(JointNorm(groups), tmp_path, chunk_nbytes=300)
