"""What comes in between while the CPU updates: loads, interrupts, forks, second gradients, shared memory, threads."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from cpu_update_tools import Gated, OnCopies, on_cpu
from state_tools import adamw, batch, check_same, check_same_state, model_of, train
from test_delayed_update import Late
from torch import nn

from ssdtrain.devices.simulated import SimulatedDevice

pytestmark = pytest.mark.accelerator_only
LATE = {"delayed_update": True}
IN_BACKWARD = {"step_in_backward": True}


def parameter(value: float = 0.0) -> nn.Parameter:
    return nn.Parameter(torch.full((64, 64), value))


def mean(tensor: torch.Tensor) -> float:
    return round(float(tensor.detach().mean()), 4)


@contextlib.contextmanager
def ctrl_c_soon() -> Iterator[None]:
    """What is inside waits, and is interrupted."""
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


@pytest.mark.parametrize("where", ["drive", "memory"])
@pytest.mark.parametrize("how", [LATE, IN_BACKWARD], ids=["late", "in backward"])
def test_loading_drops_what_is_under_way(
    how: dict[str, Any], where: str, device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    """Nothing of its state comes back, also for parameters the loaded state has nothing of."""
    model, plain = model_of("mlp"), model_of("mlp")
    optimizer = on_cpu(adamw(model.parameters()), tmp_path if where == "drive" else None, device, **how)
    fresh = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    train(model, optimizer, 2)
    if how is IN_BACKWARD:
        model(batch(2).to(next(model.parameters()).device)).backward()
    assert inside.cpu_updates(optimizer).is_busy
    optimizer.load_state_dict(fresh[1])
    model.load_state_dict(fresh[0])
    assert optimizer.state_dict()["state"] == {}
    optimizer.zero_grad()
    reference = (Late if how is LATE else OnCopies)(plain, adamw)
    check_same(train(model, optimizer, 3), train(plain, reference, 3))  # type: ignore[arg-type]
    optimizer.close()


def test_ctrl_c_while_it_waits_loses_nothing(
    device: SimulatedDevice | None, device_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A delayed update goes on, and the next call finishes it."""
    model, plain = model_of("mlp"), model_of("mlp")
    optimizer = on_cpu(adamw(model.parameters()), tmp_path, device, chunk_nbytes=1, **LATE)
    gate, updates = threading.Event(), inside.cpu_updates(optimizer)
    make_shadow = updates._shadow_parameter
    monkeypatch.setattr(
        inside.cpu_updates(optimizer), "_shadow_parameter", lambda *what: (gate.wait(20), make_shadow(*what))[1]
    )
    train(model, optimizer, 1)
    for _ in range(2):
        with ctrl_c_soon():
            optimizer.flush()
    gate.set()
    optimizer.flush()
    expected = OnCopies(plain, adamw)
    train(plain, expected, 1)  # type: ignore[arg-type]
    check_same([p.detach() for p in model.parameters()], [p.detach() for p in plain.parameters()])
    check_same_state(optimizer.state_dict(), expected.optimizer.state_dict())
    optimizer.close()


def test_an_interrupted_abandoning_is_taken_up_again(
    device: SimulatedDevice | None, device_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on is not forgotten: it would write over what is loaded next."""
    model = model_of("mlp")
    optimizer = on_cpu(adamw(model.parameters()), tmp_path, device, chunk_nbytes=1, **LATE)
    train(model, optimizer, 2)
    optimizer.flush()
    saved = copy.deepcopy(optimizer.state_dict())
    updates = inside.cpu_updates(optimizer)
    gate, make_shadow = threading.Event(), updates._shadow_parameter
    monkeypatch.setattr(updates, "_shadow_parameter", lambda *what: (gate.wait(20), make_shadow(*what))[1])
    train(model, optimizer, 1, first=5)
    with ctrl_c_soon():
        updates.abandon()
    assert updates.is_busy
    threading.Timer(0.2, gate.set).start()
    optimizer.load_state_dict(saved)
    time.sleep(0.3)
    check_same_state(optimizer.state_dict(), saved)
    optimizer.close()


@pytest.mark.parametrize("how", [{}, LATE], ids=["at once", "late"])
def test_parameters_in_one_memory_are_refused(
    how: dict[str, Any], device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    first = parameter()
    second = nn.Parameter(first.data)
    with pytest.raises(ValueError, match="parameter 1 of group 0 in that of parameter 0 of group 0"):
        on_cpu(torch.optim.SGD([first, second], lr=0.1), tmp_path, device, **how)
    halves = torch.zeros(2, 64, 64)
    apart = [nn.Parameter(half) for half in halves]
    on_cpu(torch.optim.SGD(apart, lr=0.1), tmp_path, device, **how).close()


def test_a_second_gradient_before_the_step_is_refused(
    device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    weight = parameter()
    optimizer = on_cpu(torch.optim.SGD([weight], lr=0.1), tmp_path, device, chunk_nbytes=1, **IN_BACKWARD)
    weight.sum().backward()
    weight.grad = torch.full((64, 64), 2.0)
    with pytest.raises(RuntimeError, match="got another one in its place"):
        optimizer.step()
    optimizer.close()


@pytest.mark.simulated_only
def test_in_a_forked_child_nothing_waits(device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    assert device is not None
    weight = parameter()
    optimizer = on_cpu(Gated([weight], lr=0.1), tmp_path, device, **LATE)
    Gated.gate.clear()
    weight.grad = torch.ones(64, 64)
    optimizer.step()
    device.synchronize()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            optimizer.flush()
        except RuntimeError as error:
            code = 0 if "forked child" in str(error) else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    Gated.gate.set()
    if ended[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended[0] == child and os.waitstatus_to_exitcode(ended[1]) == 0
    optimizer.close()


def test_a_gradient_set_by_hand_takes_the_place_of_one_on_the_drive(
    device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    weight = parameter()
    optimizer = on_cpu(torch.optim.SGD([weight], lr=0.1), tmp_path, device, offload_gradients=True)
    weight.sum().backward()
    weight.grad = torch.full((64, 64), 2.0)
    optimizer.step()
    assert mean(weight) == -0.2
    optimizer.close()


def test_gradients_whose_memory_is_used_again(device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    """As of a flat buffer: what clears it comes after the copies out of it."""
    weights = [parameter() for _ in range(3)]
    optimizer = on_cpu(Gated(weights, lr=0.1), tmp_path, device, chunk_nbytes=1, **LATE)
    Gated.gate.clear()
    buffer = torch.ones(3, 64, 64)
    for weight, gradient in zip(weights, buffer, strict=True):
        weight.grad = gradient
    optimizer.step()
    buffer.zero_()
    Gated.gate.set()
    optimizer.flush()
    plain = parameter()
    expected = torch.optim.AdamW([copied := nn.Parameter(plain.detach().cpu().clone())], lr=0.1)
    copied.grad = torch.ones(64, 64, device="cpu")
    expected.step()
    assert [mean(weight) for weight in weights] == [mean(copied)] * 3
    optimizer.close()


@pytest.mark.simulated_only
def test_backward_in_two_threads(device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    """As autograd does for two devices: every parameter is updated once in every step."""
    assert device is not None
    parts = [[parameter() for _ in range(8)] for _ in range(2)]
    optimizer = on_cpu(torch.optim.SGD(parts[0] + parts[1], lr=1.0), tmp_path, device, chunk_nbytes=1, **IN_BACKWARD)
    errors: list[BaseException] = []

    def work(part: list[nn.Parameter], barrier: threading.Barrier) -> None:
        try:
            with device:
                loss = sum((weight.sum() for weight in part), torch.zeros(()))
                barrier.wait(20)
                loss.backward()
        except BaseException as error:
            errors.append(error)

    for _ in range(3):
        barrier = threading.Barrier(2)
        threads = [threading.Thread(target=work, args=(part, barrier)) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        optimizer.step()
        optimizer.zero_grad()
    assert {mean(weight) for part in parts for weight in part} == {-3.0}
    optimizer.close()


class Masked(torch.optim.SGD):
    """Halves what is not marked."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for weight in [weight for weight in group["params"] if weight.grad is not None]:
                if not getattr(weight, "_no_decay", False):
                    weight.mul_(0.5)
        return super().step(closure)


def test_private_marks_on_parameters_are_seen(device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    marked, other = parameter(1.0), parameter(1.0)
    marked._no_decay = True  # type: ignore[attr-defined]
    optimizer = on_cpu(Masked([marked, other], lr=0.1), tmp_path, device)
    for weight in (marked, other):
        weight.grad = torch.zeros(64, 64)
    optimizer.step()
    assert (mean(marked), mean(other)) == (1.0, 0.5)
    optimizer.close()


def test_close_without_room_on_the_device_closes(
    device: SimulatedDevice | None, device_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = parameter()
    inner = adamw([weight])
    optimizer = on_cpu(inner, None, device)
    weight.grad = torch.ones(64, 64)
    optimizer.step()

    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("ssdtrain.optimizer.cpu.cpu_updates.load_own_state", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.close()
    assert optimizer.store.is_closed and inner.state[weight]["exp_avg"].count_nonzero() > 0
    optimizer.close()


def test_a_learning_rate_that_is_a_tensor_stays_the_same_one(
    device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    rate = torch.tensor(0.1, device="cpu")
    inner = adamw([parameter()], lr=rate, fused=True)
    on_cpu(inner, tmp_path, device).close()
    assert inner.param_groups[0]["lr"] is rate
