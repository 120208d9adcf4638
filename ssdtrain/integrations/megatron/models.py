"""What there is to know of Megatron's models and versions: settings that do not go together, weights."""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import Any

import torch

from ssdtrain.integrations import TESTED_VERSIONS, check_version

_CONFLICTS = MappingProxyType(
    {
        "cpu_offloading": "it moves the same activations",
        "fine_grained_activation_offloading": "it moves the same activations",
        "overlap_moe_expert_parallel_comm": "its schedule runs layers outside forward steps, where no hook sees them",
        "hybrid_context_parallel": "its schedule was not tested",
        "cuda_graph_impl": "replayed graphs save activations where no hook sees them",
    }
)
REFILLED = frozenset({"CheckpointWithoutOutputFunctionBackward"})
"""Megatron's output-discarding checkpoint empties the storages of what this node made, and fills them again in
backward: they are to be left alone."""


def require_megatron() -> None:
    """Megatron is there; a version the tests have not seen is said once."""
    try:
        version = importlib.import_module("megatron.core").__version__
    except ImportError as error:
        tested = TESTED_VERSIONS["megatron-core"][-1]
        raise ImportError(f"Expected megatron-core, got none; pip install megatron-core=={tested}") from error
    check_version("megatron-core", version)


def config_of(model: torch.nn.Module) -> Any:
    """The configuration that a model was made with."""
    return importlib.import_module("megatron.core.utils").get_model_config(model)


def check_model(model: torch.nn.Module) -> None:
    """Raises where its configuration does not go with offloading.

    Raises:
        ValueError: with the setting to turn off.
    """
    config = config_of(model)
    for name, why in _CONFLICTS.items():
        value = getattr(config, name, None)
        if value and value != "none":
            raise ValueError(f"Expected {name} off in the model's configuration, got {value!r}: {why}; use one of them")


def weights_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """What is never offloaded: parameters, buffers, and the gradients that Megatron keeps beside them."""
    buffers = torch.nn.Module.buffers(model)  # Megatron's DDP has a list of that name
    weights = [*model.parameters(), *buffers]
    return [*weights, *(w.main_grad for w in weights if hasattr(w, "main_grad"))]
