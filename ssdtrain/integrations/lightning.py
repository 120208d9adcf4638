"""Lightning: a callback of its Trainer, and one of Fabric. With `SSDTRAIN_DIR` in the environment neither is written.

    SSDTRAIN_DIR=/mnt/nvme SSDTRAIN_OPTIMIZER=true python train.py
    trainer = Trainer(callbacks=[ssdtrain.integrations.lightning.Offload("/mnt/nvme", optimizer=True)])
    fabric = Fabric(callbacks=[ssdtrain.integrations.lightning.FabricOffload("/mnt/nvme")])

Fabric: every forward of what `setup` returned is covered; `fabric.setup(model, ssdtrain.offload_optimizer(...))`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from ssdtrain.api.other_offloaders import check_loop
from ssdtrain.integrations import check_version, require
from ssdtrain.integrations.parts.callback import SessionCallback, the_only_one

_NAME = next((name for name in ("lightning", "pytorch_lightning") if importlib.util.find_spec(name)), "lightning")
VERSION: str = require(_NAME, "pip install lightning==2.6.6").__version__
Callback: Any = importlib.import_module("lightning.pytorch" if _NAME == "lightning" else _NAME).Callback

__all__ = ["FabricOffload", "Offload", "callbacks_of_fabric", "callbacks_of_trainer"]


class _OfLightning(SessionCallback):
    def __init__(self, *directory: Any, **features: Any) -> None:
        super().__init__(*directory, **features)
        check_version(_NAME, VERSION)


class Offload(_OfLightning, Callback):  # type: ignore[misc]
    """Offloads what `ssdtrain.Offload`, which takes the same arguments, offloads; its `session` has the statistics."""

    on_train_batch_start = SessionCallback.enter
    on_train_batch_end = on_exception = SessionCallback.leave
    on_train_end = SessionCallback.end

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """All is prepared, and a checkpoint loaded."""
        the_only_one(trainer.callbacks)
        clipped = {"gradient_clip_val": trainer.gradient_clip_val}
        check_loop(self.session.section.optimizer, 1, trainer.world_size > 1, clipped)
        strategy, loop = trainer.strategy, trainer.fit_loop
        given, model = strategy.optimizers, strategy.model if strategy.model is not None else pl_module
        offloaded = list(self.session.begin(model, *given, is_last=lambda: not loop._should_accumulate()))
        if offloaded != list(given):
            strategy.optimizers = offloaded


class FabricOffload(_OfLightning):
    """The same of Fabric, for activations and parameters."""

    def on_after_setup(self, fabric: Any, module: Any) -> None:
        """Fabric has a model ready."""
        the_only_one(fabric._callbacks)
        if self.session.section.optimizer is not None:
            raise ValueError("Expected no optimizer state with Fabric, got some: see ssdtrain.integrations.lightning")
        self.session.begin(module)
        self.session.cover(module)


callbacks_of_trainer, callbacks_of_fabric = Offload.of_environment, FabricOffload.of_environment  # entry points
