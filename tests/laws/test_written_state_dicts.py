"""What is written to the values of a state dict is written to the state, as without offload, or is an error."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from state_tools import EAGER_STATE, adamw, check_same, check_same_state, model_of, train, values
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import ssdtrain


def check_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in actual.items()), "not equal to the bit"


@torch.no_grad()
def average(model: nn.Module) -> None:
    """How exponential moving averages of weights are often kept."""
    other = model_of("mlp").state_dict()
    for name, value in model.state_dict().items():
        value.mul_(0.9).add_(other[name], alpha=0.2)


def one_row(model: nn.Module) -> None:
    """Through a view of a value that nobody has any more."""
    row = model.state_dict()["blocks.1.up.weight"][3]
    gc.collect()
    row.fill_(0.5)


def over_each_other(model: nn.Module) -> None:
    held = model.state_dict()
    held["blocks.0.up.weight"].zero_()
    model.state_dict()["blocks.0.up.weight"].add_(1.0)


def load_changed(model: nn.Module) -> None:
    state = model.state_dict()
    for value in state.values():
        value.mul_(0.5)
    model.load_state_dict(state)


@pytest.mark.parametrize("write", [average, one_row, over_each_other, load_changed], ids=lambda write: write.__name__)
def test_writes_to_values_are_writes_to_parameters(write: Callable[[nn.Module], None], tmp_path: Path) -> None:
    """They went to copies and were lost: an average of weights never moved, without a word."""
    plain, model = model_of("mlp"), model_of("mlp")
    ssdtrain.offload_parameters(model, tmp_path, EAGER_STATE, ["blocks.*"])
    trained = [(each, torch.optim.SGD(each.parameters(), 0.1)) for each in (plain, model)]
    for each, optimizer in trained:
        train(each, optimizer, 1)
        write(each)
    check_equal(model.state_dict(), plain.state_dict())
    expected, found = (train(each, optimizer, 2, first=1) for each, optimizer in trained)
    check_same(found, expected)
    ssdtrain.parameter_offload(model).close()
    check_same(values(model), values(plain))


def first_moments(state: dict[str, Any]) -> list[torch.Tensor]:
    return [entry["exp_avg"] for _, entry in sorted(state["state"].items())]


def reset(optimizer: Any) -> None:
    for value in first_moments(optimizer.state_dict()):
        value.zero_()


def rows(optimizer: Any) -> None:
    row = first_moments(optimizer.state_dict())[0][1:3]
    gc.collect()
    row.mul_(3.0)


def load_halves(optimizer: Any) -> None:
    state = optimizer.state_dict()
    for value in first_moments(state):
        value.mul_(0.5)
    optimizer.load_state_dict(state)


@pytest.mark.parametrize("policy", [{}, {"update_on": "cpu"}, {"step_in_backward": True}], ids=str)
@pytest.mark.parametrize("write", [reset, rows, load_halves], ids=lambda write: write.__name__)
def test_writes_to_values_are_writes_to_optimizer_state(
    write: Callable[[Any], None], policy: dict[str, Any], tmp_path: Path
) -> None:
    plain, model = model_of("mlp"), model_of("mlp")
    expected, optimizer = adamw(plain.parameters()), adamw(model.parameters())
    optimizer = ssdtrain.offload_optimizer(optimizer, tmp_path, EAGER_STATE | {"chunk_nbytes": 40_000} | policy)
    for each, module in ((expected, plain), (optimizer, model)):
        train(module, each, 2)
        write(each)
    check_same_state(optimizer.state_dict(), expected.state_dict())
    check_same(train(model, optimizer, 2, first=2), train(plain, expected, 2, first=2))
    check_same(values(model), values(plain))
    optimizer.close()  # type: ignore[attr-defined]


def test_a_write_to_an_older_state_dict_is_refused(tmp_path: Path) -> None:
    """It would undo what training has done since."""
    for name in ("parameters", "optimizer"):
        (tmp_path / name).mkdir()
    model = model_of("mlp")
    ssdtrain.offload_parameters(model, tmp_path / "parameters", EAGER_STATE, ["blocks.*"])
    optimizer = ssdtrain.offload_optimizer(adamw(model.parameters()), tmp_path / "optimizer", EAGER_STATE)
    train(model, optimizer, 1)
    weights, moments = model.state_dict(), optimizer.state_dict()
    train(model, optimizer, 1)
    weights["blocks.0.up.weight"].zero_()
    with pytest.raises(RuntimeError, match=r"that of blocks.0.up.weight: it is a copy"):
        train(model, optimizer, 1)
    train(model, optimizer, 1)
    first_moments(moments)[0].zero_()
    with pytest.raises(RuntimeError, match=r"that of exp_avg of .*: it is a copy"):
        train(model, optimizer, 1)
    optimizer.close()  # type: ignore[attr-defined]


def test_values_that_are_dropped_cost_nothing(tmp_path: Path) -> None:
    """Their memory goes with them unless they were written to, and then with the next use of the state."""
    model = model_of("mlp")
    ssdtrain.offload_parameters(model, tmp_path, EAGER_STATE, ["blocks.*"])
    state = model.state_dict()
    memory = {name: StorageWeakRef(value.untyped_storage()) for name, value in state.items() if value.nbytes >= 1024}
    state["blocks.0.up.weight"].zero_()
    del state
    gc.collect()
    alive = {name for name, reference in memory.items() if not reference.expired()}
    assert alive == {"blocks.0.up.weight"}
    assert not model.state_dict()["blocks.0.up.weight"].any()
    assert memory["blocks.0.up.weight"].expired()
