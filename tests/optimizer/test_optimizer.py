"""Optimizer state on the drive: equal to the bit to the plain optimizer, resumable, never lost and never half there."""

from __future__ import annotations

import copy
import gc
import io
import os
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from drives import Drive, fill
from state_tools import (
    EAGER_STATE,
    MODELS,
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
from torch import nn

import ssdtrain

SMALL_CHUNKS = EAGER_STATE | {"chunk_nbytes": 40_000}
OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "ASGD": lambda p: torch.optim.ASGD(p, t0=3),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def offloaded(optimizer: torch.optim.Optimizer, folder: Path, **policy: Any) -> ssdtrain.OffloadedOptimizer:
    found = ssdtrain.offload_optimizer(optimizer, folder, SMALL_CHUNKS | policy)
    assert isinstance(found, ssdtrain.OffloadedOptimizer)
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_equal_to_the_bit(name: str, tmp_path: Path) -> None:
    """Losses, parameters and state after ten steps; what it has by parameter was on the drive in between."""
    plain = model_of("mlp")
    expected = OPTIMIZERS[name](plain.parameters())
    losses = train(plain, expected)
    model = model_of("mlp")
    optimizer = offloaded(OPTIMIZERS[name](model.parameters()), tmp_path)
    check_same(train(model, optimizer), losses)
    check_same(values(model), values(plain))
    check_same_state(optimizer.state_dict(), expected.state_dict())
    has_state = any(v.nbytes >= 1024 for s in expected.state.values() for v in s.values() if torch.is_tensor(v))
    assert (optimizer.stats.read_nbytes > 0) == has_state, str(optimizer.stats)
    optimizer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["after backward", "step_in_backward", "offload_gradients"])
@pytest.mark.parametrize("has_activations", [False, True], ids=["", "activations"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_model_is_equal_to_the_bit(kind: str, has_activations: bool, how: str, tmp_path: Path) -> None:
    plain = model_of(kind)
    expected = adamw(trainable(plain))
    losses = train(plain, expected)
    model = model_of(kind)
    optimizer = offloaded(adamw(trainable(model)), tmp_path, **({how: True} if "_" in how else {}))
    check_same(train(model, optimizer, activations=tmp_path if has_activations else None), losses)
    check_same(values(model), values(plain))
    check_same_state(optimizer.state_dict(), expected.state_dict())
    optimizer.close()


def test_state_is_not_in_memory_between_steps(tmp_path: Path) -> None:
    """Of every parameter only what is smaller than min_nbytes stays in the optimizer's own dictionary."""
    model = model_of("mlp")
    inner = adamw(model.parameters())
    optimizer = offloaded(inner, tmp_path)
    train(model, optimizer, 2)
    assert all(value.nbytes < 1024 for state in inner.state.values() for value in state.values())
    large = sum(2 * p.nbytes for p in model.parameters() if p.nbytes >= 1024)
    assert optimizer.stats.away_nbytes == large
    optimizer.close()
    held = sum(v.nbytes for state in inner.state.values() for v in state.values() if v.dim())
    assert held == sum(2 * p.nbytes for p in model.parameters())


@pytest.mark.parametrize("how", ["after backward", "step_in_backward", "update_on"])
def test_what_stays_is_counted(tmp_path: Path, how: str) -> None:
    """State below `min_nbytes` stayed without a word: what had left looked like all there was."""
    model = model_of("mlp")
    policy = {"after backward": {}, "step_in_backward": {how: True}, "update_on": {how: "cpu"}}[how]
    optimizer = offloaded(adamw(model.parameters()), tmp_path, **policy)
    assert not optimizer.stats.stays
    for _ in range(2):
        train(model, optimizer, 2)
        found = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
        small = [v.nbytes for v in found if v.nbytes < EAGER_STATE["min_nbytes"]]
        stats = optimizer.stats
        assert {reason: (s.count, s.nbytes) for reason, s in stats.stays.items()} == {
            "smaller than min_nbytes": (len(small), sum(small))
        }
        assert stats.away_nbytes + sum(small) == sum(v.nbytes for v in found)
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.state.clear()
    assert not optimizer.stats.stays and not optimizer.stats.away_nbytes
    optimizer.close()


def test_gradients_are_freed_in_backward(tmp_path: Path) -> None:
    """With step_in_backward the gradients that wait are never more than a chunk, and none is left after backward."""
    model = model_of("gpt")
    optimizer = offloaded(adamw(model.parameters()), tmp_path, step_in_backward=True, chunk_nbytes=30_000)
    waiting: list[int] = []

    def note(_: nn.Parameter) -> None:
        waiting.append(grad_nbytes(model))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(note)
    train(model, optimizer, 3)
    largest = max(p.nbytes for p in model.parameters())
    # Adam's state is twice the gradient: a chunk is full at half its size in gradients, and the last one came on top.
    assert max(waiting) <= 30_000 // 2 + largest
    optimizer.close()


def test_save_and_resume(tmp_path: Path) -> None:
    """Through torch.save, to an offloaded and to a plain optimizer, and from a plain one."""
    plain = model_of("gpt")
    expected = adamw(plain.parameters())
    first, rest = train(plain, expected, 4), train(plain, expected, 6, first=4)

    model = model_of("gpt")
    optimizer = offloaded(adamw(model.parameters()), tmp_path)
    check_same(train(model, optimizer, 4), first)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    optimizer.close()
    saved = file.getvalue()

    for is_offloaded in (True, False):
        again = model_of("gpt")
        resumed: torch.optim.Optimizer = adamw(again.parameters(), lr=0.5)
        if is_offloaded:
            resumed = offloaded(resumed, tmp_path)
        checkpoint = torch.load(io.BytesIO(saved), weights_only=True)
        again.load_state_dict(checkpoint["model"])
        resumed.load_state_dict(checkpoint["optimizer"])
        check_same(train(again, resumed, 6, first=4), rest)
        check_same_state(resumed.state_dict(), expected.state_dict())


def test_state_that_exists_already_goes_too(tmp_path: Path) -> None:
    """An optimizer that has taken steps goes on from there; closed, it goes on without us."""
    plain = model_of("mlp")
    expected = adamw(plain.parameters())
    losses = train(plain, expected, 9)
    model = model_of("mlp")
    inner = adamw(model.parameters())
    found = train(model, inner, 3)
    optimizer = offloaded(inner, tmp_path)
    found += train(model, optimizer, 3, first=3)
    optimizer.close()
    found += train(model, inner, 3, first=6)
    check_same(found, losses)


def test_schedulers_groups_and_hooks(tmp_path: Path) -> None:
    """A scheduler made before and one made after see the same groups; hooks run once per step; a group comes later."""

    def run(folder: Path | None) -> tuple[list[torch.Tensor], list[float], list[str], dict[str, Any]]:
        model = model_of("mlp")
        early, late = list(model.blocks[:2].parameters()), list(model.blocks[2:].parameters())
        optimizer = torch.optim.AdamW([{"params": early, "lr": 1e-2}], weight_decay=0.1)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
        calls: list[str] = []
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        if folder is not None:
            optimizer = offloaded(optimizer, folder)
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        decay = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        losses, rates = [], []
        for step in range(6):
            if step == 2:
                optimizer.add_param_group({"params": late, "lr": 3e-3, "initial_lr": 3e-3})
            losses += train(model, optimizer, 1, first=step)
            if step < 2:
                warmup.step()
            decay.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return losses, rates, calls, optimizer.state_dict()

    expected, found = run(None), run(tmp_path)
    check_same(found[0], expected[0])
    assert found[1:3] == expected[1:3]
    assert found[2].count("pre") == 6
    check_same_state(found[3], expected[3])


def test_closure_is_evaluated_once_before_the_update(tmp_path: Path) -> None:
    plain, model = model_of("mlp"), model_of("mlp")
    expected, optimizer = adamw(plain.parameters()), offloaded(adamw(model.parameters()), tmp_path)

    def closure_of(module: nn.Module, steps: torch.optim.Optimizer) -> Any:
        def closure() -> torch.Tensor:
            steps.zero_grad()
            loss = module(batch(0))
            loss.backward()
            return loss.detach()

        return closure

    other = model_of("mlp")
    in_backward = offloaded(adamw(other.parameters()), tmp_path, step_in_backward=True)
    for _ in range(3):
        loss = expected.step(closure_of(plain, expected))
        check_same(optimizer.step(closure_of(model, optimizer)), loss)
        check_same(in_backward.step(closure_of(other, in_backward)), loss)
    check_same(values(model), values(plain))
    check_same(values(other), values(plain))


def test_accumulation_and_clipping(tmp_path: Path) -> None:
    """Several backward passes, clipped: as plain; in backward, accumulated inside `accumulate()`."""

    def run(optimizer: torch.optim.Optimizer, model: nn.Module, is_clipped: bool) -> None:
        for step in range(4):
            context = getattr(optimizer, "accumulate", None)
            if context is not None:
                with context():
                    model(batch(2 * step)).backward()
            else:
                model(batch(2 * step)).backward()
            model(batch(2 * step + 1)).backward()
            if is_clipped:
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()

    for is_clipped, in_backward in ((True, False), (False, False), (False, True)):
        plain, model = model_of("mlp"), model_of("mlp")
        run(adamw(plain.parameters()), plain, is_clipped)
        optimizer = offloaded(adamw(model.parameters()), tmp_path, step_in_backward=in_backward)
        run(optimizer, model, is_clipped)
        check_same(values(model), values(plain))
        optimizer.close()


@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_gradients_on_the_drive(max_norm: float, tmp_path: Path) -> None:
    """Accumulated over two backward passes and clipped there: norm, parameters and state to the same bits."""

    def run(optimizer: Any, model: nn.Module, seen: list[int]) -> list[torch.Tensor]:
        norms = []
        for step in range(4):
            for part in range(2):
                model(batch(2 * step + part)).backward()
                seen.append(grad_nbytes(model))
            if isinstance(optimizer, ssdtrain.OffloadedOptimizer):
                norms.append(optimizer.clip_grad_norm_(max_norm))
            else:
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
            optimizer.step()
            optimizer.zero_grad()
        return norms

    plain, model, seen = model_of("gpt"), model_of("gpt"), list[int]()
    expected, optimizer = (
        adamw(plain.parameters()),
        offloaded(adamw(model.parameters()), tmp_path, offload_gradients=True),
    )
    check_same(run(optimizer, model, seen), run(expected, plain, []))
    check_same(values(model), values(plain))
    check_same_state(optimizer.state_dict(), expected.state_dict())
    assert max(seen) == 0
    model(batch(0)).backward()
    optimizer.zero_grad()  # dropped: nothing to step with
    before = values(model)
    optimizer.step()
    check_same(values(model), before)
    optimizer.close()
    with pytest.raises(ValueError, match="got both"):
        offloaded(adamw(model.parameters()), tmp_path, offload_gradients=True, step_in_backward=True)
    in_backward = offloaded(adamw(model.parameters()), tmp_path, step_in_backward=True)
    with pytest.raises(RuntimeError, match="Expected offload_gradients to clip"):
        in_backward.clip_grad_norm_(1.0)


def test_second_backward_in_a_step_is_an_error(tmp_path: Path) -> None:
    model = model_of("mlp")
    optimizer = offloaded(adamw(model.parameters()), tmp_path, step_in_backward=True, chunk_nbytes=1)
    model(batch(0)).backward()
    assert grad_nbytes(model) == 0
    with pytest.raises(RuntimeError, match=r"one backward per step .* optimizer.accumulate"):
        model(batch(1)).backward()
    optimizer.close()


def test_parameters_without_gradients(tmp_path: Path) -> None:
    """Frozen and unused ones have no state and are left alone, as by the plain optimizer."""
    plain, model = model_of("moe"), model_of("moe")
    for module in (plain, model):
        module.layers[0].experts[0].requires_grad_(False)  # type: ignore[index,union-attr]
    expected, optimizer = adamw(plain.parameters()), offloaded(adamw(model.parameters()), tmp_path)
    check_same(train(model, optimizer, 3), train(plain, expected, 3))
    check_same_state(optimizer.state_dict(), expected.state_dict())


def test_state_can_be_looked_at(tmp_path: Path) -> None:
    model = model_of("mlp")
    optimizer = offloaded(adamw(model.parameters()), tmp_path)
    train(model, optimizer, 2)
    whole = optimizer.state_dict()["state"]
    assert len(optimizer.state) == len(whole)
    for i, parameter in enumerate(optimizer.state):
        check_same({key: optimizer.state[parameter][key] for key in whole[i]}, whole[i])
    assert "2 tensors" not in str(optimizer.stats) and "optimizer state on the drive" in str(optimizer.stats)


def test_grad_scaler_reaches_a_fused_optimizer(tmp_path: Path) -> None:
    """It hands scale and overflow to the optimizer's attributes, and takes them away again."""

    def run(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        for step in range(6):
            loss = model(batch(step) * (float("inf") if step == 3 else 1.0))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    plain, model = model_of("mlp"), model_of("mlp")
    run(adamw(plain.parameters(), fused=True), plain)
    inner = adamw(model.parameters(), fused=True)
    run(offloaded(inner, tmp_path), model)
    check_same(values(model), values(plain))
    assert not hasattr(inner, "grad_scale")


# -- what cannot be paged ----------------------------------------------------------------------------------------------


def test_refusals(tmp_path: Path) -> None:
    model = model_of("mlp")
    with pytest.raises(TypeError, match=r"Expected a torch.optim.Optimizer first, .* got MLP"):
        ssdtrain.offload_optimizer(model, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LBFGS, which evaluates it repeatedly"):
        ssdtrain.offload_optimizer(torch.optim.LBFGS(model.parameters()), tmp_path)
    with pytest.raises(ValueError, match="differentiable=False"):
        ssdtrain.offload_optimizer(torch.optim.SGD(model.parameters(), differentiable=True), tmp_path)
    with pytest.raises(FileNotFoundError):
        ssdtrain.offload_optimizer(adamw(model.parameters()), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="Did you mean 'chunk_nbytes'"):
        ssdtrain.offload_optimizer(adamw(model.parameters()), tmp_path, {"chunk_bytes": 1})
    with pytest.raises(ValueError, match="on the meta device: load them first"):
        ssdtrain.offload_optimizer(adamw(nn.Linear(64, 64, device="meta").parameters()), tmp_path)
    optimizer = offloaded(adamw(model.parameters()), tmp_path)
    with pytest.raises(ValueError, match="not offloaded yet"):
        ssdtrain.offload_optimizer(optimizer, tmp_path)
    with pytest.raises(TypeError, match=r"optimizer.state_dict\(\)"):
        torch.save(optimizer, io.BytesIO())
    inner = adamw(model.parameters())
    assert ssdtrain.offload_optimizer(inner, tmp_path, {"enabled": False}) is inner


# -- a drive that fails ------------------------------------------------------------------------------------------------


def test_a_drive_that_is_too_small_says_so_before_training(small_ext4: Drive) -> None:
    """24 MiB of drive, 32 MiB of state: known from the optimizer's own step on a tiny parameter."""
    weight = nn.Parameter(torch.zeros(4 << 20))
    with pytest.raises(OSError, match=r"Expected room for 32.0 MiB of optimizer state") as caught:
        ssdtrain.offload_optimizer(adamw([weight]), small_ext4.directory, EAGER_STATE)
    assert caught.value.filename == str(small_ext4.directory)
    gc.collect()
    assert small_ext4.used_nbytes < 1 << 20


def test_a_drive_that_fills_up_keeps_state_in_memory(small_ext4: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost: training goes on in memory, and says so."""
    monkeypatch.setattr("ssdtrain.io.spill_space._SHARE", 1 << 20)  # no room is taken ahead
    plain, model = model_of("gpt"), model_of("gpt")
    losses = train(plain, adamw(plain.parameters()), 4)
    optimizer = offloaded(adamw(model.parameters()), small_ext4.directory)
    fill(small_ext4.directory)
    check_same(train(model, optimizer, 4), losses)
    assert any("no room on the drive" in text for text in optimizer.stats.fallbacks)


def test_a_lost_read_names_the_state_and_the_checkpoint(tmp_path: Path) -> None:
    """Bytes that the drive changed are found by their checksum. The error says what, where, and where to go back to."""
    model = model_of("mlp")
    optimizer = offloaded(adamw(model.parameters()), tmp_path, engine="threads")
    train(model, optimizer, 2)
    optimizer.state_dict()
    train(model, optimizer, 1, first=2)
    optimizer.flush()
    file = inside.store(optimizer).drive.files[0]
    with open(f"/proc/self/fd/{file.fd}", "r+b", buffering=0) as raw:
        for offset in range(0, file.nbytes, 4096):
            byte = os.pread(raw.fileno(), 1, offset + 8)
            os.pwrite(raw.fileno(), bytes([byte[0] ^ 1]), offset + 8)
    model(batch(3)).backward()
    with pytest.raises(
        ssdtrain.StateLostError, match=r"exp_avg\w* of parameter \d+ of group 0.*after step 2"
    ) as caught:
        optimizer.step()
    assert caught.value.filename == str(tmp_path)


def test_a_backward_that_raised(tmp_path: Path) -> None:
    """Nothing updated yet: zero_grad and the next batch are as plain. Something updated: only a checkpoint helps."""

    def fail(_: nn.Parameter) -> None:
        raise ValueError("in the middle")

    for chunk_nbytes in (1 << 20, 1):
        plain, model = model_of("mlp"), model_of("mlp")
        expected = adamw(plain.parameters())
        optimizer = offloaded(adamw(model.parameters()), tmp_path, step_in_backward=True, chunk_nbytes=chunk_nbytes)
        check_same(train(model, optimizer, 1), train(plain, expected, 1))
        saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        handle = model.blocks[1].up.weight.register_post_accumulate_grad_hook(fail)  # type: ignore[union-attr]
        with pytest.raises(ValueError, match="in the middle"):
            model(batch(1)).backward()
        handle.remove()
        if chunk_nbytes == 1:
            with pytest.raises(RuntimeError, match="interrupted: step 2"):
                optimizer.step()
            optimizer.zero_grad()
            with pytest.raises(RuntimeError, match="interrupted: step 2"):
                model(batch(1)).backward()
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        optimizer.zero_grad()
        check_same(train(model, optimizer, 2, first=1), train(plain, expected, 2, first=1))
        check_same(values(model), values(plain))
        optimizer.close()


def test_two_backwards_that_fill_no_chunk_are_an_error_too(tmp_path: Path) -> None:
    model = model_of("mlp")
    optimizer = offloaded(adamw(model.parameters()), tmp_path, step_in_backward=True, chunk_nbytes=1 << 20)
    model(batch(0)).backward()
    with pytest.raises(RuntimeError, match="one backward per step"):
        model(batch(1)).backward()
    optimizer.close()


def test_dropped_gradients_stay_dropped(tmp_path: Path) -> None:
    """A clip factor does not outlive zero_grad; one set by hand takes the place of another; close keeps them."""
    plain, model = model_of("mlp"), model_of("mlp")
    expected = adamw(plain.parameters())
    optimizer = offloaded(adamw(model.parameters()), tmp_path, offload_gradients=True)
    model(batch(7)).backward()
    optimizer.clip_grad_norm_(1e-6)
    optimizer.zero_grad()
    check_same(train(model, optimizer, 2), train(plain, expected, 2))
    for module, steps in ((model, optimizer), (plain, expected)):
        module(batch(2)).backward()
        module.blocks[0].up.weight.grad = torch.zeros_like(module.blocks[0].up.weight)  # type: ignore[union-attr,index]
        steps.step()
        steps.zero_grad()
        module(batch(3)).backward()
    check_same(values(model), values(plain))
    optimizer.close()
    check_same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_sparse_gradients(tmp_path: Path) -> None:
    """SparseAdam's state is dense and offloaded; its gradients stay."""

    def run(folder: Path | None, **policy: bool) -> torch.Tensor:
        torch.manual_seed(0)
        table = nn.Embedding(200, 16, sparse=True)
        optimizer: torch.optim.Optimizer = torch.optim.SparseAdam(table.parameters())
        if folder is not None:
            optimizer = offloaded(optimizer, folder, **policy)
        for step in range(4):
            table(torch.arange(step, step + 9)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return table.weight.detach()

    expected = run(None)
    for policy in ({}, {"step_in_backward": True}, {"offload_gradients": True}):
        check_same(run(tmp_path, **policy), expected)


def test_groups_that_users_change(tmp_path: Path) -> None:
    """A parameter appended to a group is updated from then on; one whose group is gone is not."""
    plain, model = model_of("mlp"), model_of("mlp")

    def run(module: nn.Module, folder: Path | None) -> None:
        blocks = list(module.blocks)  # type: ignore[arg-type]
        groups = [{"params": list(block.parameters())} for block in blocks[:3]]
        optimizer: torch.optim.Optimizer = adamw(groups)
        if folder is not None:
            optimizer = offloaded(optimizer, folder)
        train(module, optimizer, 2)
        optimizer.param_groups[0]["params"].extend(blocks[3].parameters())
        train(module, optimizer, 2, first=2)
        optimizer.param_groups.pop(1)
        train(module, optimizer, 2, first=4)

    run(plain, None)
    run(model, tmp_path)
    check_same(values(model), values(plain))


class Lookahead(torch.optim.SGD):
    """Keeps a copy for two steps, then does away with it."""

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "slow" in state:
                    p.data.lerp_(state.pop("slow"), 0.5)
                else:
                    state["slow"] = p.detach().clone()
        return found


def test_optimizers_of_others(tmp_path: Path) -> None:
    """State that comes and goes is followed."""
    plain, model = model_of("mlp"), model_of("mlp")
    losses = train(plain, Lookahead(plain.parameters(), lr=0.1), 6)
    check_same(train(model, offloaded(Lookahead(model.parameters(), lr=0.1), tmp_path), 6), losses)


def test_what_is_closed_or_replaced_says_so(tmp_path: Path) -> None:
    """Nothing stale is handed out, and the optimizer it was made of is not used by mistake; a second try works."""
    model = model_of("mlp")
    inner = adamw(model.parameters())
    with pytest.raises(FileNotFoundError):
        offloaded(inner, tmp_path / "nowhere")
    owner = ssdtrain.offload_parameters(model, tmp_path, EAGER_STATE)
    shared = ssdtrain.parameter_offload(owner)
    in_use = inside.space(shared.store).in_use_nbytes
    for _ in range(3):
        optimizer = ssdtrain.offload_optimizer(inner, shared, SMALL_CHUNKS)
        assert isinstance(optimizer, ssdtrain.OffloadedOptimizer)
        train(model, optimizer, 1)
        with pytest.raises(RuntimeError, match="what offload_optimizer"):
            inner.step()
        optimizer.close()
        optimizer.close()
        for call in (optimizer.step, optimizer.state_dict, optimizer.zero_grad, lambda o=optimizer: o.state):
            with pytest.raises(RuntimeError, match="after close"):
                call()
    shared.flush()
    assert inside.space(shared.store).in_use_nbytes <= in_use + 4096 * 8
    train(model, inner, 1)


def test_a_lost_read_at_the_end_loses_nothing_else(tmp_path: Path) -> None:
    """close() brings back what there is, then raises; a second one does nothing."""
    model = model_of("mlp")
    inner = adamw(model.parameters())
    optimizer = offloaded(inner, tmp_path, engine="threads")
    train(model, optimizer, 2)
    optimizer.flush()
    page = next(iter(optimizer._offloaded._entries.values()))["exp_avg"].leaves[0]
    file = inside.store(optimizer).drive.files[0]
    with open(f"/proc/self/fd/{file.fd}", "r+b", buffering=0) as raw:
        offset = page.record.segments[0].extent.offset
        os.pwrite(raw.fileno(), bytes([os.pread(raw.fileno(), 1, offset)[0] ^ 1]), offset)
    with pytest.raises(ssdtrain.StateLostError):
        optimizer.close()
    optimizer.close()
    assert sum(len(state) for state in inner.state.values()) == 3 * len(list(model.parameters())) - 1


def test_a_job_of_several_processes_is_refused_what_replicas_cannot_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are averaged after backward's hooks have seen them: replicas would drift apart."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    for mode in ("step_in_backward", "offload_gradients"):
        with pytest.raises(ValueError, match=f"Expected {mode}=False in a job of several processes"):
            offloaded(adamw(model_of("mlp").parameters()), tmp_path, **{mode: True})
    offloaded(adamw(model_of("mlp").parameters()), tmp_path).close()


def test_a_large_state_dict_holds_no_descriptors(tmp_path: Path) -> None:
    parameters = [nn.Parameter(torch.zeros(300)) for _ in range(80)]
    optimizer = offloaded(adamw(parameters), tmp_path)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    gc.collect()  # offloads of earlier tests, which have files
    before = len(os.listdir("/proc/self/fd"))
    state = optimizer.state_dict()
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(state["state"]) == 80 and [path.name for path in tmp_path.iterdir()] == []


class Failing(torch.optim.AdamW):
    """Fails in the middle of a step."""

    num_good = 0

    def step(self, closure: Any = None) -> Any:
        Failing.num_good -= 1
        if Failing.num_good < 0:
            raise KeyboardInterrupt
        return super().step(closure)


def test_an_interrupted_step_is_never_taken_for_a_whole_one(tmp_path: Path) -> None:
    """Some parameters are updated and others are not: no step and no checkpoint of that, until one is loaded."""
    plain, model = model_of("mlp"), model_of("mlp")
    expected = adamw(plain.parameters())
    first, rest = train(plain, expected, 2), train(plain, expected, 2, first=2)
    Failing.num_good = 10_000
    optimizer = offloaded(Failing(model.parameters(), lr=1e-2), tmp_path)
    check_same(train(model, optimizer, 2), first)
    model_state = values(model)
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    Failing.num_good = 2
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer, 1, first=2)
    for call in (optimizer.step, optimizer.state_dict):
        with pytest.raises(RuntimeError, match=r"interrupted: step 3.*after step 2"):
            call()
    Failing.num_good = 10_000
    optimizer.zero_grad()
    model.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    check_same(train(model, optimizer, 2, first=2), rest)


def test_a_state_dict_with_other_groups_changes_nothing(tmp_path: Path) -> None:
    model = model_of("mlp")
    optimizer = offloaded(adamw(model.parameters()), tmp_path)
    train(model, optimizer, 2)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match="group"):
        optimizer.load_state_dict(adamw(model_of("gpt").parameters()).state_dict())
    check_same_state(optimizer.state_dict(), before)
    train(model, optimizer, 1)


def test_full_drive_for_a_state_dict(small_ext4: Drive) -> None:
    model = model_of("mlp")
    optimizer = offloaded(adamw(model.parameters()), small_ext4.directory)
    train(model, optimizer, 2)
    fill(small_ext4.directory)
    with pytest.raises(OSError, match="of a state dict"):
        optimizer.state_dict()
    (Path(small_ext4.directory) / "filler").unlink()
    assert len(optimizer.state_dict()["state"]) == len(list(model.parameters()))
