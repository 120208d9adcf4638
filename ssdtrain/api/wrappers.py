"""Optimizers inside the wrappers that trainers put round them: found, and replaced where they are.

Knows the wrappers by name and imports none of the trainers.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch

_INSIDE = MappingProxyType(
    {"AcceleratedOptimizer": "optimizer", "LightningOptimizer": "_optimizer", "_FabricOptimizer": "_optimizer"}
)
"""By wrapper: the attribute that has the optimizer."""


def unwrap(optimizer: Any) -> Any:
    """The optimizer that does the work."""
    name = _inside(optimizer)
    return unwrap(getattr(optimizer, name)) if name else optimizer


def rewrap(optimizer: Any, inner: torch.optim.Optimizer) -> Any:
    """Puts `inner` where `unwrap(optimizer)` is; returns what is to be used from now on.

    That is the wrapper, which is the same object, or `inner` where there is none.
    """
    name = _inside(optimizer)
    if not name:
        return inner
    setattr(optimizer, name, rewrap(getattr(optimizer, name), inner))
    if getattr(optimizer, "scaler", None) is not None and hasattr(optimizer, "_optimizer_patched_step_method"):
        optimizer.__setstate__({})  # Accelerate's way to make its step for a GradScaler anew
    return optimizer


def _inside(optimizer: Any) -> str | None:
    return next((_INSIDE[kind.__name__] for kind in type(optimizer).__mro__ if kind.__name__ in _INSIDE), None)
