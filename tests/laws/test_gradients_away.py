"""Whoever reads or changes a gradient that is on the drive has it, as without offload; one that was used says so."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from state_tools import EAGER_STATE, adamw, batch, check_same, check_same_state, grad_nbytes, model_of, values
from torch import nn
from torch.nn.utils import (
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
    parameters_to_vector,
)

import ssdtrain

POLICY = EAGER_STATE | {"chunk_nbytes": 40_000}


def offloaded(optimizer: torch.optim.Optimizer, folder: Path, **policy: Any) -> ssdtrain.OffloadedOptimizer:
    found = ssdtrain.offload_optimizer(optimizer, folder, POLICY | policy)
    assert isinstance(found, ssdtrain.OffloadedOptimizer)
    return found


def grads_of(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def with_total_norm(parameters: list[nn.Parameter]) -> Any:
    norm = get_total_norm(grads_of(parameters), norm_type=3.0)
    clip_grads_with_norm_(parameters, 0.01, norm)
    return norm


def logged_by_hand(parameters: list[nn.Parameter]) -> Any:
    grads = grads_of(parameters)
    return [
        sum(p.grad.data.norm(2).item() ** 2 for p in parameters if p.grad is not None) ** 0.5,
        torch.stack([grad.abs().max() for grad in grads]),
        parameters_to_vector(grads),
        [grad.detach().float().cpu().mean() for grad in grads],
        torch.cat([grad.view(-1) for grad in grads]).norm(),
    ]


def checked_for_nan(parameters: list[nn.Parameter]) -> Any:
    is_good = [bool(torch.isfinite(grad).all()) and not grad.isnan().any() for grad in grads_of(parameters)]
    if parameters[0].grad.norm() > 0:  # type: ignore[union-attr]
        parameters[0].grad = None
    return is_good


def changed_in_place(parameters: list[nn.Parameter]) -> Any:
    """By operators that look at other tensors, in parts, through `data` and through views."""
    for i, grad in enumerate(grads_of(parameters)):
        grad.add_(parameters[i], alpha=0.1).sub_(grad.mean())
        grad[0] = 0.5
        grad[grad.abs() < 1e-4] = 0.0
        grad.data.mul_(2.0)
        grad.view(-1)[1:3].zero_()
        grad.data /= 3
    torch._foreach_add_(grads_of(parameters), 0.25)
    torch._foreach_lerp_(grads_of(parameters), [p.detach() for p in parameters], 0.1)


def scaled_often(parameters: list[nn.Parameter]) -> Any:
    """What is only noted, in an order that matters; its factor changes after it was used."""
    factor = torch.tensor(0.5)
    for grad in grads_of(parameters):
        grad.mul_(factor).clamp_(-0.01, 0.01).div_(3).mul_(7)
    factor.fill_(100.0)
    norm = clip_grad_norm_(parameters, 0.02, norm_type=1.0)
    for grad in grads_of(parameters):
        for _ in range(12):
            grad.mul_(1.1)
        with pytest.raises(RuntimeError):
            grad.mul_(1j)
    return norm


def with_another_optimizer(parameters: list[nn.Parameter]) -> Any:
    torch.optim.SGD(parameters[:3], lr=0.01, momentum=0.9).step()
    torch.optim.AdamW(parameters[2:5], lr=0.01, fused=True).step()


def projected(parameters: list[nn.Parameter]) -> Any:
    """Gradients of one task are kept, those of another computed, and their sum set."""
    first = grads_of(parameters)
    for parameter in parameters:
        parameter.grad = None
    torch.stack([p.square().sum() for p in parameters]).sum().backward()
    second = grads_of(parameters)
    for parameter, a, b in zip(parameters, first, second, strict=True):
        parameter.grad = a if (a * b).sum() > 0 else a - b
    return [(a * b).sum() for a, b in zip(first, second, strict=True)]


def without_operators(parameters: list[nn.Parameter]) -> Any:
    file = io.BytesIO()
    torch.save(grads_of(parameters), file)
    file.seek(0)
    grad = parameters[0].grad
    assert grad is not None
    copied = copy.deepcopy(grad)
    grad.numpy()[0, 0] = 0.75  # shares memory
    grad.untyped_storage()[7] = 60
    found = [torch.load(file), copied, grad.tolist(), repr(grad), f"{grad.sum():.4f}", grad.data_ptr() != 0]
    grad.data = torch.full_like(grad, 0.1)
    return found


USES: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "2-norm": lambda p: clip_grad_norm_(p, 0.01),
    "maximum": lambda p: clip_grad_norm_(p, 0.001, norm_type=float("inf")),
    "foreach": lambda p: clip_grad_norm_(p, 0.01, foreach=True),
    "one by one": lambda p: clip_grad_norm_(p, 0.01, error_if_nonfinite=True, foreach=False),
    "some": lambda p: [clip_grad_norm_(p[::2], 0.01), clip_grad_norm_(p[1], 0.01)],
    "values": lambda p: clip_grad_value_(p, 1e-4),
    "values, foreach": lambda p: clip_grad_value_(p, 1e-4, foreach=True),
    "total norm": with_total_norm,
    "by hand": logged_by_hand,
    "NaN": checked_for_nan,
    "in place": changed_in_place,
    "often": scaled_often,
    "another optimizer": with_another_optimizer,
    "projected": projected,
    "without operators": without_operators,
}


def run(optimizer: torch.optim.Optimizer, model: nn.Module, use: Callable[[list[nn.Parameter]], Any]) -> list[Any]:
    """Two steps, each of two backwards; what was seen between backward and step, and after it."""
    seen = []
    for step in range(2):
        model(batch(2 * step)).backward()
        model(batch(2 * step + 1)).backward()
        seen.append(use(list(model.parameters())))
        optimizer.step()
        seen.append([grad.sum() for grad in grads_of(list(model.parameters()))])
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("name", USES)
def test_gradients_on_the_drive_are_there_for_everybody(name: str, tmp_path: Path) -> None:
    """Norm 0.0 and nothing clipped: so it was for whoever looked for gradients where there were none."""
    plain, model = model_of("mlp"), model_of("mlp")
    expected = adamw(plain.parameters())
    optimizer = offloaded(adamw(model.parameters()), tmp_path, offload_gradients=True)
    check_same(run(optimizer, model, USES[name]), run(expected, plain, USES[name]))
    check_same(values(model), values(plain))
    check_same_state(optimizer.state_dict(), expected.state_dict())
    optimizer.close()


def test_a_cast_between_backward_and_step(tmp_path: Path) -> None:
    """`Module.double()` replaces gradients as well, by way of `data`."""

    def go(model: nn.Module, make: Callable[[torch.optim.Optimizer], torch.optim.Optimizer]) -> list[torch.Tensor]:
        optimizer = make(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        model(batch(0)).backward()
        model.double()
        assert {p.grad.dtype for p in model.parameters()} == {torch.float64}  # type: ignore[union-attr]
        optimizer.step()
        model(batch(1).double()).backward()
        return list(model.parameters())

    found = go(model_of("mlp"), lambda o: offloaded(o, tmp_path, offload_gradients=True))
    check_same(found, go(model_of("mlp"), lambda o: o))


def test_clipping_moves_nothing_and_holds_nothing(tmp_path: Path) -> None:
    model = model_of("mlp")
    optimizer = offloaded(adamw(model.parameters()), tmp_path, offload_gradients=True)
    model(batch(0)).backward()
    optimizer.flush()
    before = optimizer.stats
    clip_grad_norm_(model.parameters(), 0.01)
    clip_grad_value_(model.parameters(), 0.01)
    after = optimizer.stats
    assert (after.read_nbytes, after.written_nbytes) == (before.read_nbytes, before.written_nbytes)
    clip_grad_norm_(model.parameters(), 0.01, norm_type=1.0)  # has to be read
    assert optimizer.stats.read_nbytes > before.read_nbytes and grad_nbytes(model) == 0
    optimizer.close()


def test_space_of_dropped_gradients_is_given_back(tmp_path: Path) -> None:
    """Whoever drops them: the optimizer, the model, or a loop over parameters. What somebody keeps stays."""
    model = model_of("mlp")
    optimizer = offloaded(torch.optim.SGD(model.parameters(), lr=0.1), tmp_path, offload_gradients=True)
    in_use, grads, expected = list[int](), list[torch.Tensor](), torch.zeros(())
    for drop in (optimizer.zero_grad, model.zero_grad, lambda: [setattr(p, "grad", None) for p in model.parameters()]):
        model(batch(0)).backward()
        if not grads:
            grads.append(model.blocks[0].up.weight.grad)  # type: ignore[union-attr]
            expected = grads[0].clone()
        drop()
        optimizer.zero_grad()
        optimizer.flush()
        optimizer.zero_grad()  # of what was being read or written
        in_use.append(inside.space(optimizer.store).in_use_nbytes)
    # The one that is kept, in whole blocks, and one that may be of a read that has not been accounted for.
    assert max(in_use) <= 2 * (expected.nbytes + 4096)
    check_same(grads[0] + 0, expected)
    optimizer.close()
    check_same(grads[0] + 0, expected)  # also without the drive


def test_gradients_are_zeros_where_they_are_zeroed(tmp_path: Path) -> None:
    """A parameter with a gradient of zeros is updated, by its momentum and its decay; one without is not."""

    def go(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        model(batch(0)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        model(batch(1)).backward()
        optimizer.step()
        model(batch(2)).backward()  # not zeroed: the sum of both

        optimizer.step()

    plain, model = model_of("moe"), model_of("moe")
    go(adamw(plain.parameters()), plain)
    go(offloaded(adamw(model.parameters()), tmp_path, offload_gradients=True), model)
    check_same(values(model), values(plain))


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("is_clipped", [False, True])
def test_grad_scaler(options: dict[str, bool], is_clipped: bool, tmp_path: Path) -> None:
    """It looks for infinities in the gradients, and divides them; fused optimizers divide in their step."""

    def go(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[float]:
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        for step in range(5):
            loss = model(batch(step) * (float("inf") if step == 3 else 1.0))
            scaler.scale(loss).backward()
            if is_clipped:
                scaler.unscale_(optimizer)
                clip_grad_norm_(model.parameters(), 0.01)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return [scaler.get_scale()]

    plain, model = model_of("mlp"), model_of("mlp")
    optimizer = offloaded(adamw(model.parameters(), **options), tmp_path, offload_gradients=True)
    check_same(go(optimizer, model), go(adamw(plain.parameters(), **options), plain))
    check_same(values(model), values(plain))


def test_hooks_after_backward(tmp_path: Path) -> None:
    """Those of a parameter, registered before ours and after, and those of the optimizer's step."""

    def halve(parameter: nn.Parameter) -> None:
        parameter.grad.mul_(0.5)  # type: ignore[union-attr]

    def go(model: nn.Module, make: Callable[[torch.optim.Optimizer], torch.optim.Optimizer]) -> list[Any]:
        seen: list[Any] = []
        weight = model.blocks[1].up.weight  # type: ignore[union-attr]
        weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm()))
        optimizer = make(adamw(model.parameters()))
        weight.register_post_accumulate_grad_hook(halve)
        optimizer.register_step_pre_hook(lambda *_: seen.append(clip_grad_norm_(model.parameters(), 0.01)))
        optimizer.register_step_post_hook(lambda *_: seen.append(weight.grad.abs().sum()))
        return [run(optimizer, model, lambda _: None), seen, values(model)]

    found = go(model_of("mlp"), lambda o: offloaded(o, tmp_path, offload_gradients=True))
    check_same(found, go(model_of("mlp"), lambda o: o))


def test_a_clip_over_several_optimizers(tmp_path: Path) -> None:
    def go(model: nn.Module, folder: Path | None) -> list[Any]:
        parts: list[torch.optim.Optimizer] = [adamw(block.parameters()) for block in model.blocks]  # type: ignore[union-attr]
        if folder is not None:
            parts[:2] = [offloaded(part, folder, offload_gradients=True) for part in parts[:2]]
        seen = []
        for step in range(3):
            model(batch(step)).backward()
            seen.append(clip_grad_norm_(model.parameters(), 0.01))
            for part in parts:
                part.step()
                part.zero_grad()
        return [seen, values(model)]

    check_same(go(model_of("mlp"), tmp_path), go(model_of("mlp"), None))


@pytest.mark.needs_package("accelerate")
def test_accelerate(tmp_path: Path) -> None:
    """It clips what it was given to prepare; HF's Trainer clips with it."""
    accelerate = importlib.import_module("accelerate")

    def go(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, optimizer)
        norms = []
        for step in range(4):
            accelerator.backward(model(batch(step)))
            if step % 2:
                accelerator.clip_grad_value_(model.parameters(), 1e-3)
            else:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.01))
            optimizer.step()
            optimizer.zero_grad()
        return [norms, values(model)]

    plain, model, late = model_of("mlp"), model_of("mlp"), model_of("mlp")
    optimizer = offloaded(adamw(model.parameters()), tmp_path, offload_gradients=True)
    check_same(go(model, optimizer), go(plain, adamw(plain.parameters())))
    with pytest.raises(RuntimeError, match="used and freed"):
        go(late, offloaded(adamw(late.parameters()), tmp_path, step_in_backward=True))


@pytest.mark.parametrize("how", ["offload_gradients", "step_in_backward"])
def test_what_stands_for_gradients_keeps_nothing_alive(how: str, tmp_path: Path) -> None:
    """A gradient that knew its parameter would keep the model in memory: nobody sees through `parameter.grad`."""
    model = model_of("mlp")
    optimizer = offloaded(adamw(model.parameters()), tmp_path, **{how: True})
    for step in range(2):
        model(batch(step)).backward()
        optimizer.step()
        if not step:
            optimizer.zero_grad()
    parameters = [weakref.ref(p) for p in model.parameters()]
    del model, optimizer
    gc.collect()
    assert not any(parameter() is not None for parameter in parameters)


# -- gradients that were used ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in USES if name != "projected"])
def test_gradients_that_were_used_say_so(name: str, tmp_path: Path) -> None:
    """With step_in_backward the parameters are updated: no norm of 0.0, and nobody who thinks they were clipped."""
    model = model_of("mlp")
    optimizer = offloaded(adamw(model.parameters()), tmp_path, step_in_backward=True, chunk_nbytes=1)
    for is_stepped in (False, True):
        model(batch(0)).backward()
        if is_stepped:
            optimizer.step()
        with pytest.raises(RuntimeError, match=r"step_in_backward has used and freed: .* with offload_gradients"):
            USES[name](list(model.parameters()))
        if not is_stepped:
            optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
    optimizer.close()


def test_a_model_is_cast_and_moved_whatever_was_used(tmp_path: Path) -> None:
    """`Module.to()` takes gradients along; there is nothing to take, and nothing to refuse."""
    model = model_of("mlp")
    optimizer = offloaded(adamw(model.parameters()), tmp_path, step_in_backward=True, chunk_nbytes=1)
    model(batch(0)).backward()
    optimizer.step()
    expected = values(model)
    copied = copy.deepcopy(model)
    model.double()
    check_same({key: value.float() for key, value in values(model).items()}, expected)
    check_same(values(copied), expected)
    with pytest.raises(RuntimeError, match="used and freed"):
        clip_grad_norm_(model.parameters(), 1.0)
    optimizer.zero_grad()
    model.float()
    model(batch(1)).backward()
    optimizer.step()
    optimizer.close()


def test_gradients_that_wait_for_a_full_chunk_are_used_by_then(tmp_path: Path) -> None:
    """Some are updated and others are not: a norm over both is an error, too."""
    model = model_of("mlp")
    optimizer = offloaded(adamw(model.parameters()), tmp_path, step_in_backward=True, chunk_nbytes=100_000)
    model(batch(0)).backward()
    assert grad_nbytes(model) > 0
    with pytest.raises(RuntimeError, match="used and freed"):
        clip_grad_norm_(model.parameters(), 1.0)
    optimizer.close()


def test_a_step_that_is_not_taken_is_an_error(tmp_path: Path) -> None:
    """A loop skips a step whose loss is NaN: too late, and said at once. So are gradients that are not dropped."""
    model = model_of("mlp")
    optimizer = offloaded(adamw(model.parameters()), tmp_path, step_in_backward=True, chunk_nbytes=1)
    model(batch(0)).backward()
    with pytest.raises(RuntimeError, match=r"Expected step\(\) after a backward .* got zero_grad\(\)"):
        optimizer.zero_grad()
    optimizer.step()
    before = values(model)
    with pytest.raises(RuntimeError, match=r"Expected zero_grad\(\) after step\(\)"):
        model(batch(1)).backward()
    with pytest.raises(RuntimeError, match="set_to_none=True"):
        optimizer.zero_grad(set_to_none=False)
    check_same(values(model), before)
    optimizer.zero_grad()
    model(batch(1)).backward()
    optimizer.step()
    optimizer.close()
    assert all(p.grad is None for p in model.parameters())
