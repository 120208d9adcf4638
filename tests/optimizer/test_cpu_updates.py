"""Parameters of an accelerator that the CPU updates: to the bit what the plain optimizer does with copies there."""

from __future__ import annotations

import copy
import io
import threading
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from cpu_update_tools import ON_CPU, Gated, OnCopies, low_precision, on_cpu, run_on_copies, store_of, train_low
from drives import Drive, fill
from state_tools import (
    EAGER_STATE,
    adamw,
    batch,
    check_same,
    check_same_state,
    grad_nbytes,
    model_of,
    train,
    trainable,
    values,
)
from test_optimizer import OPTIMIZERS, Failing
from torch import nn

import ssdtrain
from ssdtrain.devices.simulated import SimulatedDevice
from ssdtrain.optimizer.optimizer import OffloadedOptimizer
from ssdtrain.parameters.offload import ParameterOffload
from ssdtrain.policy import OptimizerPolicy, ParameterPolicy

pytestmark = pytest.mark.accelerator_only
HOW: dict[str, dict[str, Any]] = {
    "after backward": {},
    "step_in_backward": {"step_in_backward": True},
    "offload_gradients": {"offload_gradients": True},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("where", ["drive", "memory", "host tier", "threads"])
@pytest.mark.parametrize("kind", ["mlp", "tied", "lora"])
def test_equal_to_the_bit(
    kind: str, how: str, where: str, device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    """Losses, parameters and state of the fused optimizer, wherever its state and the gradients are in between."""
    losses, expected, plain = run_on_copies(lambda p: adamw(p, fused=True), 3, kind)
    model = model_of(kind)
    fields: dict[str, dict[str, Any]] = {
        "memory": {"host_nbytes": 1 << 20},
        "host tier": {"host_nbytes": 60_000},
        "threads": {"engine": "threads"},
    }
    inner = adamw(trainable(model), fused=True)
    folder = None if where == "memory" else tmp_path
    optimizer = on_cpu(inner, folder, device, **HOW[how], **fields.get(where, {}))
    check_same(train(model, optimizer, 3), losses)
    check_same(values(model), values(plain))
    check_same_state(optimizer.state_dict(), expected.state_dict())
    stats = optimizer.stats
    assert (stats.away_nbytes > 0) == (folder is not None), str(stats)
    assert (stats.peak_host_nbytes > 0) == (where == "host tier" or (where, how) == ("memory", "offload_gradients"))
    held = [value for state in inner.state.values() for value in state.values()]
    assert all(value.device.type == "cpu" for value in held)
    assert folder is None or all(value.nbytes < 1024 for value in held)
    optimizer.close()


@pytest.mark.parametrize(
    "name", ["SGD", "SGD momentum", "AdamW foreach", "Adam amsgrad", "Adagrad", "Adafactor", "ASGD"]
)
def test_every_optimizer(name: str, device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    losses, expected, plain = run_on_copies(OPTIMIZERS[name], 3)
    model = model_of("mlp")
    optimizer = on_cpu(OPTIMIZERS[name](model.parameters()), tmp_path, device)
    check_same(train(model, optimizer, 3), losses)
    check_same(values(model), values(plain))
    check_same_state(optimizer.state_dict(), expected.state_dict())
    optimizer.close()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("where", ["drive", "host"])
@pytest.mark.parametrize("kind", ["mlp", "tied"])
def test_parameters_that_are_away_are_updated_where_they_are(
    kind: str, how: str, where: str, device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    """Offloaded as well: a step reads them to host memory, never to the device; graphs learn of the change."""
    losses, expected, plain = run_on_copies(adamw, 3, kind)
    model = model_of(kind)
    policy = ParameterPolicy(**EAGER_STATE, prefetch_nbytes=40_000)
    owner = ParameterOffload(
        model, lambda: store_of(tmp_path if where == "drive" else None, device, policy), policy, None
    )
    chosen = OptimizerPolicy(**(ON_CPU | HOW[how]))
    optimizer = OffloadedOptimizer(adamw(trainable(model)), owner.store.share, chosen)
    num_reads: list[int] = []

    def settle() -> None:
        owner.flush()
        num_reads.append(owner.stats.num_demand_reads)

    found = []
    for step in range(3):
        versions = [p._version for p in trainable(model)]
        found += train(model, optimizer, 1, first=step, between=settle)
        assert all(p._version > version for p, version in zip(trainable(model), versions, strict=True))
        if how != "step_in_backward":
            assert owner.stats.num_demand_reads == num_reads[-1], "a parameter was brought to the device"
    check_same(found, losses)
    check_same_state(optimizer.state_dict(), expected.state_dict())
    check_same(values(model), values(plain))
    optimizer.close()
    owner.close()
    check_same(values(model), values(plain))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_state_of_a_model_that_was_cast_is_given_back_as_it_was(
    dtype: torch.dtype, device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    """As the plain optimizer has it, whose state no cast of the model touches."""
    _, expected, _ = run_on_copies(adamw, 2)
    model = model_of("mlp")
    inner = adamw(model.parameters())
    optimizer = on_cpu(inner, tmp_path, device)
    train(model, optimizer, 2)
    model.to(dtype)
    optimizer.close()
    moments = [value for state in inner.state.values() for key, value in state.items() if key != "step"]
    assert {value.dtype for value in moments} == {torch.float32}
    check_same_state(inner.state_dict(), expected.state_dict())


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("full_from", [0, 1, 2])
def test_new_values_that_the_drive_has_no_room_for(
    how: str, full_from: int, device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    """They stay in host memory, and are brought to the device from there."""
    losses, _, plain = run_on_copies(adamw, 3)
    model = model_of("mlp")
    policy = ParameterPolicy(**EAGER_STATE, prefetch_nbytes=40_000)
    owner = ParameterOffload(model, lambda: store_of(tmp_path, device, policy), policy, None)
    optimizer = OffloadedOptimizer(adamw(trainable(model)), owner.store.share, OptimizerPolicy(**(ON_CPU | HOW[how])))
    found = train(model, optimizer, full_from)
    found += train(model, optimizer, 1, first=full_from, between=lambda: inside.space(owner.store).retire(0, "full"))
    found += train(model, optimizer, 2 - full_from, first=full_from + 1)
    assert any("no room on the drive" in text for text in owner.stats.fallbacks)
    check_same(found, losses)
    check_same(values(model), values(plain))
    assert {p.device.type for p in model.parameters()} == {"cuda" if device_kind == "cuda" else "cpu"}
    optimizer.close()
    owner.close()
    check_same(values(model), values(plain))


def test_a_graph_that_saved_an_updated_parameter_says_so(
    device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    """As without us: a second backward after the step would use other weights than forward did."""
    for is_away in (False, True):
        model = model_of("mlp")
        policy = ParameterPolicy(**EAGER_STATE, prefetch_nbytes=0)
        store = store_of(tmp_path, device, policy)
        owner = ParameterOffload(model, store.share, policy, None) if is_away else None
        optimizer = OffloadedOptimizer(adamw(trainable(model)), store.share, OptimizerPolicy(**ON_CPU))
        loss = model(batch(0).to(device_kind if device_kind == "cuda" else "cpu"))
        loss.backward(retain_graph=True)
        if owner is not None:
            owner.flush()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        optimizer.close()


def test_schedulers_groups_and_settings(device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    """Groups change between steps, one comes later, a learning rate is a tensor; the step uses what it finds."""

    def run(is_ours: bool) -> tuple[list[torch.Tensor], list[float], list[str], Any]:
        model = model_of("mlp")
        blocks = list(model.blocks)  # type: ignore[arg-type]
        early, late = [[p for b in part for p in b.parameters()] for part in (blocks[:2], blocks[2:])]

        def make(parameters: list[Any]) -> torch.optim.Optimizer:
            groups = [{"params": parameters, "lr": torch.tensor(1e-2), "betas": (0.8, 0.99)}]
            return torch.optim.AdamW(groups, fused=True)

        calls: list[str] = []
        optimizer: Any = on_cpu(make(early), tmp_path, device) if is_ours else make(early)
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        losses, rates = [], []
        for step in range(5):
            if step == 2:
                optimizer.add_param_group({"params": late, "lr": 3e-3, "initial_lr": 3e-3, "fused": True})
            losses += train(model, optimizer, 1, first=step)
            decay.step()
            rates.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.param_groups[0]["weight_decay"] = 0.1 * step
        return losses, rates, calls, optimizer.state_dict()

    expected, found = run(False), run(True)
    if device_kind != "cuda":  # there the plain one computes on another device
        check_same(found[0], expected[0])
        check_same_state(found[3], expected[3])
    assert found[1:3] == expected[1:3]


@pytest.mark.parametrize("how", HOW)
def test_save_and_resume(how: str, device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    """Through torch.save to another one and to a plain one on copies, and from there; then on without us."""
    losses, expected, _ = run_on_copies(adamw, 6)
    model = model_of("mlp")
    optimizer = on_cpu(adamw(model.parameters()), tmp_path, device, **HOW[how])
    check_same(train(model, optimizer, 3), losses[:3])
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    optimizer.close()

    again = model_of("mlp")
    resumed = on_cpu(adamw(again.parameters(), lr=0.5), tmp_path, device, **HOW[how])
    train(again, resumed, 1, first=9)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    check_same(train(again, resumed, 3, first=3), losses[3:])
    check_same_state(resumed.state_dict(), expected.state_dict())

    other = model_of("mlp")
    other.load_state_dict(saved[0])
    plain = OnCopies(other, adamw)
    plain.optimizer.load_state_dict(saved[1])
    check_same(train(other, plain, 3, first=3), losses[3:])  # type: ignore[arg-type]
    whole = plain.optimizer.state_dict()

    inner = adamw(again.parameters())
    resumed.close()
    resumed = on_cpu(inner, tmp_path, device)
    resumed.load_state_dict(whole)
    check_same_state(resumed.state_dict(), expected.state_dict())
    resumed.close()
    assert all(state["exp_avg"].device == p.device for p, state in inner.state.items())
    check_same_state(inner.state_dict(), expected.state_dict())
    train(again, inner, 1)


def test_state_that_exists_already(device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    """Made on the device, it goes to the drive; a parameter that somebody changes between steps is what counts."""
    plain, model = model_of("mlp"), model_of("mlp")
    first, inner = adamw(plain.parameters()), adamw(model.parameters())
    check_same(train(model, inner, 2), train(plain, first, 2))
    optimizer = on_cpu(inner, tmp_path, device)
    expected = OnCopies(plain, adamw)
    expected.optimizer.load_state_dict(first.state_dict())
    for step in range(2, 5):
        check_same(train(model, optimizer, 1, first=step), train(plain, expected, 1, first=step))  # type: ignore[arg-type]
        with torch.no_grad():
            model.blocks[1].up.weight.clamp_(-0.1, 0.1)  # type: ignore[union-attr]
            model.blocks[2].up.weight.data.mul_(0.5)  # type: ignore[union-attr]
            plain.blocks[1].up.weight.clamp_(-0.1, 0.1)  # type: ignore[union-attr]
            plain.blocks[2].up.weight.data.mul_(0.5)  # type: ignore[union-attr]
            for parameter, there in zip(expected.parameters, expected.copies, strict=True):
                there.copy_(parameter)
    check_same(values(model), values(plain))
    assert len(optimizer.state) == len(list(model.parameters()))
    first_weight = next(model.parameters())
    check_same(optimizer.state[first_weight]["exp_avg"], expected.optimizer.state[expected.copies[0]]["exp_avg"])
    optimizer.close()


def test_layouts_and_what_is_noted_on_parameters(
    device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    """Strides are kept, parts of larger storages are left alone, scalars and empty ones work; attributes are seen."""

    class Noted(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in [p for p in group["params"] if p.grad is not None]:
                    p.mul_(getattr(p, "shrink", 1.0))
            return super().step(closure)

    def make() -> tuple[list[nn.Parameter], torch.Tensor]:
        torch.manual_seed(3)
        memory = torch.randn(40, 40)
        parts = [torch.randn(30, 50).t(), memory[5:25, 3:33], memory[30], torch.randn(()), torch.randn(0, 3)]
        parameters = [nn.Parameter(part) for part in parts]
        parameters[1].shrink = 0.5  # type: ignore[attr-defined]
        return parameters, memory

    def run(optimizer: Any, parameters: list[nn.Parameter]) -> None:
        for step in range(3):
            torch.manual_seed(step)
            for p in parameters:
                p.grad = torch.randn(p.shape)
            parameters[1].grad = torch.randn(30, 20).t()
            optimizer.step()

    (plain, expected), (ours, memory) = make(), make()
    if device_kind == "cuda":
        pytest.skip("the plain one computes on another device")
    run(Noted(plain, lr=0.1, momentum=0.9), plain)
    optimizer = on_cpu(Noted(ours, lr=0.1, momentum=0.9), tmp_path, device, min_nbytes=0, chunk_nbytes=1)
    run(optimizer, ours)
    check_same(list(ours), list(plain))
    check_same(memory, expected)
    optimizer.close()


@pytest.mark.parametrize("how", HOW)
def test_master_weights(how: str, device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    """A float32 optimizer for bfloat16 parameters, also over a checkpoint, in whatever order it is loaded."""
    for has_masters in (False, True):
        plain, model = low_precision(), low_precision()
        expected = OnCopies(plain, lambda p: adamw(p, fused=True, lr=1e-3), torch.float32 if has_masters else None)
        inner = adamw(model.parameters(), fused=True, lr=1e-3)
        optimizer = on_cpu(inner, tmp_path, device, master_weights=has_masters, **HOW[how])
        check_same(train_low(model, optimizer, range(4)), train_low(plain, expected, range(4)))
        check_same(values(model), values(plain))
        saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        state = saved[1]["state"][0]
        assert ("master_param" in state) == has_masters
        assert state["exp_avg"].dtype is (torch.float32 if has_masters else torch.bfloat16)
        train_low(model, optimizer, range(7, 9))
        for is_model_first in (True, False):
            if is_model_first:
                model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            if not is_model_first:
                model.load_state_dict(saved[0])
            copies = copy.deepcopy([plain.state_dict(), expected.optimizer.state_dict(), expected.copies])
            check_same(train_low(model, optimizer, range(4, 6)), train_low(plain, expected, range(4, 6)))
            check_same(values(model), values(plain))
            plain.load_state_dict(copies[0])
            expected.optimizer.load_state_dict(copies[1])
            with torch.no_grad():
                for there, value in zip(expected.copies, copies[2], strict=True):
                    there.copy_(value)
        optimizer.close()
        assert "master_param" not in inner.state[model[0].weight]  # type: ignore[index]


@pytest.mark.parametrize("how", HOW)
def test_a_state_dict_that_was_loaded_stays_as_it_is(how: str, device: SimulatedDevice | None, tmp_path: Path) -> None:
    """Without us state goes to another device, and is a copy there; in host memory already, it was the dict's own."""
    model = low_precision()
    optimizer = on_cpu(adamw(model.parameters(), fused=True, lr=1e-3), tmp_path, device, **HOW[how])
    train_low(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    train_low(model, optimizer, range(2, 5))
    check_same(saved, kept)
    optimizer.close()


def test_a_parameter_that_somebody_has_changed_replaces_its_master(
    device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    plain, model = low_precision(), low_precision()
    expected = OnCopies(plain, lambda p: adamw(p, lr=1e-3), torch.float32)
    optimizer = on_cpu(adamw(model.parameters(), lr=1e-3), tmp_path, device, master_weights=True)
    train_low(model, optimizer, range(2)), train_low(plain, expected, range(2))
    for module in (model, plain):
        module[1].weight.data.zero_()  # type: ignore[index]
    with torch.no_grad():
        expected.copies[2].zero_()
    check_same(train_low(model, optimizer, range(2, 4)), train_low(plain, expected, range(2, 4)))
    check_same(values(model), values(plain))
    optimizer.close()


@pytest.mark.parametrize("is_fused", [False, True])
def test_grad_scaler(is_fused: bool, device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    """It unscales on the device, or hands scale and overflow to a fused one, which has them on the CPU."""

    def run(optimizer: Any, model: nn.Module) -> None:
        kind = next(model.parameters()).device.type
        scaler = torch.amp.GradScaler(kind, init_scale=256.0, growth_interval=2)
        for step in range(6):
            loss = model(batch(step).to(kind)) * (float("inf") if step == 3 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    if device_kind == "cuda":
        pytest.skip("the plain one computes on another device")
    plain, model = model_of("mlp"), model_of("mlp")
    run(adamw(plain.parameters(), fused=is_fused), plain)
    inner = adamw(model.parameters(), fused=is_fused)
    optimizer = on_cpu(inner, tmp_path, device)
    run(optimizer, model)
    check_same(values(model), values(plain))
    assert not hasattr(inner, "grad_scale")
    optimizer.close()


@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_accumulation_and_clipping(
    max_norm: float, device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    """Accumulated on the device or on the drive, clipped by its norm: plain utilities, and the optimizer's own."""

    def run(optimizer: Any, model: nn.Module, is_own: bool) -> list[torch.Tensor]:
        norms = []
        for step in range(2):
            for part in range(2):
                model(batch(2 * step + part).to(next(model.parameters()).device)).backward()
            clip = optimizer.clip_grad_norm_ if is_own else lambda m: nn.utils.clip_grad_norm_(model.parameters(), m)
            norms.append(clip(max_norm))
            optimizer.step()
            optimizer.zero_grad()
        return norms

    plain = model_of("lora")
    expected = run(OnCopies(plain, adamw), plain, False)
    for is_own, fields in ((False, {}), (True, {}), (True, {"offload_gradients": True})):
        model = model_of("lora")
        optimizer = on_cpu(adamw(model.parameters()), tmp_path, device, **fields)
        check_same(run(optimizer, model, is_own), expected)
        check_same(values(model), values(plain))
        optimizer.close()


def test_sparse_gradients(device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    def run(is_ours: bool, **fields: Any) -> torch.Tensor:
        torch.manual_seed(0)
        table = nn.Embedding(200, 16, sparse=True)
        optimizer: Any
        if is_ours:
            optimizer = on_cpu(torch.optim.SparseAdam(table.parameters()), tmp_path, device, **fields)
        else:
            optimizer = OnCopies(table, torch.optim.SparseAdam)
        for step in range(4):
            table(torch.arange(step, step + 9)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return table.weight.detach()

    expected = run(False)
    for fields in HOW.values():
        check_same(run(True, **fields), expected)


# -- beside backward ---------------------------------------------------------------------------------------------------


def test_it_works_while_backward_computes(device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    """The first update cannot end before backward does: backward must not wait for it. All in one thread of its own."""
    losses, _, plain = run_on_copies(adamw, 2)
    model = model_of("mlp")
    optimizer = on_cpu(
        Gated(model.parameters(), lr=1e-2), tmp_path, device, step_in_backward=True, chunk_nbytes=100_000
    )
    found = []
    for step in range(2):
        Gated.gate.clear()
        Gated.threads.clear()
        loss = model(batch(step).to(next(model.parameters()).device))
        loss.backward()
        assert len(inside.cpu_updates(optimizer)._jobs) >= 2 and grad_nbytes(model) < sum(
            p.nbytes for p in model.parameters()
        )
        Gated.gate.set()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
        assert len(Gated.threads) == 1 and threading.get_ident() not in Gated.threads
    check_same(found, losses)
    check_same(values(model), values(plain))
    optimizer.close()


def test_no_more_than_three_chunks_are_under_way(
    device: SimulatedDevice | None, device_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for how in HOW.values():
        model = model_of("mlp")
        optimizer = on_cpu(adamw(model.parameters()), tmp_path, device, chunk_nbytes=1, **how)
        seen: list[int] = []
        updates, begin = inside.cpu_updates(optimizer), inside.cpu_updates(optimizer).begin

        def count(*arguments: Any, begin: Any = begin, updates: Any = updates, seen: list[int] = seen) -> None:
            begin(*arguments)
            seen.append(len(updates._jobs))

        monkeypatch.setattr(updates, "begin", count)
        train(model, optimizer, 2)
        assert len(seen) == 2 * len(list(model.parameters())) and max(seen) == 3
        optimizer.close()


def test_a_parameter_that_is_changed_meanwhile_says_so(
    device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    """The change would be lost under the update that was computed without it."""
    model = model_of("mlp")
    optimizer = on_cpu(adamw(model.parameters()), tmp_path, device, step_in_backward=True, chunk_nbytes=200_000)
    model(batch(0).to(next(model.parameters()).device)).backward()
    for job in inside.cpu_updates(optimizer)._jobs:
        assert job.future is not None
        job.future.result()
    with torch.no_grad():
        model.blocks[3].down.weight.mul_(2.0)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"Expected parameter \d+ of group 0 unchanged while the CPU updates it"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="interrupted: step 1"):
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match="interrupted: step 1"):
        optimizer.close()


# -- what fails --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("num_good", [0, 2])
def test_an_interrupted_step_is_never_taken_for_a_whole_one(
    num_good: int, how: str, device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    """Raised where the step was asked for; parameters and state of a checkpoint go on as if nothing had been."""
    losses, _, plain = run_on_copies(adamw)
    model = model_of("mlp")
    Failing.num_good = 10_000
    optimizer = on_cpu(Failing(model.parameters(), lr=1e-2), tmp_path, device, **HOW[how])
    check_same(train(model, optimizer, 2), losses[:2])
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    Failing.num_good = num_good
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer, 1, first=2)
    assert not inside.cpu_updates(optimizer)._jobs
    Failing.num_good = 10_000
    for call in (optimizer.step, optimizer.state_dict):
        with pytest.raises(RuntimeError, match=r"interrupted: step 3.*after step 2"):
            call()
    optimizer.zero_grad()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    check_same(train(model, optimizer, 2, first=2), losses[2:])
    check_same(values(model), values(plain))
    optimizer.close()


def test_ctrl_c_while_it_waits(
    device: SimulatedDevice | None, device_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the thread that trains, with chunks under way: they end before anything else is done."""
    model = model_of("mlp")
    optimizer = on_cpu(adamw(model.parameters()), tmp_path, device)
    train(model, optimizer, 1)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    after = train(model, optimizer, 1, first=1)
    final = values(model)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    calls = []
    put_back = inside.cpu_updates(optimizer)._put_back

    def interrupt(entry: Any) -> None:
        calls.append(entry)
        if len(calls) == 3:
            raise KeyboardInterrupt
        put_back(entry)

    monkeypatch.setattr(inside.cpu_updates(optimizer), "_put_back", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer, 1, first=1)
    monkeypatch.undo()
    assert not inside.cpu_updates(optimizer)._jobs
    with pytest.raises(RuntimeError, match="interrupted: step 3"):
        optimizer.step()
    optimizer.zero_grad()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    check_same(train(model, optimizer, 1, first=1), after)
    check_same(values(model), final)
    optimizer.close()


@pytest.mark.parametrize("how", HOW)
def test_a_drive_without_room(
    how: str,
    device: SimulatedDevice | None,
    device_kind: str,
    small_ext4: Drive,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """State and gradients stay where they are, and training goes on."""
    monkeypatch.setattr("ssdtrain.io.spill_space._SHARE", 1 << 20)  # no room is taken ahead
    losses, _, plain = run_on_copies(adamw, kind="gpt")
    model = model_of("gpt")
    optimizer = on_cpu(adamw(model.parameters()), Path(small_ext4.directory), device, **HOW[how])
    fill(small_ext4.directory)
    check_same(train(model, optimizer, 4), losses)
    check_same(values(model), values(plain))
    assert any("no room on the drive" in text for text in optimizer.stats.fallbacks), optimizer.stats
    optimizer.close()


@pytest.mark.parametrize("how", HOW)
def test_without_pinned_memory(
    how: str,
    device: SimulatedDevice | None,
    device_kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses, _, _ = run_on_copies(adamw, 2)
    model = model_of("mlp")
    optimizer = on_cpu(adamw(model.parameters()), tmp_path, device, **HOW[how])

    def refuse(nbytes: int) -> torch.UntypedStorage:
        raise RuntimeError("CUDA error: out of memory\nmore")

    for accelerator in set(inside.devices(inside.cpu_updates(optimizer)).values()):
        monkeypatch.setattr(accelerator, "allocate_host", refuse)
    check_same(train(model, optimizer, 2), losses)
    assert any("no pinned host memory (CUDA error: out of memory)" in text for text in optimizer.stats.fallbacks)
    optimizer.close()


def test_what_cannot_be_updated_there_is_refused(
    device: SimulatedDevice | None, device_kind: str, tmp_path: Path
) -> None:
    model = model_of("mlp")
    with pytest.raises(ValueError, match="Expected capturable=False with update_on='cpu'"):
        on_cpu(adamw(model.parameters(), capturable=True), tmp_path, device)
    weight = nn.Parameter(torch.randn(64, 64, dtype=torch.complex64).conj())
    with pytest.raises(ValueError, match=r"Expected plain parameters .* parameter 0 of group 0: conjugate"):
        on_cpu(torch.optim.SGD([weight], lr=0.1), tmp_path, device)
    assert list(tmp_path.iterdir()) == []


def test_groups_that_users_change(device: SimulatedDevice | None, device_kind: str, tmp_path: Path) -> None:
    """A parameter whose group is gone is not updated any more, also when the step it was in is not over."""
    plain, model = model_of("mlp"), model_of("mlp")

    def run(module: nn.Module, is_ours: bool) -> None:
        groups = [{"params": list(block.parameters())} for block in module.blocks]  # type: ignore[union-attr]
        optimizer = adamw(groups)
        if is_ours:
            optimizer = on_cpu(optimizer, tmp_path, device, step_in_backward=True)
        train(module, optimizer, 2)
        model_input = batch(2).to(next(module.parameters()).device)
        module(model_input).backward()
        optimizer.step()
        optimizer.param_groups.pop(1)
        optimizer.zero_grad()
        train(module, optimizer, 2, first=3)

    if device_kind == "cuda":
        pytest.skip("the plain one computes on another device")
    run(plain, False)
    run(model, True)
    check_same(values(model), values(plain))


def test_policy() -> None:
    with pytest.raises(ValueError, match="Expected update_on='cpu' with master_weights"):
        OptimizerPolicy(master_weights=True)
    with pytest.raises(ValueError, match="update_on"):
        OptimizerPolicy.of({"update_on": "gpu"})


def test_host_memory_is_updated_there_in_any_case(tmp_path: Path) -> None:
    """For parameters in host memory nothing changes, and no thread is made."""
    plain, model = model_of("mlp"), model_of("mlp")
    losses = train(plain, adamw(plain.parameters()), 3)
    optimizer = ssdtrain.offload_optimizer(adamw(model.parameters()), tmp_path, ON_CPU)
    assert isinstance(optimizer, OffloadedOptimizer)
    check_same(train(model, optimizer, 3), losses)
    assert inside.cpu_updates(optimizer)._pool is None
    optimizer.close()
