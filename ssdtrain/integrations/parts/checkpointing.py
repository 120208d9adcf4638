"""`use_checkpoint`: models of Transformers run our activation checkpoint. Knows the name of their attribute alone."""

from __future__ import annotations

import functools

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ssdtrain.activations.recompute.checkpoint import checkpoint


def use_checkpoint(model: torch.nn.Module) -> int:
    """Has a model whose activation checkpointing is on run `ssdtrain.checkpoint`: masks are offloaded too.

    To be called after `model.gradient_checkpointing_enable()`; `Offload` does so by itself. Layers that run something
    else than PyTorch's non-reentrant checkpoint stay as they are.

    Returns:
        How many modules it was changed in.

    Example:
        >>> model.gradient_checkpointing_enable()
        >>> ssdtrain.integrations.transformers.use_checkpoint(model)
    """
    num_changed = 0
    for module in model.modules():
        held = vars(module).get("_gradient_checkpointing_func")
        if not isinstance(held, functools.partial) or held.func is not torch_checkpoint or held.args:
            continue
        if held.keywords.get("use_reentrant") is False:
            vars(module)["_gradient_checkpointing_func"] = functools.partial(checkpoint, **held.keywords)
            num_changed += 1
    return num_changed
