"""Keeps what training holds in memory only to use it later on NVMe drives, and has it back in time.

Example:
    >>> with ssdtrain.offload_activations("/mnt/nvme") as offload:
    ...     for batch in loader:
    ...         model(batch).backward()
    ...         optimizer.step(); optimizer.zero_grad()
    >>> print(offload.stats)
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssdtrain.activations import ActivationOffload
    from ssdtrain.offloading import offload_activations
    from ssdtrain.policy import ActivationPolicy
    from ssdtrain.saving import keep_resident
    from ssdtrain.stats import Skipped, Stats

__version__ = "0.1.0"

__all__ = [
    "ActivationOffload",
    "ActivationPolicy",
    "Skipped",
    "Stats",
    "keep_resident",
    "offload_activations",
]

_HOMES = MappingProxyType(
    {
        "ActivationOffload": "activations",
        "ActivationPolicy": "policy",
        "Skipped": "stats",
        "Stats": "stats",
        "keep_resident": "saving",
        "offload_activations": "offloading",
    }
)


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used: commands that need no PyTorch do not wait seconds for it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
