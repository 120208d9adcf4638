"""With `update_on="cpu"` what an optimizer keeps for all parameters changes once per step, in however many chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_update_tools import on_cpu, run_on_copies
from other_optimizers import FusedAdam, Prodigy, Sophia, TensorCounting
from state_tools import check_same, check_same_state, model_of, train, values

from ssdtrain.devices.simulated import SimulatedDevice

pytestmark = pytest.mark.accelerator_only


@pytest.mark.parametrize("kind", [FusedAdam, TensorCounting, Prodigy])
@pytest.mark.parametrize("how", [{}, {"offload_gradients": True}, {"step_in_backward": True}], ids=str)
def test_equal_to_the_plain_step_on_copies(
    kind: Any, how: dict[str, bool], device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    if kind is Prodigy:
        if "step_in_backward" in how:
            return
        how = how | {"chunk_nbytes": 1 << 22}
    losses, expected, plain = run_on_copies(kind)
    model = model_of("mlp")
    optimizer = on_cpu(kind(model.parameters()), tmp_path, device, **how)
    check_same(train(model, optimizer, 4), losses)
    check_same(values(model), values(plain))
    check_same_state(optimizer.state_dict(), expected.state_dict())
    optimizer.close()


@pytest.mark.parametrize("kind", [FusedAdam, TensorCounting])
def test_counters_of_a_delayed_update(
    kind: Any, device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    """They have counted when the parameters have their new values."""
    model = model_of("mlp")
    optimizer = on_cpu(kind(model.parameters()), tmp_path, device, delayed_update=True)
    for step in range(3):
        train(model, optimizer, 1, first=step)
        optimizer.flush()
        assert optimizer.param_groups[0]["step"] == step + 1
    train(model, optimizer, 3, first=3)
    optimizer.step()
    optimizer.flush()
    assert optimizer.param_groups[0]["step"] == 7
    optimizer.close()


def test_state_edits_of_state_in_host_memory(device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    """It is where the CPU looks for it: edits in place, of dictionaries and of tensors that are held, are kept."""

    def edit(optimizer: Any, parameters: Any, held: list[Any]) -> None:
        for p in list(parameters)[:4]:
            optimizer.state[p]["exp_avg"].mul_(0.5)
        for p in list(parameters)[4:6]:
            optimizer.state[p] = {key: value + 1 for key, value in optimizer.state[p].items()}
        if held:
            held[0].zero_()
        held.append(optimizer.state[list(parameters)[-2]]["exp_avg_sq"])

    losses, expected, plain = run_on_copies(FusedAdam, 2)
    model, held = model_of("mlp"), ([], [])  # type: tuple[Any, tuple[list[Any], list[Any]]]
    optimizer = on_cpu(FusedAdam(model.parameters()), tmp_path, device)
    check_same(train(model, optimizer, 2), losses)
    for step in range(2, 5):
        edit(expected, expected.param_groups[0]["params"], held[0])
        edit(optimizer, list(model.parameters()), held[1])
        check_same(list(held[1]), list(held[0]))
        train(model, optimizer, 1, first=step)
        _train_copies(plain, expected, step)
        check_same(values(model), values(plain))
    check_same_state(optimizer.state_dict(), expected.state_dict())
    optimizer.close()


@torch.no_grad()
def _step(plain: Any, expected: Any) -> None:
    copies = expected.param_groups[0]["params"]
    for parameter, there in zip(plain.parameters(), copies, strict=True):
        there.grad = parameter.grad.to("cpu")
    expected.step()
    for parameter, there in zip(plain.parameters(), copies, strict=True):
        parameter.copy_(there)


def _train_copies(plain: Any, expected: Any, step: int) -> None:
    class Both:
        def step(self) -> None:
            _step(plain, expected)

        def zero_grad(self) -> None:
            plain.zero_grad()

    train(plain, Both(), 1, first=step)  # type: ignore[arg-type]


def test_methods_that_need_state_are_refused_by_name(
    device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    """Their state is in host memory, and the parameters are not; those that need none are called."""
    model = model_of("mlp")
    optimizer: Any = on_cpu(Sophia(model.parameters(), lr=0.25), tmp_path, device)
    train(model, optimizer, 1)
    assert optimizer.get_lr() == 0.25
    model(torch.zeros(3, 16, 48)).backward()
    with pytest.raises(RuntimeError, match="Expected update_on='device' for methods beside step"):
        optimizer.update_hessian()
    optimizer.zero_grad()
    train(model, optimizer, 1, first=1)
    optimizer.close()
