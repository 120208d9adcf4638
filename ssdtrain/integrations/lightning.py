"""Lightning: a callback of its Trainer, and one of Fabric. With `SSDTRAIN_DIR` in the environment neither is written.

    SSDTRAIN_DIR=/mnt/nvme SSDTRAIN_OPTIMIZER=true python train.py
    trainer = Trainer(callbacks=[ssdtrain.integrations.lightning.Offload("/mnt/nvme", optimizer=True)])
    fabric = Fabric(callbacks=[ssdtrain.integrations.lightning.FabricOffload("/mnt/nvme")])

The entry points of this package give Lightning the callback that the environment asks for. Fabric tells its callbacks
of models, and of no exception: every forward of a module that `fabric.setup` returned is covered, and nothing else. Its
optimizer state is not offloaded: there `fabric.setup(model, ssdtrain.offload_optimizer(optimizer, "/mnt/nvme"))`.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ssdtrain.api.section import Section
from ssdtrain.api.session import Offload as Session
from ssdtrain.integrations import check_version, require

_NAME = next((name for name in ("lightning", "pytorch_lightning") if importlib.util.find_spec(name)), "lightning")
VERSION: str = require(_NAME, "pip install lightning==2.6.6").__version__
Callback: Any = importlib.import_module("lightning.pytorch" if _NAME == "lightning" else _NAME).Callback

__all__ = ["FabricOffload", "Offload", "callbacks_of_fabric", "callbacks_of_trainer"]


class Offload(Callback):  # type: ignore[misc]
    """Offloads what `ssdtrain.Offload`, which takes the same arguments, offloads; its `session` has the statistics."""

    def __init__(self, *directory: Any, **features: Any) -> None:
        """Opens nothing before training begins."""
        check_version(_NAME, VERSION)
        self.session = Session(*directory, **features)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """One is enough."""
        ours = [callback for callback in trainer.callbacks if isinstance(callback, Offload)]
        if len(ours) > 1:
            raise ValueError(f"Expected one ssdtrain callback, got {len(ours)}: remove one, or unset SSDTRAIN_DIR")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """All is prepared, and a checkpoint loaded."""
        strategy, loop = trainer.strategy, trainer.fit_loop
        given = list(strategy.optimizers)
        models = [strategy.model if strategy.model is not None else pl_module]
        offloaded = self.session.begin(models, *given, is_last=lambda: not loop._should_accumulate())
        if list(offloaded) != given:
            strategy.optimizers = list(offloaded)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """A forward comes next."""
        self.session.enter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Its backward is over, and perhaps a step."""
        self.session.leave()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Parameters and state stay on the drive, where the model can be saved and evaluated."""
        self.session.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Whatever was raised where."""
        self.session.leave()


class FabricOffload:
    """The same of Fabric, for activations and parameters."""

    def __init__(self, *directory: Any, **features: Any) -> None:
        """Opens nothing before a model is set up."""
        check_version(_NAME, VERSION)
        self.session = Session(*directory, **features)
        if self.session.section.optimizer is not None:
            raise ValueError("Expected no optimizer state with Fabric, got some: see ssdtrain.integrations.lightning")

    def on_after_setup(self, fabric: Any, module: Any) -> None:
        """Fabric has a model ready."""
        self.session.begin(module)
        self.session.cover(module)


def callbacks_of_trainer() -> list[Offload]:
    """What the environment asks for; for Lightning's entry point."""
    section = Section.from_environment()
    return [Offload(section)] if section is not None else []


def callbacks_of_fabric() -> list[FabricOffload]:
    """The same of Fabric."""
    section = Section.from_environment()
    return [FabricOffload(section)] if section is not None else []
