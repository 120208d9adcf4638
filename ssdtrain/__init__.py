"""Keeps saved activations, parameters and optimizer state on NVMe drives or in pinned host memory while unused.

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
    from ssdtrain.activations.recompute.checkpoint import checkpoint
    from ssdtrain.api.functions import offload_activations, offload_optimizer, offload_parameters, parameter_offload
    from ssdtrain.api.session import Offload
    from ssdtrain.api.types import ActivationOffload as ActivationOffload
    from ssdtrain.api.types import OffloadedOptimizer as OffloadedOptimizer
    from ssdtrain.api.types import ParameterOffload as ParameterOffload
    from ssdtrain.api.types import Section as Section
    from ssdtrain.api.types import Skipped as Skipped
    from ssdtrain.api.types import StateLostError as StateLostError
    from ssdtrain.api.types import StateStats as StateStats
    from ssdtrain.api.types import Stats as Stats
    from ssdtrain.parameters.safetensors import load_safetensors, save_safetensors
    from ssdtrain.policy import ActivationPolicy, OptimizerPolicy, ParameterPolicy
    from ssdtrain.store.saved_tensors import keep_resident

__version__ = "0.2.0.dev0"

__all__ = [
    "ActivationPolicy",
    "Offload",
    "OptimizerPolicy",
    "ParameterPolicy",
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
        "ActivationPolicy": "policy",
        "Offload": "api.session",
        "OptimizerPolicy": "policy",
        "ParameterPolicy": "policy",
        "checkpoint": "activations.recompute.checkpoint",
        "keep_resident": "store.saved_tensors",
        "load_safetensors": "parameters.safetensors",
        "offload_activations": "api.functions",
        "offload_optimizer": "api.functions",
        "offload_parameters": "api.functions",
        "parameter_offload": "api.functions",
        "save_safetensors": "parameters.safetensors",
        # What these return and raise: shown by `ssdtrain.api.types`.
        "ActivationOffload": "api.types",
        "OffloadedOptimizer": "api.types",
        "ParameterOffload": "api.types",
        "Section": "api.types",
        "Skipped": "api.types",
        "StateLostError": "api.types",
        "StateStats": "api.types",
        "Stats": "api.types",
    }
)


if not TYPE_CHECKING:  # to checkers, a name that is not imported above is an error

    def __getattr__(name: str) -> object:
        """Imports a public name when it is first used: commands that need no PyTorch do not wait seconds for it."""
        if name not in _MODULES:
            hint = ": import ssdtrain.integrations.transformers, or the one that you use" * (name == "integrations")
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        return value


def __dir__() -> list[str]:
    """What users are to see: no module and no helper."""
    return sorted([*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__", "__spec__", "__version__"])
