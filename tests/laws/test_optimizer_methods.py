"""Methods of an optimizer beside `step()` find its state, wherever that is: as without offload, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from other_optimizers import ScheduleFree, Sophia
from state_tools import EAGER_STATE, batch, check_same, check_same_state, model_of, train, values

import ssdtrain


def offloaded(optimizer: torch.optim.Optimizer, folder: Path, **policy: Any) -> Any:
    return ssdtrain.offload_optimizer(optimizer, folder, EAGER_STATE | {"chunk_nbytes": 40_000} | policy)


@pytest.mark.parametrize("has_parameters", [False, True], ids=["", "parameters"])
def test_schedule_free_between_training_and_evaluation(has_parameters: bool, tmp_path: Path) -> None:
    """`eval()` ran with empty state: parameters stayed what they are in training, results were wrong."""
    plain, model = model_of("mlp"), model_of("mlp")
    directory: Any = tmp_path
    if has_parameters:
        ssdtrain.offload_parameters(model, tmp_path, EAGER_STATE)
        directory = ssdtrain.parameter_offload(model)
    expected, optimizer = ScheduleFree(plain.parameters()), offloaded(ScheduleFree(model.parameters()), directory)
    for epoch in range(3):
        for each in (expected, optimizer):
            each.train()
        check_same(train(model, optimizer, 3, first=3 * epoch), train(plain, expected, 3, first=3 * epoch))
        for each in (expected, optimizer):
            each.eval()
        with torch.no_grad():
            check_same(model(batch(99)), plain(batch(99)))
        check_same(values(model), values(plain))
        with pytest.raises(ValueError, match="not in train mode"):
            optimizer.step()
    check_same_state(optimizer.state_dict(), expected.state_dict())
    assert not optimizer.stats.fallbacks


def run_sophia(model: Any, folder: Path | None, **policy: Any) -> tuple[Any, list[Any]]:
    optimizer: Any = Sophia(model.parameters())
    if folder is not None:
        optimizer = offloaded(optimizer, folder, **policy)
    found: list[Any] = []
    for step in range(4):
        found += train(model, optimizer, 1, first=2 * step)
        model(batch(2 * step + 1)).backward()
        optimizer.update_hessian()
        optimizer.zero_grad()
        found.append(optimizer.rescale(to=0.5))
        found.append(optimizer.get_lr())
    optimizer.blend([torch.ones_like(p) for p in model.parameters()])
    return optimizer, found


def test_methods_that_change_state(tmp_path: Path) -> None:
    """For each parameter, for a norm over all of them, and with tensors that are passed."""
    plain, model = model_of("mlp"), model_of("mlp")
    expected, losses = run_sophia(plain, None)
    optimizer, found = run_sophia(model, tmp_path)
    check_same(found, losses)
    check_same(values(model), values(plain))
    check_same_state(optimizer.state_dict(), expected.state_dict())
    assert optimizer.stats.away_nbytes > 0


def test_what_needs_no_state_moves_nothing(tmp_path: Path) -> None:
    model = model_of("mlp")
    optimizer = offloaded(Sophia(model.parameters(), lr=0.25), tmp_path)
    train(model, optimizer, 2)
    optimizer.flush()
    before = optimizer.stats.read_nbytes
    assert optimizer.get_lr() == 0.25 and optimizer.defaults["lr"] == 0.25
    assert optimizer.stats.read_nbytes == before


class Broken(Sophia):
    def fail(self, value: Any = None) -> None:
        assert len(self.state[self.param_groups[0]["params"][0]]) > 0
        raise KeyError("in a method")


def test_a_method_that_raises_loses_nothing(tmp_path: Path) -> None:
    plain, model = model_of("mlp"), model_of("mlp")
    expected, optimizer = Broken(plain.parameters()), offloaded(Broken(model.parameters()), tmp_path)
    check_same(train(model, optimizer, 2), train(plain, expected, 2))
    for args in ((), (torch.zeros(1),)):
        with pytest.raises(KeyError, match="in a method"):
            optimizer.fail(*args)
    assert optimizer.stats.away_nbytes > 0
    check_same(train(model, optimizer, 2, first=2), train(plain, expected, 2, first=2))


def test_methods_of_an_optimizer_that_is_closed(tmp_path: Path) -> None:
    optimizer = offloaded(Sophia(model_of("mlp").parameters()), tmp_path)
    optimizer.close()
    with pytest.raises(RuntimeError, match="after close"):
        optimizer.update_hessian()
