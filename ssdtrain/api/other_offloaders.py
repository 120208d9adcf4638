"""What does not go together with what is asked, found before training. Imports no trainer and no other offloader.

Of two offloaders both would move the same bytes, and hooks of the inner one win. A gradient that `step_in_backward` has
used can be neither averaged over processes nor clipped; threads other than the one that entered have no hooks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch.nn.parallel import DistributedDataParallel

from ssdtrain.policy import OptimizerPolicy
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
    for patched in (torch_checkpoint.checkpoint, torch_checkpoint.CheckpointFunction):
        if "unsloth" in _name(patched).lower():
            raise _unsloth(patched)
    hooks = innermost_hooks()
    if hooks is not None and _name(hooks[0]).endswith(("save_on_cpu.__init__.<locals>.pack_to_cpu", ".pack_tensor")):
        raise _two(f"a context of {_name(hooks[0])} round training", "leave it out")


def check_replicas(models: Iterable[torch.nn.Module], optimizer: OptimizerPolicy | None) -> None:
    """Raises where a model runs in other threads, or averages gradients that were used.

    Raises:
        ValueError: with the launcher to use instead.
    """
    for model in models:
        if isinstance(model, DistributedDataParallel) and optimizer is not None and optimizer.step_in_backward:
            raise ValueError(
                "Expected step_in_backward=False with DistributedDataParallel, got True: gradients are averaged after "
                "it has taken them; start a single process without torchrun"
            )
        if isinstance(model, torch.nn.DataParallel) and len(model.device_ids) > 1:
            raise ValueError(
                "Expected one process for each GPU, got DataParallel, which runs forward in threads of its own: start "
                "with torchrun, or show the process one GPU (CUDA_VISIBLE_DEVICES=0)"
            )


def check_loop(
    optimizer: OptimizerPolicy | None, num_gpus: int, is_distributed: bool, max_norm: Mapping[str, float | None]
) -> None:
    """Raises where a trainer's settings do not go with what is asked.

    Args:
        optimizer: how optimizer state is offloaded, if it is.
        num_gpus: those of this process; with several the trainer takes DataParallel.
        is_distributed: there are several processes, or may be.
        max_norm: the trainer's setting for clipping, by name; 0 or None where it is off.

    Raises:
        ValueError: with the launcher or the setting to use instead.
    """
    if num_gpus > 1:
        raise ValueError(
            f"Expected one process for each GPU, got DataParallel on {num_gpus} GPUs, which runs forward in threads "
            "of its own: start with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES=0"
        )
    if optimizer is None or not optimizer.step_in_backward:
        return
    if is_distributed:
        raise ValueError(
            "Expected step_in_backward=False in a job of several processes or one that torchrun started, got True: "
            "gradients are averaged after it has taken them"
        )
    for name, value in max_norm.items():
        if value:
            raise ValueError(
                f"Expected {name}=0 with step_in_backward, got {value}: clipping needs all gradients before the first "
                "update; use offload_gradients instead"
            )


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
        return _unsloth(function)
    if name.endswith("_activation_checkpointing_enable.<locals>.checkpoint_func"):
        return _two("activation_checkpointing_kwargs={'offload': True}", "turn 'offload' off; checkpointing may stay")
    return None


def _unsloth(function: object) -> ValueError:
    """It puts its own in the place of PyTorch's, also where a model holds on to what calls those."""
    what_to_do = "pass use_gradient_checkpointing=True instead of 'unsloth'; in LLaMA-Factory, use_unsloth_gc: false"
    return _two(f"checkpointing by {_name(function)}", what_to_do)


def _two(found: str, what_to_do: str) -> ValueError:
    return ValueError(f"Expected one that offloads activations, got {found} beside ssdtrain: {what_to_do}")


def _name(function: object) -> str:
    """Of a class method, with the class that it is called on."""
    owner = getattr(function, "__self__", None)
    own = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    return f"{owner.__qualname__}: {own}" if isinstance(owner, type) else own
