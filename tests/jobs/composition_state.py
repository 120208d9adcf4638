"""The table's rows of optimizer state and parameters that are offloaded."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from composition import Group, Way
from composition_eager import batch, grads, mean, mlp
from kept_state import Momentum
from state_tools import LoRA, trainable
from state_tools import batch as tokens
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

STATE = Group("Optimizer state and parameters")
NUM_STEPS = 3


def steps(model: nn.Module, optimizer: Any, *, has_grads: bool = True) -> list[Any]:
    """Losses, gradients if there are any, state and parameters."""
    found = []
    for step in range(NUM_STEPS):
        loss = mean(model, batch(step))
        loss.backward()
        found += [loss.detach(), *(grads(model) if has_grads else [])]
        optimizer.step()
        optimizer.zero_grad()
    state = [v.clone() for s in optimizer.state_dict()["state"].values() for v in s.values() if torch.is_tensor(v)]
    return [*found, *state, *[v.clone() for v in model.state_dict().values()]]


def paged(way: Way, kind: Any, *, has_grads: bool = True, **options: Any) -> list[Any]:
    model = mlp()
    return steps(model, way.optimizer(kind(model.parameters()), **options), has_grads=has_grads)


@STATE.row("AdamW")
def adamw(way: Way) -> Any:
    return paged(way, lambda p: torch.optim.AdamW(p, lr=1e-2))


@STATE.row("AdamW, fused")
def fused(way: Way) -> Any:
    return paged(way, lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True))


@STATE.row("AdamW with amsgrad")
def amsgrad(way: Way) -> Any:
    return paged(way, lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True))


@STATE.row("SGD with momentum")
def momentum(way: Way) -> Any:
    return paged(way, lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9))


@STATE.row("Adafactor, factored state")
def adafactor(way: Way) -> Any:
    return paged(way, lambda p: torch.optim.Adafactor(p, lr=1e-2), min_nbytes=64)


@STATE.row("Muon")
def muon(way: Way) -> Any:
    return paged(way, lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], lr=1e-2))


@STATE.row("AdamW, a step in backward")
def in_backward(way: Way) -> Any:
    return paged(way, lambda p: torch.optim.AdamW(p, lr=1e-2), has_grads=False, step_in_backward=True)


@STATE.row("AdamW, gradients offloaded too")
def gradients(way: Way) -> Any:
    return paged(way, lambda p: torch.optim.AdamW(p, lr=1e-2), has_grads=False, offload_gradients=True)


@STATE.row("AdamW, updates on the CPU")
def on_cpu(way: Way) -> Any:
    return paged(way, lambda p: torch.optim.AdamW(p, lr=1e-2), update_on="cpu")


@STATE.row("AdamW with a scheduler and clipping")
def scheduler(way: Way) -> Any:
    model = mlp()
    optimizer = way.optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    found = []
    for step in range(NUM_STEPS):
        mean(model, batch(step)).backward()
        found.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return found, [p.detach() for p in model.parameters()]


@STATE.row("a frozen base with small layers beside it (LoRA), and activations")
def lora(way: Way) -> Any:
    torch.manual_seed(0)
    model = LoRA()
    optimizer = way.optimizer(torch.optim.AdamW(trainable(model), lr=1e-2))
    return away(way, model, optimizer, way.activations(), lambda step: model(tokens(step)))


@STATE.row("momentum of a byte per element, in a tensor subclass")
def quantised(way: Way) -> Any:
    model, losses = mlp(), []
    optimizer = way.optimizer(Momentum(model.parameters(), "quantised"))
    for step in range(NUM_STEPS):
        losses += train(model, optimizer, range(step, step + 1))
        if way.folder is not None:
            optimizer.flush()  # so little is not yet on the drive when it is needed again
    return [*losses, *[value.clone() for value in model.state_dict().values()]]


@STATE.row("AdamW, saved and loaded (DCP)")
def adamw_saved(way: Way) -> Any:
    def make() -> Any:
        model = mlp()
        return model, way.optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))

    return resumed(make, train)


@STATE.row("parameters and AdamW, saved and loaded (DCP)")
def both_saved(way: Way) -> Any:
    def make() -> Any:
        model = mlp()
        owner = way.parameters(model)
        return model, way.optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), owner)

    return resumed(make, train)


@STATE.row("parameters")
def parameters(way: Way) -> Any:
    model = mlp()
    way.parameters(model)
    return away(way, model, torch.optim.SGD(model.parameters(), lr=1e-2))


@STATE.row("parameters and AdamW on one drive")
def both(way: Way) -> Any:
    model = mlp()
    owner = way.parameters(model)
    return away(way, model, way.optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), owner))


@STATE.row("parameters, AdamW and activations")
def three(way: Way) -> Any:
    model = mlp()
    owner = way.parameters(model)
    optimizer = way.optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), owner)
    return away(way, model, optimizer, way.activations())


@STATE.row("parameters, AdamW and checkpoints")
def with_checkpoints(way: Way) -> Any:
    model = mlp()
    owner = way.parameters(model)
    optimizer = way.optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), owner)

    def loss_of(step: int) -> torch.Tensor:
        x = batch(step)
        for block in model:
            x = way.checkpoint(block, x, use_reentrant=False)
        return x.square().mean()

    return away(way, model, optimizer, way.activations(), loss_of)


def away(way: Way, model: nn.Module, optimizer: Any, context: Any = None, loss_of: Any = None) -> list[Any]:
    """Losses and parameters; between uses those are away, so they are read from the model's state."""
    found = []
    for step in range(NUM_STEPS):
        with context or contextlib.nullcontext():
            loss = loss_of(step) if loss_of is not None else mean(model, batch(step))
            way.send()
            loss.backward()
        found.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return [*found, *[v.clone() for v in model.state_dict().values()]]


# -- checkpoints of training -------------------------------------------------------------------------------------------


def train(model: nn.Module, optimizer: Any, numbers: range) -> list[float]:
    losses = []
    for step in numbers:
        loss = mean(model, batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def resumed(make: Any, steps: Any) -> list[Any]:
    """Losses and parameters of training that is saved half way and goes on with another model and optimizer."""
    model, optimizer = make()
    losses = steps(model, optimizer, range(2))
    with common_folder() as folder:
        dcp.save(state_of(model, optimizer), checkpoint_id=folder)
        model, optimizer = make()
        state = state_of(model, optimizer)
        state["model"] = {name: value.clone() for name, value in state["model"].items()}  # to write to
        dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    losses += steps(model, optimizer, range(2, 4))
    return [*losses, *[value.clone() for value in model.state_dict().values()]]


def state_of(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


@contextlib.contextmanager
def common_folder() -> Iterator[str]:
    """One folder for all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        names = [folder]
        if dist.is_initialized():
            dist.broadcast_object_list(names)
        yield names[0]
        if dist.is_initialized():
            dist.barrier()
