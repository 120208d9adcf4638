"""Spans in the traces of `torch.profiler`, with the name of what moves; nothing while no profiler is active."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.profiler import record_function

_NO_SPAN = contextlib.nullcontext()

is_profiled: Callable[[], bool] = torch.autograd._profiler_enabled  # type: ignore[attr-defined]


class Named(Protocol):
    """A record."""

    @property
    def name(self) -> str:
        """What messages call it."""


def span(what: str, of: Named | Callable[[], str]) -> contextlib.AbstractContextManager[Any]:
    """The span ``ssdtrain::offload``, ``reload``, ``wait`` or another, of a record or of what is called like that."""
    if not is_profiled():
        return _NO_SPAN
    return record_function(f"ssdtrain::{what} {of() if callable(of) else of.name}")


def named(names: Sequence[str]) -> str:
    """``"0.weight and 3 more"``."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
