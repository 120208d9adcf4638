"""Other offloaders beside ours, found before training: two would move the same bytes, and hooks of the inner one win.

Knows what they leave on a model, and imports none of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ssdtrain.store.saved_tensors import innermost_hooks

_WRAPPERS = {"OffloadWrapper": "activation_checkpointing_offload of the FSDP plugin"}


def check_others(models: Iterable[torch.nn.Module], switches: Mapping[str, object]) -> None:
    """Raises where somebody else moves saved activations too.

    Args:
        models: what is to be trained.
        switches: settings of a trainer that turn its own offloading on, by the name that its users write.

    Raises:
        ValueError: one is on; the message has the switch to turn off.
    """
    for name, value in switches.items():
        if value:
            raise _two(f"{name}={value!r}", f"turn {name} off")
    for model in models:
        for module in model.modules():
            found = _on_module(module)
            if found is not None:
                raise found
    hooks = innermost_hooks()
    if hooks is not None and _name(hooks[0]).endswith(("save_on_cpu.__init__.<locals>.pack_to_cpu", ".pack_tensor")):
        raise _two(f"a context of {_name(hooks[0])} round training", "leave it out")


def _on_module(module: torch.nn.Module) -> ValueError | None:
    for kind in type(module).__mro__:
        if kind.__name__ in _WRAPPERS:
            return _two(f"{kind.__name__} round a layer", f"turn {_WRAPPERS[kind.__name__]} off")
    function: Any = getattr(module, "_gradient_checkpointing_func", None)
    while isinstance(function, functools.partial):
        function = function.func
    if function is None:
        return None
    name = _name(function)
    if "unsloth" in name.lower():
        return _two(f"checkpointing by {name}", "pass use_gradient_checkpointing=True instead of 'unsloth'")
    if name.endswith("_activation_checkpointing_enable.<locals>.checkpoint_func"):
        return _two("activation_checkpointing_kwargs={'offload': True}", "turn 'offload' off; checkpointing may stay")
    return None


def _two(found: str, what_to_do: str) -> ValueError:
    return ValueError(f"Expected one that offloads activations, got {found} beside ssdtrain: {what_to_do}")


def _name(function: object) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
