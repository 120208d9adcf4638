"""Finds the repeated layers of a model: transformer blocks, residual blocks. Knows nothing of tensors or memory."""

from __future__ import annotations

from collections import Counter

import torch

_CONTAINERS = (torch.nn.ModuleList, torch.nn.Sequential, torch.nn.ModuleDict)


def find_blocks(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The model's blocks by name, in the order of its definition.

    A block is one of at least two layers of one class, made of other modules, in one container (``ModuleList``,
    ``Sequential``, ``ModuleDict``). The outermost count: experts inside a block are part of it. A model without any
    has none.

    Example:
        >>> list(find_blocks(gpt))
        ['blocks.0', 'blocks.1', 'blocks.2']
    """
    found: dict[str, torch.nn.Module] = {}
    _collect(model, "", found)
    return found


def _collect(module: torch.nn.Module, prefix: str, found: dict[str, torch.nn.Module]) -> None:
    repeated = _repeated(module) if isinstance(module, _CONTAINERS) else set()
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if type(child) in repeated:
            if not any(child is block for block in found.values()):
                found[path] = child
        else:
            _collect(child, f"{path}.", found)


def _repeated(container: torch.nn.Module) -> set[type[torch.nn.Module]]:
    """Classes that at least two composite children share."""
    composite = [child for child in container.children() if next(child.children(), None) is not None]
    counts = Counter(type(child) for child in composite if not isinstance(child, _CONTAINERS))
    return {kind for kind, count in counts.items() if count > 1}
