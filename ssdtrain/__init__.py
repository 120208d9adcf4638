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
    from ssdtrain.activations.offload import ActivationOffload
    from ssdtrain.activations.recompute.checkpoint import checkpoint
    from ssdtrain.api.functions import offload_activations, offload_optimizer, offload_parameters, parameter_offload
    from ssdtrain.api.section import Section
    from ssdtrain.api.session import Offload
    from ssdtrain.optimizer.optimizer import OffloadedOptimizer
    from ssdtrain.parameters.offload import ParameterOffload
    from ssdtrain.parameters.safetensors import load_safetensors, save_safetensors
    from ssdtrain.policy import ActivationPolicy, OptimizerPolicy, ParameterPolicy
    from ssdtrain.state_stats import StateStats
    from ssdtrain.stats import Skipped, Stats
    from ssdtrain.store.saved_tensors import keep_resident
    from ssdtrain.store.state_store import StateLostError

__version__ = "0.2.0.dev0"

__all__ = [
    "ActivationOffload",
    "ActivationPolicy",
    "Offload",
    "OffloadedOptimizer",
    "OptimizerPolicy",
    "ParameterOffload",
    "ParameterPolicy",
    "Section",
    "Skipped",
    "StateLostError",
    "StateStats",
    "Stats",
    "checkpoint",
    "keep_resident",
    "load_safetensors",
    "offload_activations",
    "offload_optimizer",
    "offload_parameters",
    "parameter_offload",
    "save_safetensors",
]

_MODULES = MappingProxyType(
    {
        "ActivationOffload": "activations.offload",
        "ActivationPolicy": "policy",
        "Offload": "api.session",
        "OffloadedOptimizer": "optimizer.optimizer",
        "OptimizerPolicy": "policy",
        "ParameterOffload": "parameters.offload",
        "ParameterPolicy": "policy",
        "Section": "api.section",
        "Skipped": "stats",
        "StateLostError": "store.state_store",
        "StateStats": "state_stats",
        "Stats": "stats",
        "checkpoint": "activations.recompute.checkpoint",
        "keep_resident": "store.saved_tensors",
        "load_safetensors": "parameters.safetensors",
        "offload_activations": "api.functions",
        "offload_optimizer": "api.functions",
        "offload_parameters": "api.functions",
        "parameter_offload": "api.functions",
        "save_safetensors": "parameters.safetensors",
    }
)


if not TYPE_CHECKING:  # to checkers, a name that is not imported above is an error

    def __getattr__(name: str) -> object:
        """Imports a public name when it is first used: commands that need no PyTorch do not wait seconds for it."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        return value


def __dir__() -> list[str]:
    """What users are to see: no module and no helper."""
    return sorted([*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__", "__spec__", "__version__"])
