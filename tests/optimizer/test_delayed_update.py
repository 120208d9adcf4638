"""Updates of one step late: equal to the bit to a loop that updates late, and never half there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from cpu_update_tools import Gated, OnCopies, low_precision, on_cpu, store_of, train_low
from state_tools import adamw, batch, check_same, check_same_state, model_of, train, trainable, values
from test_optimizer import Failing
from torch import nn

from ssdtrain.devices.simulated import SimulatedDevice
from ssdtrain.optimizer.optimizer import OffloadedOptimizer
from ssdtrain.parameters.offload import ParameterOffload
from ssdtrain.policy import OptimizerPolicy, ParameterPolicy

pytestmark = pytest.mark.accelerator_only


class Late(OnCopies):
    """The reference loop: the parameters get the values of an update when the next one is computed."""

    @torch.no_grad()
    def flush(self) -> None:
        for parameter, there in zip(self.parameters, self.copies, strict=True):
            parameter.copy_(there)

    @torch.no_grad()
    def step(self) -> None:
        self.flush()
        for parameter, there in zip(self.parameters, self.copies, strict=True):
            there.grad = None if parameter.grad is None else parameter.grad.to("cpu", there.dtype)
        with torch.device("cpu"):
            self.optimizer.step()


def late(optimizer: torch.optim.Optimizer, folder: Path | None, device: Any, **fields: Any) -> OffloadedOptimizer:
    return on_cpu(optimizer, folder, device, delayed_update=True, **fields)


OPTIMIZERS: dict[str, Any] = {
    "AdamW fused": lambda p: adamw(p, fused=True),
    "AdamW foreach": lambda p: adamw(p, foreach=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


@pytest.mark.parametrize("where", ["drive", "memory"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equal_to_a_loop_that_updates_late(
    name: str, where: str, device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    """Losses of every step, and what there is after `flush`; not what the loop without delay gives."""
    plain, other, model = model_of("mlp"), model_of("mlp"), model_of("mlp")
    expected = Late(plain, OPTIMIZERS[name])
    optimizer = late(OPTIMIZERS[name](model.parameters()), tmp_path if where == "drive" else None, device)
    losses = train(plain, expected, 4)  # type: ignore[arg-type]
    assert not torch.equal(losses[3], train(other, OnCopies(other, OPTIMIZERS[name]), 4)[3])  # type: ignore[arg-type]
    check_same(train(model, optimizer, 4), losses)
    check_same(values(model), values(plain))  # before the last update
    expected.flush()
    optimizer.flush()
    check_same(values(model), values(plain))
    check_same_state(optimizer.state_dict(), expected.optimizer.state_dict())
    optimizer.close()


def test_parameters_that_are_away(device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    """They come to the device as they were, and are replaced where they are by then."""
    plain, model = model_of("mlp"), model_of("mlp")
    expected = Late(plain, adamw)
    policy = ParameterPolicy(min_nbytes=1024, staging_nbytes=64 * 1024, prefetch_nbytes=40_000)
    owner = ParameterOffload(model, lambda: store_of(tmp_path, device, policy), policy, None)
    chosen = OptimizerPolicy(min_nbytes=1024, chunk_nbytes=40_000, update_on="cpu", delayed_update=True)
    optimizer = OffloadedOptimizer(adamw(trainable(model)), owner.store.share, chosen)
    check_same(train(model, optimizer, 4), train(plain, expected, 4))  # type: ignore[arg-type]
    optimizer.close()
    owner.close()
    expected.flush()
    check_same(values(model), values(plain))


def test_master_weights(device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    plain, model = low_precision(), low_precision()
    expected = Late(plain, lambda p: adamw(p, lr=1e-3), torch.float32)
    optimizer = late(adamw(model.parameters(), lr=1e-3), tmp_path, device, master_weights=True)
    check_same(train_low(model, optimizer, range(4)), train_low(plain, expected, range(4)))
    optimizer.close()
    expected.flush()
    check_same(values(model), values(plain))


def test_it_works_while_the_next_step_computes(
    device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    """The update cannot end before the next forward and backward have: `step` and they must not wait for it."""
    plain, model = model_of("mlp"), model_of("mlp")
    optimizer = late(Gated(model.parameters(), lr=1e-2), tmp_path, device)
    losses = train(plain, Late(plain, adamw), 4)  # type: ignore[arg-type]
    found = []
    for step in range(4):
        loss = model(batch(step).to(next(model.parameters()).device))
        loss.backward()
        Gated.gate.set()
        optimizer.flush()
        Gated.gate.clear()
        optimizer.step()
        assert all(p.grad is None for p in model.parameters()) and inside.cpu_updates(optimizer).is_busy
        found.append(loss.detach())
    check_same(found, losses)
    Gated.gate.set()
    optimizer.close()


def test_reads_do_not_run_far_ahead(device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    """Of many chunks, all begun at once, the state of three is read: the one that is updated, and two that follow."""
    weights = [nn.Parameter(torch.zeros(64, 64)) for _ in range(12)]
    optimizer = late(Gated(weights), tmp_path, device, chunk_nbytes=1)
    for _ in range(2):
        Gated.gate.set()
        optimizer.flush()
        Gated.gate.clear()
        Gated.entered.clear()
        for weight in weights:
            weight.grad = torch.ones(64, 64)
        optimizer.step()
    assert Gated.entered.wait(20)
    leaves = [leaf for parameter in optimizer._offloaded for leaf in optimizer._offloaded._leaves(parameter)]
    num_coming = sum(leaf.pending is not None for leaf in leaves)
    Gated.gate.set()
    optimizer.close()
    assert len(leaves) == 2 * 12 and num_coming <= 2 * 2


def test_settings_are_those_at_the_step(device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    """A rate in a tensor is changed in place right after `step`, a float and a new group later: for the next update."""

    def run(optimizer: Any, model: nn.Module) -> list[torch.Tensor]:
        losses = []
        for step in range(4):
            losses += train(model, optimizer, 1, first=step)
            optimizer.param_groups[0]["lr"].mul_(0.5)
            optimizer.param_groups[0]["weight_decay"] = 0.1 * step
        return losses

    plain, model = model_of("mlp"), model_of("mlp")
    expected = Late(plain, lambda p: adamw(p, lr=torch.tensor(1e-2, device="cpu"), fused=True))
    optimizer = late(adamw(model.parameters(), lr=torch.tensor(1e-2, device="cpu"), fused=True), tmp_path, device)
    check_same(run(optimizer, model), run(expected, plain))
    optimizer.close()
    expected.flush()
    check_same(values(model), values(plain))


def test_groups_that_change(device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    """One comes and one goes while an update is outstanding: it ends first."""
    model = model_of("mlp")
    blocks = [list(block.parameters()) for block in model.blocks]  # type: ignore[union-attr]
    optimizer = late(adamw([{"params": block} for block in blocks[:3]]), tmp_path, device)
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": blocks[3]})
    assert not inside.cpu_updates(optimizer).is_busy
    train(model, optimizer, 1)
    optimizer.param_groups.pop(0)
    optimizer.zero_grad()
    assert not inside.cpu_updates(optimizer).is_busy
    before = values(model)
    train(model, optimizer, 2)
    optimizer.close()
    after = values(model)
    assert torch.equal(before["blocks.0.up.weight"], after["blocks.0.up.weight"])
    assert not torch.equal(before["blocks.3.up.weight"], after["blocks.3.up.weight"])


@pytest.mark.parametrize("is_fused", [False, True])
def test_grad_scaler(is_fused: bool, device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    """Its scale changes in place right after the step that it was for; a step that it skips begins no update."""
    if device_kind == "cuda" and is_fused:
        pytest.skip("the reference has no copy of the scale")

    def run(optimizer: Any, model: nn.Module, flush: Any) -> None:
        kind = next(model.parameters()).device.type
        scaler = torch.amp.GradScaler(kind, init_scale=256.0, growth_interval=2)
        for step in range(5):
            loss = model(batch(step).to(kind)) * (float("inf") if step == 3 else 1.0)
            scaler.scale(loss).backward()
            if not isinstance(optimizer, OffloadedOptimizer):
                scaler.unscale_(optimizer)  # the reference takes plain gradients
            scaler.step(optimizer)
            if is_fused and step == 3 and isinstance(optimizer, Late):
                optimizer.flush()  # a fused one takes a step of its own, in which it changes nothing
            scaler.update()
            optimizer.zero_grad()
        flush()

    class Reference(Late, torch.optim.Optimizer):
        """What a GradScaler takes for an optimizer."""

    plain, model = model_of("mlp"), model_of("mlp")
    expected = Reference(plain, lambda p: adamw(p, fused=is_fused))
    expected.param_groups = [{"params": expected.parameters}]
    run(expected, plain, expected.flush)
    optimizer = late(adamw(model.parameters(), fused=is_fused), tmp_path, device)
    run(optimizer, model, optimizer.flush)
    check_same(values(model), values(plain))
    optimizer.close()


def test_checkpoints(device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    """Taken without `flush` the model's would be older than the optimizer's: an error. Loading drops an update."""
    plain, model = model_of("mlp"), model_of("mlp")
    expected = Late(plain, adamw)
    optimizer = late(adamw(model.parameters()), tmp_path, device)
    train(model, optimizer, 2)
    train(plain, expected, 2)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"Expected flush\(\) before a checkpoint, got the update of step 2"):
        optimizer.state_dict()
    optimizer.flush()
    expected.flush()
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    check_same(saved[0], dict(plain.state_dict()))
    rest = train(plain, expected, 3, first=2)  # type: ignore[arg-type]
    train(model, optimizer, 1, first=8)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    check_same(values(model), saved[0])
    check_same(train(model, optimizer, 3, first=2), rest)
    assert len(optimizer.state) == len(list(model.parameters()))  # looking at it ends the update
    expected.flush()
    check_same(values(model), values(plain))
    check_same_state(optimizer.state_dict(), expected.optimizer.state_dict())
    optimizer.close()


@pytest.mark.parametrize("call", ["step", "flush", "state_dict", "close"])
def test_an_error_comes_with_the_next_call(
    call: str, device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    """The parameters have none of the update; nothing but a checkpoint helps, as its state may be half there."""
    model = model_of("mlp")
    Failing.num_good = 10_000
    inner = Failing(model.parameters(), lr=1e-2)
    optimizer = late(inner, tmp_path, device)
    train(model, optimizer, 2)
    optimizer.flush()
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    good = train(model, optimizer, 2, first=2)
    optimizer.flush()
    end = values(model)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    Failing.num_good = 2
    train(model, optimizer, 1, first=2)
    for job in inside.cpu_updates(optimizer)._jobs:
        assert job.future is not None
        job.future.exception()
    model(batch(3).to(next(model.parameters()).device)).backward()
    if call == "close":
        with pytest.raises(KeyboardInterrupt):
            optimizer.close()
        return
    with pytest.raises(KeyboardInterrupt):
        getattr(optimizer, call)()
    check_same(values(model), saved[0])
    Failing.num_good = 10_000
    for again in (optimizer.step, optimizer.state_dict):
        with pytest.raises(RuntimeError, match="interrupted: step 5, whose update was delayed"):
            again()
    optimizer.zero_grad()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    check_same(train(model, optimizer, 2, first=2), good)
    optimizer.close()
    check_same(values(model), end)


def test_a_change_in_between_says_so(device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    """It would be lost under the update; after `flush` it is welcome."""
    model = model_of("mlp")
    optimizer = late(adamw(model.parameters()), tmp_path, device)
    train(model, optimizer, 1)
    optimizer.flush()
    with torch.no_grad():
        model.blocks[1].up.weight.mul_(2.0)  # type: ignore[union-attr]
    train(model, optimizer, 1, first=1)
    for job in inside.cpu_updates(optimizer)._jobs:
        assert job.future is not None
        job.future.result()
    before = values(model)
    with torch.no_grad():
        model.blocks[3].down.weight.mul_(1.0)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"unchanged while the CPU updates it.*with delayed_update after .*flush"):
        optimizer.flush()
    check_same(values(model), before)
    with pytest.raises(RuntimeError, match="got one that was interrupted"):
        optimizer.close()


def test_a_closure_computes_before_the_late_update(
    device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    """As if it had been called before `step()`: beside the update of the step before."""
    plain, model = model_of("mlp"), model_of("mlp")
    expected, optimizer = Late(plain, adamw), late(adamw(model.parameters()), tmp_path, device)
    losses = train(plain, expected, 4)  # type: ignore[arg-type]
    for step, loss in enumerate(losses):

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            found: torch.Tensor = model(batch(step))
            found.backward()
            return found.detach()

        check_same(optimizer.step(closure), loss)
    check_same(values(model), values(plain))
    optimizer.close()


def test_policy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected update_on='cpu' with delayed_update"):
        OptimizerPolicy(delayed_update=True)
    for mode in ("step_in_backward", "offload_gradients"):
        with pytest.raises(ValueError, match=f"Expected delayed_update or {mode}, got both"):
            OptimizerPolicy.of({"update_on": "cpu", "delayed_update": True, mode: True})
    with pytest.raises(ValueError, match="Expected parameters of an accelerator with delayed_update, got parameter 0"):
        late(adamw(model_of("mlp").parameters()), tmp_path, None)
    assert list(tmp_path.iterdir()) == []
