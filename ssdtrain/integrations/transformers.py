"""Hugging Face's Trainer, and with it TRL, PEFT and sentence-transformers: a callback.

    trainer = Trainer(model, args, callbacks=[ssdtrain.integrations.transformers.Offload("/mnt/nvme", optimizer=True)])

[Note: when a step raises]
Callbacks hear of no exception. The import has `Trainer.train` look at its callbacks first, and leave their hooks
however it ends; nothing else of it is changed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ssdtrain.activations.recompute.checkpoint import checkpoint
from ssdtrain.api.session import Offload as Session
from ssdtrain.integrations import check_version, require

transformers: Any = require("transformers", "pip install transformers==5.24.0 accelerate==1.15.0")
accelerate: Any = require("accelerate", "pip install accelerate==1.15.0")
logger: Any = transformers.utils.logging.get_logger(__name__)

__all__ = ["Offload", "use_checkpoint"]


class Offload(transformers.TrainerCallback):  # type: ignore[misc]
    """Offloads what `ssdtrain.Offload`, which takes the same arguments, offloads; its `session` has the statistics."""

    def __init__(self, *directory: Any, **features: Any) -> None:
        """Opens nothing before training begins."""
        self.session = Session(*directory, **features)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All is prepared, and a checkpoint loaded."""
        use_checkpoint(kwargs["model"])
        _check(args, self.session)
        gradients = accelerate.state.GradientState()
        switches = {"activation_offloading": getattr(args, "activation_offloading", False)}  # TRL's
        self.session.begin(
            kwargs["model"],
            kwargs["optimizer"],
            is_last=lambda: gradients.sync_gradients,
            switches=switches,
            reads_norms=True,
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first forward of a step comes next; those of its other micro-batches find the hooks on."""
        self.session.enter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All backwards of the step are over."""
        self.session.leave()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says what happened since the last time."""
        line = self.session.progress() if state.is_local_process_zero else ""
        if line:
            logger.info("ssdtrain: step=%d: %s", state.global_step, line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Parameters and state stay on the drive, where the model can be saved and evaluated."""
        self.session.end()


def use_checkpoint(model: torch.nn.Module) -> int:
    """Has a model whose activation checkpointing is on run `ssdtrain.checkpoint`: masks and positions travel too.

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


def _check(args: Any, session: Session) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"Expected one process for each GPU, got DataParallel on {args.n_gpu} GPUs, which runs forward in threads "
            "of its own: start with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES=0"
        )
    optimizer = session.section.optimizer
    if optimizer is None or not optimizer.step_in_backward:
        return
    if args.parallel_mode.value == "distributed":
        raise ValueError(
            "Expected step_in_backward=False in a job of several processes or one that torchrun started, got True: "
            "gradients are averaged after it has taken them"
        )
    if args.max_grad_norm:
        raise ValueError(
            f"Expected max_grad_norm=0 with step_in_backward, got {args.max_grad_norm}: clipping needs all gradients "
            "before the first update; use offload_gradients instead"
        )


def install() -> None:
    """See [Note: when a step raises]; done by the import, and nothing to do a second time."""
    train = transformers.Trainer.train
    if hasattr(train, "_ssdtrain_original"):
        return

    @functools.wraps(train)
    def train_and_leave(self: Any, *args: Any, **kwargs: Any) -> Any:
        ours = [callback for callback in self.callback_handler.callbacks if isinstance(callback, Offload)]
        if len(ours) > 1:
            raise ValueError(
                f"Expected one ssdtrain callback, got {len(ours)}: remove all but one from callbacks=[...]"
            )
        try:
            return train(self, *args, **kwargs)
        finally:
            for callback in ours:
                callback.session.leave()

    train_and_leave._ssdtrain_original = train  # type: ignore[attr-defined]
    transformers.Trainer.train = train_and_leave


def install_everywhere() -> None:
    """Gives every Trainer that has no such callback the one that the environment asks for; for `ssdtrain.launch`."""
    init = transformers.Trainer.__init__

    @functools.wraps(init)
    def init_and_add(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if not any(isinstance(callback, Offload) for callback in self.callback_handler.callbacks):
            self.add_callback(Offload())

    transformers.Trainer.__init__ = init_and_add


check_version("transformers")
install()
