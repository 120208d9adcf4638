"""A shadow of an optimizer: the same kind and settings, with small tensors in the place of its parameters.

Knows optimizers; changes neither them nor their parameters.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ssdtrain.optimizer.shared_values import is_of_others

_NUM_OF_A_KIND = 2
_MAX_SHADOWS = 16

Like = Callable[[torch.Tensor], torch.Tensor]
"""For a parameter, an empty tensor of the device and dtype that it is updated in."""
StateOf = Callable[[torch.Tensor], Mapping[str, Any]]
"""A parameter's state, wherever it is."""


@dataclass
class Shadow:
    """A shadow optimizer and the small tensors that it updates, with the index of the group of each."""

    optimizer: torch.optim.Optimizer
    group_of: dict[torch.Tensor, int]

    @property
    def with_gradients(self) -> list[torch.Tensor]:
        """Its parameters that have a gradient in this step."""
        return [parameter for parameter in self.group_of if parameter.grad is not None]

    def by_group(self, parameters: list[torch.Tensor]) -> dict[int, list[torch.Tensor]]:
        """Some of them by the index of their group."""
        found: dict[int, list[torch.Tensor]] = {}
        for parameter in parameters:
            found.setdefault(self.group_of[parameter], []).append(parameter)
        return found


def make_shadow(optimizer: torch.optim.Optimizer, like: Like, state_of: StateOf, cap: int) -> Shadow:
    """A shadow, with small tensors, at most `cap` long in any dimension, in the place of parameters."""
    chosen = _Chosen(like, state_of, cap)
    for group in optimizer.param_groups:
        chosen.add_group(group)
    memo = chosen.memo
    shadow = object.__new__(type(optimizer))
    memo[id(optimizer)] = shadow
    own = {name: value for name, value in vars(optimizer).items() if not is_of_others(name)}
    vars(shadow).update({n: {} if n.endswith("_hooks") else v for n, v in vars(optimizer).items() if n not in own})
    vars(shadow).pop("step", None)
    vars(shadow).update({name: _copied(value, memo) for name, value in own.items()})
    shadow.param_groups = [{**_copied(settings, memo), "params": small} for settings, small in chosen.groups]
    _bring_settings(shadow)
    shadow.state = defaultdict(dict)
    for key, value in optimizer.state.items():
        if not isinstance(key, torch.Tensor):
            shadow.state[key] = _copied(value, memo)
    for parameter, state in chosen.states.items():
        if state is not None:
            shadow.state[parameter] = _copied(state, memo)
    return Shadow(shadow, chosen.group_of)


def _bring_settings(shadow: torch.optim.Optimizer) -> None:
    """Rates in tensors are where the small parameters are: those of an accelerator may be updated in host memory."""
    to_host = partial(tree_map_only, torch.Tensor, torch.Tensor.cpu)
    for group in shadow.param_groups:
        if all([parameter.is_cpu for parameter in group["params"]]):
            group.update(to_host({key: value for key, value in group.items() if key != "params"}))
    if all([parameter.is_cpu for group in shadow.param_groups for parameter in group["params"]]):
        shadow.defaults = to_host(shadow.defaults)


class _Chosen:
    """Which small tensors stand for which parameters: a few of every kind."""

    def __init__(self, like: Like, state_of: StateOf, cap: int) -> None:
        self.memo: dict[int, Any] = {}  # by the identity of a parameter what stands for it, as `copy.deepcopy` has it
        self.groups: list[tuple[dict[str, Any], list[torch.Tensor]]] = []
        self.group_of: dict[torch.Tensor, int] = {}
        self.states: dict[torch.Tensor, dict[str, Any] | None] = {}
        self._like, self._state_of, self._cap = like, state_of, cap
        self._generator = torch.Generator().manual_seed(1)
        self._num_of_kind: dict[str, int] = {}

    def add_group(self, group: dict[str, Any]) -> None:
        """Goes through the parameters of another group."""
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        kind = repr([(key, _kind_of_setting(value)) for key, value in settings.items()])
        self._num_of_kind[kind] = self._num_of_kind.get(kind, 0) + 1
        is_shadowed = self._num_of_kind[kind] <= _NUM_OF_A_KIND
        small: list[torch.Tensor] = []
        for parameter in group["params"]:
            self._add(parameter, small, is_shadowed=is_shadowed)
        if is_shadowed:
            self.groups.append((settings, small))

    def _add(self, parameter: torch.Tensor, small: list[torch.Tensor], *, is_shadowed: bool) -> None:
        like = self._like(parameter)
        same_kind = [p for p in small if p.dim() == parameter.dim() and p.dtype == like.dtype]
        are_many = len(self.group_of) >= _MAX_SHADOWS and len(small) >= _NUM_OF_A_KIND
        if are_many or len(same_kind) >= _NUM_OF_A_KIND or not is_shadowed or not _may_train(parameter):
            self.memo[id(parameter)] = same_kind[-1] if same_kind else next(iter(self.group_of), None)
            return
        found = _shadow_parameter(parameter, like, self._cap, self._generator)
        self.memo[id(parameter)] = found
        small.append(found)
        self.group_of[found] = len(self.groups)
        self.states[found] = _state_for(found, parameter, self._state_of(parameter))


def _kind_of_setting(value: Any) -> Any:
    """What of a group's setting may take an optimizer another way: 0 often means that something is off."""
    if isinstance(value, bool | str):
        return value
    return (type(value), bool(value)) if isinstance(value, int | float) else type(value)


def _may_train(parameter: torch.Tensor) -> bool:
    """Whether it has or may later get a gradient: what is frozen now may be thawed."""
    is_plain = type(parameter.data) is torch.Tensor and (parameter.is_floating_point() or parameter.is_complex())
    return parameter.requires_grad or (is_plain and not parameter.is_meta)


def _shadow_parameter(
    parameter: torch.Tensor, like: torch.Tensor, cap: int, generator: torch.Generator
) -> torch.Tensor:
    """A small tensor of as many dimensions, the longest of which is the longest of the parameter."""
    sizes = sorted(set(parameter.shape))
    short = max(2, cap // 3 if parameter.dim() > 2 else 2 * cap // 3)
    shape = [min(size, cap if size == sizes[-1] else short) for size in parameter.shape]
    values = torch.randn(shape, generator=generator).to(like.device, like.dtype)
    shadow_parameter = torch.nn.Parameter(values)
    vars(shadow_parameter).update({k: v for k, v in vars(parameter).items() if not k.startswith("_")})
    return shadow_parameter


def _state_for(
    shadow_parameter: torch.Tensor, parameter: torch.Tensor, state: Mapping[str, Any]
) -> dict[str, Any] | None:
    """A parameter's state, for a tensor of another size; None where nobody can tell how."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and type(value) is not torch.Tensor:
            return None
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            value = value[tuple(slice(size) for size in shadow_parameter.shape)]
            value = value.detach().to(shadow_parameter.device if value.device == parameter.device else value.device)
        elif isinstance(value, dict | list | tuple) or (isinstance(value, torch.Tensor) and value.numel() > 1):
            return None
        found[key] = value
    return found or None


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy whose parameters are the small ones; modules and what cannot be copied stay the same objects."""
    if isinstance(value, torch.nn.Module):
        return value
    if isinstance(value, dict):
        found = copy.copy(value)
        found.clear()
        found.update({_copied(k, memo): _copied(v, memo) for k, v in value.items()})
        return found
    if type(value) in (list, tuple, set):
        return type(value)([_copied(entry, memo) for entry in value])
    if isinstance(value, torch.Tensor) and id(value) not in memo:
        return value.detach().clone()
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        return value
