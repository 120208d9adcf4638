"""What cannot be offloaded of an optimizer, and why: raised before anything is written.

Knows optimizers, their parameters and policies; moves nothing.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from ssdtrain.optimizer.trial.trial import Trial
from ssdtrain.parameters.offload import offloads_of
from ssdtrain.policy import OptimizerPolicy
from ssdtrain.stats import nbytes_text
from ssdtrain.store.identity import byte_range
from ssdtrain.store.state_store import StateStore


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raises when the optimizer cannot update a few parameters at a time."""
    name = type(optimizer).__name__
    if isinstance(optimizer, str | os.PathLike | torch.nn.Module):
        raise TypeError(f"Expected a torch.optim.Optimizer first, then the directory, got {name} in its place")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"Expected a torch.optim.Optimizer, got {name}: DeepSpeed and Megatron offload their own")
    if getattr(optimizer, "pages_parameters", False):
        raise ValueError("Expected an optimizer that is not offloaded yet, got one that is: call close() first")
    parameters = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    needed = [p.name for p in parameters if p.default is p.empty and p.kind in kinds]
    if "closure" in needed:
        raise ValueError(
            f"Expected an optimizer whose step needs no closure, got {name}, which evaluates it repeatedly"
        )
    if needed:
        raise ValueError(f"Expected an optimizer whose step needs no arguments, got {name}, which needs {needed[0]}")
    for attribute, value in vars(optimizer).items():
        if isinstance(value, torch.optim.Optimizer):
            raise ValueError(
                f"Expected an optimizer that does its own arithmetic, got {name}, which has {type(value).__name__} do "
                f"it, its {attribute!r}: offload that one, and make {name} of what offload_optimizer() returns"
            )
    if optimizer.defaults.get("differentiable"):
        raise ValueError(f"Expected differentiable=False, got {name} whose step autograd is to follow")


def check_trial(kind: type, trial: Trial, policy: OptimizerPolicy, state_nbytes: int) -> None:
    """Raises when an optimizer of this kind cannot be offloaded as the policy says.

    `state_nbytes`: how much state all parameters will have.
    """
    if trial.is_impossible:
        raise ValueError(
            f"Expected an optimizer whose state can leave memory between steps, got {kind.__name__}: {trial.reason}; "
            "use it without offload_optimizer"
        )
    mode = next((m for m in ("step_in_backward", "delayed_update") if getattr(policy, m)), None)
    if trial.draws and mode:
        raise ValueError(
            f"Expected {mode}=False with {kind.__name__}, whose step draws random numbers: parameters would be updated "
            "in another order, or beside others who draw, and get other numbers"
        )
    if not trial.is_together:
        return
    apart = f"{kind.__name__}, which cannot update parameters apart (in a trial on small tensors: {trial.reason})"
    if policy.step_in_backward:
        raise ValueError(f"Expected step_in_backward=False with {apart}, got {policy.step_in_backward!r}")
    if state_nbytes > policy.chunk_nbytes:
        raise ValueError(
            f"Expected chunk_nbytes of at least {nbytes_text(state_nbytes)}, all of the state, with {apart}, got "
            f"{nbytes_text(policy.chunk_nbytes)}: raise it, which has all state in memory during a step"
        )


def check_apart(names: Mapping[torch.Tensor, str]) -> None:
    """Raises when two parameters share memory: copies of each would be updated apart, and one update lost.

    Those that are offloaded have no memory while they are not used.
    """
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for parameter, name in names.items():
        if parameter.numel() == 0 or any(True for _ in offloads_of([parameter])):
            continue
        start, end = byte_range(parameter, parameter.nbytes)
        known = spans.setdefault(parameter.untyped_storage()._cdata, [])
        other = next((other for first, last, other in known if start < last and first < end), None)
        if other is not None:
            raise ValueError(
                f"Expected parameters with memory of their own with update_on='cpu', got {name} in that of {other}: "
                "tie them by using one parameter twice, or use update_on='device'"
            )
        known.append((start, end, name))


def check_alone(policy: OptimizerPolicy) -> None:
    """Replicas add up gradients after backward has computed them: too late for what happens in backward."""
    mode = next((m for m in ("step_in_backward", "offload_gradients") if getattr(policy, m)), None)
    if mode and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"Expected {mode}=False in a job of several processes, got True: gradients are averaged after it has "
            "taken them, and replicas would drift apart"
        )


def check_settings(policy: OptimizerPolicy, groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises when settings of a group do not go with the policy."""
    if policy.update_on == "cpu" and any(group.get("capturable") for group in groups):
        raise ValueError("Expected capturable=False with update_on='cpu', got True: the CPU captures no graph")


def check_devices(store: StateStore, groups: Iterable[Mapping[str, Any]], *, on_cpu: bool) -> None:
    """Parameters may be where nothing is offloaded from; `on_cpu`: their state is not there."""
    devices = store.devices()
    for parameter in [p for group in groups for p in group["params"] if not p.is_meta]:
        device = devices.of(parameter)
        if isinstance(device, str):
            where = "memory of the CPU or of CUDA" if store.directory else "memory of an accelerator"
            raise ValueError(f"Expected parameters in {where}, got {device}: pass another directory or device")
        if not on_cpu:
            store.check_engine(device)
