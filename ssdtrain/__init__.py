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
    from ssdtrain.offloading import offload_activations, offload_optimizer, offload_parameters, parameter_offload
    from ssdtrain.optimizer import OffloadedOptimizer
    from ssdtrain.parameter_files import load_safetensors, save_safetensors
    from ssdtrain.parameters import ParameterOffload
    from ssdtrain.policy import ActivationPolicy, OptimizerPolicy, ParameterPolicy
    from ssdtrain.saving import keep_resident
    from ssdtrain.state_stats import StateStats
    from ssdtrain.stats import Skipped, Stats
    from ssdtrain.vault import StateLostError

__version__ = "0.1.0"

__all__ = [
    "ActivationOffload",
    "ActivationPolicy",
    "OffloadedOptimizer",
    "OptimizerPolicy",
    "ParameterOffload",
    "ParameterPolicy",
    "Skipped",
    "StateLostError",
    "StateStats",
    "Stats",
    "keep_resident",
    "load_safetensors",
    "offload_activations",
    "offload_optimizer",
    "offload_parameters",
    "parameter_offload",
    "save_safetensors",
]

_HOMES = MappingProxyType(
    {
        "ActivationOffload": "activations",
        "ActivationPolicy": "policy",
        "OffloadedOptimizer": "optimizer",
        "OptimizerPolicy": "policy",
        "ParameterOffload": "parameters",
        "ParameterPolicy": "policy",
        "Skipped": "stats",
        "StateLostError": "vault",
        "StateStats": "state_stats",
        "Stats": "stats",
        "keep_resident": "saving",
        "load_safetensors": "parameter_files",
        "offload_activations": "offloading",
        "offload_optimizer": "offloading",
        "offload_parameters": "offloading",
        "parameter_offload": "offloading",
        "save_safetensors": "parameter_files",
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
