"""What an optimizer's step does with a closure, found out on throw-away tensors before anything changes.

Knows optimizers; neither drives nor where state is.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ssdtrain.optimizer.inner import shadow_of

_MAX_ELEMENTS = 4096  # of tensors an optimizer keeps for itself


def check_closure(optimizer: torch.optim.Optimizer) -> None:
    """Raises when `step(closure)` is not the same as `closure()` and then `step()`, which is what happens here.

    Raises:
        ValueError: the optimizer evaluates the closure several times, not at all, or after it has changed parameters.
    """
    if type(optimizer).__module__.startswith("torch.optim."):
        return
    try:
        expected, found = _step(optimizer, is_inside=False), _step(optimizer, is_inside=True)
    except Exception as error:
        why = f"whose step on small tensors raised {type(error).__name__}: {error}"
    else:
        if len(found) == len(expected) and all(map(torch.equal, found, expected)):
            return
        why = "whose step with one does more than evaluate it once before the update"
    raise ValueError(
        f"Expected an optimizer that evaluates a closure once, before it updates, got {type(optimizer).__name__}, "
        f"{why}; nothing has changed yet: call backward() and step() without a closure, or use it without offload"
    )


@torch.no_grad()
def _step(optimizer: torch.optim.Optimizer, *, is_inside: bool) -> list[torch.Tensor]:
    """What parameters were when the closure was evaluated, each time, and what they are in the end."""
    parameters = _shadow_parameters(optimizer)
    groups = [{**_own(g), "params": [p]} for g, p in zip(optimizer.param_groups, parameters, strict=True)]
    shadow = shadow_of(optimizer, groups, _own(vars(optimizer)))
    step: Any = type(optimizer).step
    step = step.__wrapped__ if getattr(step, "hooked", False) else step
    seen: list[torch.Tensor] = []

    def closure() -> torch.Tensor:
        seen.extend(parameter.detach().clone() for parameter in parameters)
        for parameter in parameters:
            parameter.grad = parameter.detach() * 0.5 + 0.1
        return torch.tensor(1.0)

    with torch.random.fork_rng(devices=[]):
        if not is_inside:
            closure()
        step(shadow, *([closure] if is_inside else []))
    return [*seen, *(parameter.detach() for parameter in parameters)]


def _shadow_parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """A small one for each group."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    values = [torch.randn(8, 8, generator=generator, device="cpu") for _ in optimizer.param_groups]
    likes = [next(iter(group["params"]), values[0]) for group in optimizer.param_groups]
    return [torch.nn.Parameter(v.to(like.device, like.dtype)) for v, like in zip(values, likes, strict=True)]


def _own(values: dict[str, Any]) -> dict[str, Any]:
    """Copies of what a step may change in place, but for what is large."""
    names = [name for name in values if name not in ("params", "param_groups", "state") and not name.endswith("_hooks")]
    return {name: copy.deepcopy(values[name]) if _is_small(values[name]) else values[name] for name in names}


def _is_small(value: Any) -> bool:
    is_data = isinstance(value, dict | list | torch.Tensor)
    return is_data and all(x.numel() <= _MAX_ELEMENTS for x in tree_leaves(value) if isinstance(x, torch.Tensor))
