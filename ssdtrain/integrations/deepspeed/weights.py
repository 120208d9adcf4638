"""Which storages are those of weights, also where they come and go.

[Note: ZeRO-3]
Between forward and backward a parameter has no memory: its `data` is replaced by an empty tensor, and by a fresh one,
part of a buffer with its neighbours, each time it is gathered. A saved parameter is therefore kept as the parameter
itself (see `ssdtrain.activations.offload`), and every gathered storage is marked as a weight's when a module is
about to run.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ssdtrain.activations.offload import ActivationOffload


class Weights:
    """Those of one engine, which is not kept."""

    def __init__(self, engine: Any, activations: ActivationOffload) -> None:
        """Marks nothing yet."""
        self._engine = weakref.ref(engine)
        self._activations = activations
        self._hooks: list[Any] = []

    def watch(self) -> None:
        """Marks those of a module whenever it is about to run, where they are gathered for that.

        The hooks run after DeepSpeed's own, which were there first and gather the module's parameters.
        """
        engine: Any = self._engine()
        if not engine.zero_optimization_partition_weights():
            return
        self._activations.mark_weights(list(engine.module.buffers()))
        for module in engine.module.modules():
            if next(module.parameters(recurse=False), None) is not None:
                self._hooks.append(module.register_forward_pre_hook(self._mark))

    def _mark(self, module: torch.nn.Module, args: object) -> None:
        self._activations.mark_weights(list(module.parameters(recurse=False)))

    def mark(self) -> None:
        """Marks all there are, where none comes and goes."""
        engine: Any = self._engine()
        if engine is not None and not self._hooks:
            self._activations.mark_weights([*engine.module.parameters(), *engine.module.buffers()])

    def forget(self) -> None:
        """Removes all hooks."""
        while self._hooks:
            self._hooks.pop().remove()
