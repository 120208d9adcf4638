"""An optimizer's state as a whole, to be looked at, saved and loaded, although it is on the drive.

Knows the optimizer that does the arithmetic and the pages; not when it steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from ssdtrain.optimizer.inner import load_part
from ssdtrain.optimizer.state import Pages


class StateView(Mapping[torch.Tensor, dict[str, Any]]):
    """State by parameter, as copies in memory."""

    def __init__(self, optimizer: torch.optim.Optimizer, pages: Pages) -> None:
        """Looks at an optimizer and at its pages."""
        self._optimizer, self._pages = optimizer, pages

    def __getitem__(self, parameter: torch.Tensor) -> dict[str, Any]:
        """A parameter's state; empty while it has none."""
        found: dict[str, Any] = dict(self._optimizer.state.get(parameter, {}))
        return found | self._pages.copies(parameter)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Parameters with state."""
        return iter({**self._optimizer.state, **dict.fromkeys(self._pages)})

    def __len__(self) -> int:
        """How many those are."""
        return sum(1 for _ in self)


def whole_state_dict(optimizer: torch.optim.Optimizer, pages: Pages) -> dict[str, Any]:
    """The optimizer's own `state_dict`, with its pages in files that are mapped to memory."""
    resident = optimizer.state
    whole = {parameter: {**state, **pages.mapped(parameter)} for parameter, state in resident.items()}
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


def load_chunks(
    optimizer: torch.optim.Optimizer,
    entries: Mapping[Any, Any],
    groups: list[dict[str, Any]],
    chunks: Iterable[Mapping[torch.Tensor, Any]],
    send_away: Callable[[torch.Tensor], None],
    places: Mapping[torch.Tensor, torch.Tensor],
) -> None:
    """Loads the entries of some parameters after the other, and sends them away before the next ones come.

    `places`: see `load_part`.
    """
    kept = dict(optimizer.state)
    for chunk in chunks:
        load_part(optimizer, {key: entries[key] for key in chunk.values()}, groups, places)
        for parameter in chunk:
            send_away(parameter)
        kept |= dict(optimizer.state)
    optimizer.state = defaultdict(dict, kept)
