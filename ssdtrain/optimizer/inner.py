"""The optimizer that does the arithmetic: how much state it will have, its step for a few parameters.

Knows optimizers, and neither drives nor state that is away.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ssdtrain.optimizer.shared_values import copied
from ssdtrain.store.identity import why_not
from ssdtrain.store.value_frames import tensors_of

LOW_PRECISION = (torch.float16, torch.bfloat16)


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


def inner_step(optimizer: torch.optim.Optimizer) -> Any:
    """The optimizer's own step, without the hooks around it."""
    step: Any = type(optimizer).step
    return (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer)


def shadow_of(
    optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], attributes: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """One of the same kind and with the same settings, for a step of its own: other groups, no parameter's state."""
    shadow = object.__new__(type(optimizer))
    vars(shadow).update({**vars(optimizer), **attributes})
    shadow.state, shadow.param_groups = defaultdict(dict), groups
    shadow.state.update({k: copied(v) for k, v in optimizer.state.items() if not isinstance(k, torch.Tensor)})
    return shadow


@contextlib.contextmanager
def _replaced(optimizer: torch.optim.Optimizer, likes: Mapping[torch.Tensor, torch.Tensor]) -> Iterator[None]:
    """Inside, the optimizer has other parameters in the place of some, under which it files their state."""
    back = {like: parameter for parameter, like in likes.items()}
    for group in optimizer.param_groups:
        group["params"] = [likes.get(p, p) for p in group["params"]]
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            group["params"] = [back.get(p, p) for p in group["params"]]
        optimizer.state = defaultdict(dict, {back.get(key, key): value for key, value in optimizer.state.items()})


def load_part(
    optimizer: torch.optim.Optimizer,
    entries: Mapping[Any, Any],
    groups: list[dict[str, Any]],
    likes: Mapping[torch.Tensor, torch.Tensor],
) -> None:
    """`load_state_dict` of a part, without the hooks around it.

    `likes`: for some parameters, tensors of the device and dtype that their state is to be of. PyTorch copies state to
    another device, but takes what is there already as it is: then a step would change the caller's own `entries`.
    """
    hooks = {name: value for name, value in vars(optimizer).items() if name.startswith("_optimizer_load_state_dict_")}
    try:
        vars(optimizer).update({name: {} for name in hooks})
        with _replaced(optimizer, likes):
            optimizer.load_state_dict({"state": dict(entries), "param_groups": groups})
    finally:
        vars(optimizer).update(hooks)
    mappings = [entry for entry in entries.values() if isinstance(entry, Mapping)]  # some count for all parameters
    own = {id(value) for entry in mappings for value in entry.values()}
    for parameter in likes:
        state = optimizer.state.get(parameter, {})
        state.update({n: v.clone() for n, v in state.items() if isinstance(v, torch.Tensor) and id(v) in own})


def load_own_state(optimizer: torch.optim.Optimizer, likes: Mapping[torch.Tensor, torch.Tensor]) -> None:
    """Takes state of parameters that are in groups to the devices and dtypes that `load_state_dict` gives it.

    `likes`: see `load_part`.
    """
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    orphans = {key: s for key, s in optimizer.state.items() if isinstance(key, torch.Tensor) and id(key) not in own}
    for parameter in orphans:
        del optimizer.state[parameter]
    hooks = {name: value for name, value in vars(optimizer).items() if name.startswith("_optimizer_state_dict_")}
    try:
        vars(optimizer).update({name: {} for name in hooks})
        found = optimizer.state_dict()
    finally:
        vars(optimizer).update(hooks)
    load_part(optimizer, found["state"], found["param_groups"], likes)
    optimizer.state.update(orphans)


def predict_state_nbytes(optimizer: torch.optim.Optimizer, min_nbytes: int, *, has_masters: bool = False) -> int:
    """How much state there will be, found out on a tiny parameter; 0 when that cannot be told.

    `has_masters`: it is that of float32 copies of the parameters, which are part of it.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not parameters or not type(optimizer).__module__.startswith("torch.optim."):
        return 0
    first, state, groups = parameters[0], optimizer.state, optimizer.param_groups
    is_master = has_masters and first.dtype in LOW_PRECISION
    dtype = torch.float32 if is_master else first.dtype
    tiny = torch.nn.Parameter(torch.zeros(8, 8, dtype=dtype, device=first.device))
    tiny.grad = torch.zeros_like(tiny)
    try:
        optimizer.state, optimizer.param_groups = defaultdict(dict), [{**groups[0], "params": [tiny]}]
        inner_step(optimizer)
        found = [v.nbytes for v in optimizer.state[tiny].values() if isinstance(v, torch.Tensor) and v.numel() == 64]
    except (RuntimeError, ValueError, TypeError, KeyError):  # wants other gradients, or state from the beginning
        return 0
    finally:
        optimizer.state, optimizer.param_groups = state, groups
    num_elements: int = sum(p.numel() for p in parameters if p.nbytes >= min_nbytes)
    return num_elements * (sum(found) + is_master * tiny.nbytes) // 64


def what_stayed(optimizer: torch.optim.Optimizer, min_nbytes: int) -> dict[str, tuple[int, int]]:
    """How many tensors of state are in memory when all that may leave has left, and how many bytes, by reason."""
    found: dict[str, tuple[int, int]] = {}
    for value in tensors_of(list(optimizer.state.values())):
        nbytes = value.numel() * value.element_size()
        reason = "smaller than min_nbytes" if nbytes < max(1, min_nbytes) else why_not(value) or "no plain state"
        num, total = found.get(reason, (0, 0))
        found[reason] = num + 1, total + nbytes
    return found


@contextlib.contextmanager
def narrowed(
    optimizer: torch.optim.Optimizer, chosen: Mapping[int, list[torch.Tensor]], attributes: Mapping[str, Any]
) -> Iterator[None]:
    """Inside, the optimizer has these parameters, by group, and these attributes; its groups are copies."""
    groups = optimizer.param_groups
    with _having(optimizer, attributes):
        try:  # first: Ctrl-C must not leave it with one chunk
            optimizer.param_groups = parts_of(groups, chosen)
            yield
        finally:
            optimizer.param_groups = groups


@contextlib.contextmanager
def having_only(
    optimizer: torch.optim.Optimizer, chosen: Mapping[int, list[torch.Tensor]], attributes: Mapping[str, Any]
) -> Iterator[None]:
    """As `narrowed`, with the groups themselves: what is changed in them stays."""
    before = [(group, group["params"]) for group in optimizer.param_groups]
    with _having(optimizer, attributes):
        try:
            for i, (group, _) in enumerate(before):
                group["params"] = chosen.get(i, [])
            yield
        finally:
            for group, parameters in before:
                group["params"] = parameters


@contextlib.contextmanager
def _having(optimizer: torch.optim.Optimizer, attributes: Mapping[str, Any]) -> Iterator[None]:
    try:
        vars(optimizer).update(attributes)
        yield
    finally:
        for name in attributes:
            vars(optimizer).pop(name, None)


def parts_of(groups: list[dict[str, Any]], chosen: Mapping[int, list[torch.Tensor]]) -> list[dict[str, Any]]:
    """All groups, with no parameters but these, given by the index of their group."""
    return [{**group, "params": chosen.get(i, [])} for i, group in enumerate(groups)]
