"""Spans in the traces of `torch.profiler`, with the name of what moves; nothing while no profiler is active."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch
from torch.profiler import record_function

_NO_SPAN = contextlib.nullcontext()


class Named(Protocol):
    """A record."""

    @property
    def name(self) -> str:
        """What messages call it."""


def span(what: str, record: Named) -> contextlib.AbstractContextManager[Any]:
    """The span ``ssdtrain::offload``, ``reload`` or ``wait``, of a record."""
    if not torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        return _NO_SPAN
    return record_function(f"ssdtrain::{what} {record.name}")
