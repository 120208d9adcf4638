"""Megatron-Bridge: a callback of its `pretrain`."""

from __future__ import annotations

from typing import Any

from ssdtrain.integrations.megatron.models import REFILLED, check_model, require_megatron, weights_of
from ssdtrain.integrations.parts.callback import SessionCallback


class Offload(SessionCallback):
    """A callback of Megatron-Bridge's `pretrain`, which takes what `ssdtrain.Offload` takes; for activations alone."""

    on_train_step_start = SessionCallback.enter
    on_train_step_end = SessionCallback.leave
    on_train_end = SessionCallback.end

    def on_train_start(self, context: Any) -> None:
        """The model is built, and a checkpoint loaded."""
        require_megatron()
        section = self.session.section
        if section.parameters is not None or section.optimizer is not None:
            raise ValueError(
                "Expected activations alone with Megatron, which offloads optimizer state itself, got more: use its "
                "optimizer_cpu_offload"
            )
        for chunk in context.model:
            check_model(chunk)
        self.session.begin(())  # the weights are marked below: `buffers` of Megatron's DDP is a list, which others call
        if self.session.activations is not None:
            self.session.activations.leave_alone(REFILLED)
            self.session.activations.mark_weights([w for chunk in context.model for w in weights_of(chunk)])
