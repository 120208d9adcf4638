"""The optimizer that does the arithmetic: may it be paged, how much state it will have, its step for a few parameters.

Knows optimizers, and neither drives nor pages.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch


def check(optimizer: torch.optim.Optimizer) -> None:
    """Raises when the optimizer cannot update a few parameters at a time."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"Expected a torch.optim.Optimizer, got {name}: DeepSpeed and Megatron offload their own")
    if getattr(optimizer, "pages_parameters", False):
        raise ValueError("Expected an optimizer that is not offloaded yet, got one that is: call close() first")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"Expected an optimizer whose step needs no closure, got {name}, which evaluates it repeatedly"
        )
    if optimizer.defaults.get("differentiable"):
        raise ValueError(f"Expected differentiable=False, got {name} whose step autograd is to follow")


def take_over(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Lets nobody else use the optimizer by mistake; what is returned undoes that."""

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Expected step() of what offload_optimizer() returned, got the optimizer it was made of")

    refuse._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # schedulers that were made with it look for it
    own = vars(optimizer)
    before = {name: own[name] for name in ("step",) if name in own}
    own["step"] = refuse
    own["pages_parameters"] = True  # its own step may run hooks of all optimizers

    def release() -> None:
        for name in ("step", "pages_parameters"):
            own.pop(name, None)
        own.update(before)

    return release


def plain_step(optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's own step, without the hooks around it."""
    step: Any = type(optimizer).step
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer)


def load_part(optimizer: torch.optim.Optimizer, entries: Mapping[Any, Any], groups: list[dict[str, Any]]) -> None:
    """`load_state_dict` of a part, without the hooks around it."""
    hooks = {name: value for name, value in vars(optimizer).items() if name.startswith("_optimizer_load_state_dict_")}
    try:
        vars(optimizer).update({name: {} for name in hooks})
        optimizer.load_state_dict({"state": dict(entries), "param_groups": groups})
    finally:
        vars(optimizer).update(hooks)


def predict_state_nbytes(optimizer: torch.optim.Optimizer, min_nbytes: int) -> int:
    """How much state there will be, found out on a tiny parameter; 0 when that cannot be told."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not parameters or not type(optimizer).__module__.startswith("torch.optim."):
        return 0
    first, state, groups = parameters[0], optimizer.state, optimizer.param_groups
    tiny = torch.nn.Parameter(torch.zeros(8, 8, dtype=first.dtype, device=first.device))
    tiny.grad = torch.zeros_like(tiny)
    try:
        optimizer.state, optimizer.param_groups = defaultdict(dict), [{**groups[0], "params": [tiny]}]
        plain_step(optimizer)
        found = [v.nbytes for v in optimizer.state[tiny].values() if isinstance(v, torch.Tensor) and v.numel() == 64]
    except (RuntimeError, ValueError, TypeError):  # wants other gradients
        return 0
    finally:
        optimizer.state, optimizer.param_groups = state, groups
    num_elements: int = sum(p.numel() for p in parameters if p.nbytes >= min_nbytes)
    return num_elements * sum(found) // 64


@contextlib.contextmanager
def narrowed(
    optimizer: torch.optim.Optimizer, chosen: Mapping[int, list[torch.Tensor]], attributes: Mapping[str, Any]
) -> Iterator[None]:
    """Inside, the optimizer has these parameters, by group, and these attributes.

    Raises:
        RuntimeError: it changed more than the state of its parameters.
    """
    groups = optimizer.param_groups
    parts = {i: {**groups[i], "params": parameters} for i, parameters in sorted(chosen.items())}
    vars(optimizer).update(attributes)
    before = _beside_parameters(optimizer)
    optimizer.param_groups = list(parts.values())
    try:
        yield
        after = _beside_parameters(optimizer)
        is_changed = any(after.get(key) != value for key, value in before.items()) or any(
            isinstance(key, tuple) and key not in before for key in after
        )
        is_changed = is_changed or any(_has_changed(groups[i], part) for i, part in parts.items())
    finally:
        optimizer.param_groups = groups
        for name in attributes:
            delattr(optimizer, name)
    if is_changed:
        raise RuntimeError(
            f"Expected an optimizer that keeps its state by parameter, got {type(optimizer).__name__}, which changes "
            "its own attributes or groups in a step: it cannot update a few parameters at a time"
        )


def _beside_parameters(optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
    """Numbers and tensors an optimizer keeps beside the state of its parameters. Flags are no state."""
    own = {name: value for name, value in vars(optimizer).items() if name not in ("state", "param_groups")}
    shared = {("state", key): value for key, value in optimizer.state.items() if not isinstance(key, torch.Tensor)}
    return {key: _fingerprint(value) for key, value in (own | shared).items() if _is_counting(value)}


def _is_counting(value: Any) -> bool:
    return isinstance(value, int | float | torch.Tensor | dict | list | tuple) and not isinstance(value, bool)


def _fingerprint(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return id(value), value._version
    if isinstance(value, dict | list | tuple):
        entries = value.values() if isinstance(value, dict) else value
        return len(value), [_fingerprint(e) for e in entries if isinstance(e, int | float | torch.Tensor)]
    return value


def _has_changed(group: Mapping[str, Any], part: Mapping[str, Any]) -> bool:
    return part.keys() != group.keys() or any(part[key] is not group[key] for key in group if key != "params")
