"""An optimizer's state as a whole, saved and loaded, although it is on the drive.

Knows the optimizer that does the arithmetic and where its state is; not when it steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ssdtrain.optimizer.inner import load_part
from ssdtrain.optimizer.state import OffloadedState


def whole_state_dict(optimizer: torch.optim.Optimizer, offloaded: OffloadedState) -> dict[str, Any]:
    """The optimizer's own `state_dict`, with what is on the drive in files that are mapped to memory."""
    resident = optimizer.state
    whole = dict(resident)
    for parameter in offloaded:
        whole[parameter] = {**resident.get(parameter, {}), **offloaded.mapped(parameter)}
    try:
        optimizer.state = defaultdict(dict, whole)
        found: dict[str, Any] = optimizer.state_dict()
    finally:
        optimizer.state = resident
    return found


def parameters_with_entries(
    parameters: Iterable[torch.Tensor], entries: Mapping[Any, Any], groups: list[dict[str, Any]]
) -> dict[torch.Tensor, Any]:
    """Those of `parameters`, in the order of the groups, that a state dict has entries for, and under which key."""
    ids = [i for group in groups for i in group["params"]]
    return {parameter: i for i, parameter in zip(ids, parameters, strict=True) if i in entries}


def loads_apart(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `load_state_dict` takes the entries of a few parameters; what others make of it may want all of them."""
    return type(optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict


def load_chunks(
    optimizer: torch.optim.Optimizer,
    entries: Mapping[Any, Any],
    groups: list[dict[str, Any]],
    chunks: Iterable[Mapping[torch.Tensor, Any]],
    offload: Callable[[torch.Tensor], None],
    likes: Mapping[torch.Tensor, torch.Tensor],
) -> None:
    """Loads the entries of some parameters after the other, and sends them away before the next ones come.

    `likes`: see `load_part`.
    """
    kept = dict(optimizer.state)
    for chunk in chunks:
        load_part(optimizer, {key: entries[key] for key in chunk.values()}, groups, likes)
        for parameter in chunk:
            offload(parameter)
        kept |= {parameter: optimizer.state[parameter] for parameter in chunk}  # others may have been looked up
    optimizer.state = defaultdict(dict, kept)
