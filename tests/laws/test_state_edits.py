"""`optimizer.state` of an offloaded optimizer may be edited as that of any other: what is changed stays changed."""

from __future__ import annotations

import copy
import gc
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from state_tools import EAGER_STATE, adamw, check_same, check_same_state, model_of, train, values
from torch import nn

import ssdtrain


def offloaded(optimizer: torch.optim.Optimizer, folder: Path, **policy: Any) -> Any:
    return ssdtrain.offload_optimizer(optimizer, folder, EAGER_STATE | {"chunk_nbytes": 40_000} | policy)


def prune(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    """ReLoRA: most of the moments is set to zero, in place."""
    for p in parameters:
        for key in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[p][key]
            state.mul_(state.abs() > state.abs().mean())


def neurons(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    """Plasticity resets: single rows, and the count of steps."""
    for p in parameters:
        state = optimizer.state[p]
        state["exp_avg"][::3] = 0.0
        state["step"] = torch.zeros_like(state["step"])


def data(optimizer: Any, _: list[nn.Parameter]) -> None:
    for state in optimizer.state.values():
        state["exp_avg"].data.zero_()
        state["exp_avg_sq"].data = state["exp_avg_sq"].data * 2


def assign(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        optimizer.state[p] = {key: value * 0.5 for key, value in optimizer.state[p].items()}


def replace(optimizer: Any, _: list[nn.Parameter]) -> None:
    for _, state in optimizer.state.items():
        state.update(exp_avg=torch.full_like(state["exp_avg"], 1e-3))


def delete(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    del optimizer.state[parameters[0]]
    optimizer.state.pop(parameters[1])
    optimizer.state[parameters[2]].clear()
    optimizer.state[parameters[3]] = {}
    with pytest.raises(KeyError):
        del optimizer.state[parameters[0]]


def clear(optimizer: Any, _: list[nn.Parameter]) -> None:
    optimizer.state.clear()


def renew(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    state = optimizer.state[parameters[0]]
    optimizer.state = defaultdict(dict, {parameters[0]: state})


def exchange(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    one, other = optimizer.state[parameters[0]], optimizer.state[parameters[4]]
    one["exp_avg"], other["exp_avg"] = other["exp_avg"], one["exp_avg"]


EDITS: list[Callable[..., None]] = [prune, neurons, data, assign, replace, delete, clear, renew, exchange]


@pytest.mark.parametrize("policy", [{}, {"step_in_backward": True}, {"offload_gradients": True}], ids=str)
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_edits_are_kept(edit: Callable[..., None], policy: dict[str, bool], tmp_path: Path) -> None:
    """They were made to copies and lost, without a word."""
    plain, model = model_of("mlp"), model_of("mlp")
    expected, optimizer = adamw(plain.parameters()), offloaded(adamw(model.parameters()), tmp_path, **policy)
    for first in (0, 3):
        check_same(train(model, optimizer, 3, first=first), train(plain, expected, 3, first=first))
        edit(expected, list(plain.parameters()))
        edit(optimizer, list(model.parameters()))
        check_same_state(optimizer.state_dict(), expected.state_dict())
    check_same(train(model, optimizer, 2, first=6), train(plain, expected, 2, first=6))
    check_same(values(model), values(plain))
    gc.collect()
    train(model, optimizer, 1, first=8)
    assert optimizer.stats.away_nbytes == sum(2 * p.nbytes for p in model.parameters() if p.nbytes >= 1024)
    optimizer.close()


def test_what_is_held_is_the_state(tmp_path: Path) -> None:
    """Tensors, views and dictionaries that somebody keeps over steps are the state still: read and changed."""
    plain, model = model_of("mlp"), model_of("mlp")
    expected, optimizer = adamw(plain.parameters()), offloaded(adamw(model.parameters()), tmp_path)
    check_same(train(model, optimizer, 2), train(plain, expected, 2))
    held: list[list[Any]] = []
    for each, module in ((expected, plain), (optimizer, model)):
        p, q, r = list(module.parameters())[:6:2]
        held.append([each.state[p]["exp_avg"], each.state[q]["exp_avg"][1:3], each.state[r]])
    for first in (2, 4):
        check_same(train(model, optimizer, 2, first=first), train(plain, expected, 2, first=first))
        check_same(held[1][:2], held[0][:2])
        check_same({key: held[1][2][key] for key in held[0][2]}, held[0][2])
        for average, rows, state in held:
            average.zero_()
            rows.mul_(3.0)
            state["exp_avg_sq"] = state["exp_avg_sq"] * 2
    check_same(train(model, optimizer, 2, first=6), train(plain, expected, 2, first=6))
    everything = sum(2 * p.nbytes for p in model.parameters() if p.nbytes >= 1024)
    assert optimizer.stats.away_nbytes < everything
    held.clear()
    del average, rows, state, each, module, p, q, r
    check_same(train(model, optimizer, 2, first=8), train(plain, expected, 2, first=8))
    assert optimizer.stats.away_nbytes == everything
    check_same_state(optimizer.state_dict(), expected.state_dict())


def test_looking_at_all_state_holds_a_chunk(tmp_path: Path) -> None:
    """A loop over all of it brings one after the other, and sends those before away again."""
    model = model_of("mlp")
    inner = adamw(model.parameters())
    optimizer = offloaded(inner, tmp_path)
    train(model, optimizer, 1)
    largest, peak = max(2 * p.nbytes for p in model.parameters()), 0
    for state in optimizer.state.values():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape
        here = [v.nbytes for s in inner.state.values() for v in s.values() if torch.is_tensor(v)]
        peak = max(peak, sum(here))
        del here
    small = sum(2 * p.nbytes for p in model.parameters() if p.nbytes < 1024) + 4 * len(inner.state)
    assert peak <= 40_000 + 2 * largest + small  # what may stay, what comes, what the loop still holds


def test_it_is_a_mapping(tmp_path: Path) -> None:
    """As a dictionary of dictionaries for those who look, count, copy and save."""
    model = model_of("mlp")
    optimizer = offloaded(adamw(model.parameters()), tmp_path)
    assert not optimizer.state and nn.Parameter(torch.zeros(1)) not in optimizer.state
    assert optimizer.state[next(model.parameters())] == {}
    train(model, optimizer, 1)
    assert len(optimizer.state) == len(list(model.parameters())) and next(model.parameters()) in optimizer.state
    copied = copy.deepcopy(optimizer.state)
    assert isinstance(copied, defaultdict)
    for state, own in zip(copied.values(), optimizer.state.values(), strict=True):
        check_same({key: state[key] for key in own}, dict(own))
    assert optimizer.state.get(nn.Parameter(torch.zeros(1))) is None
