"""Hugging Face's Trainer, and with it TRL, PEFT and sentence-transformers: a callback.

    trainer = Trainer(model, args, callbacks=[ssdtrain.integrations.transformers.Offload("/mnt/nvme", optimizer=True)])

Callbacks hear of no exception: the import has `Trainer.train` leave their hooks however it ends, and changes no more.
"""

from __future__ import annotations

from typing import Any

from ssdtrain.api.other_offloaders import check_loop
from ssdtrain.integrations import check_version, require
from ssdtrain.integrations.parts.callback import SessionCallback, add_to_all, leave_after
from ssdtrain.integrations.parts.checkpointing import use_checkpoint

transformers: Any = require("transformers", "pip install transformers==5.24.0 accelerate==1.15.0")
accelerate: Any = require("accelerate", "pip install accelerate==1.15.0")
logger: Any = transformers.utils.logging.get_logger(__name__)

__all__ = ["Offload", "install", "install_everywhere", "use_checkpoint"]


class Offload(SessionCallback, transformers.TrainerCallback):  # type: ignore[misc]
    """Offloads what `ssdtrain.Offload`, which takes the same arguments, offloads; its `session` has the statistics."""

    on_step_begin = SessionCallback.enter  # the step's other micro-batches find the hooks on
    on_pre_optimizer_step = SessionCallback.leave
    on_train_end = SessionCallback.end

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All is prepared, and a checkpoint loaded."""
        model, optimizer, gradients = kwargs["model"], kwargs["optimizer"], accelerate.state.GradientState()
        use_checkpoint(model)
        several = args.parallel_mode.value == "distributed"
        check_loop(self.session.section.optimizer, args.n_gpu, several, {"max_grad_norm": args.max_grad_norm})
        trl = {"activation_offloading": getattr(args, "activation_offloading", False)}
        self.session.begin(model, optimizer, is_last=lambda: gradients.sync_gradients, switches=trl, reads_norms=True)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says what happened since the last time."""
        line = self.session.progress() if state.is_local_process_zero else ""
        if line:
            logger.info("ssdtrain: step=%d: %s", state.global_step, line)


def install() -> None:
    """Has hooks left when training raises; done by the import, and nothing to do a second time."""
    leave_after(transformers.Trainer, "train", lambda trainer: trainer.callback_handler.callbacks)


def install_everywhere() -> None:
    """Gives every Trainer that has no such callback the one that the environment asks for; for `ssdtrain.launch`."""
    add_to_all(transformers.Trainer, Offload, lambda trainer: trainer.callback_handler.callbacks)


check_version("transformers")
install()
