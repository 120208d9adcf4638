"""Megatron-Bridge: a callback of its `pretrain`.

No event tells callbacks of an error, and no one calls them after it. So hooks are on in forwards of the model alone,
which they leave however those end; what is round the model's forward goes with the callback, at the latest.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from ssdtrain.api.session import Offload as Session
from ssdtrain.integrations.megatron.models import REFILLED, check_model, require_megatron, weights_of
from ssdtrain.integrations.parts.callback import SessionCallback


class Offload(SessionCallback):
    """A callback of Megatron-Bridge's `pretrain`, which takes what `ssdtrain.Offload` takes; for activations alone."""

    def __init__(self, *directory: Any, **features: Any) -> None:
        """Opens nothing before training begins."""
        super().__init__(*directory, **features)
        self._finalizer = weakref.finalize(self, _end, self.session, [])
        self._finalizer.atexit = False

    def on_train_start(self, context: Any) -> None:
        """The model is built, and a checkpoint loaded."""
        self.end()
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
        uncover = [self.session.cover(chunk) for chunk in context.model]
        self._finalizer = weakref.finalize(self, _end, self.session, uncover)
        self._finalizer.atexit = False

    def end(self, *_: Any, **__: Any) -> None:
        """Training is over. After an error the user calls this, or Python does when nobody has the callback."""
        self._finalizer()

    on_train_end = end

    def __enter__(self) -> Offload:
        """For `with Offload(...) as offload: pretrain(..., callbacks=[offload])`, which ends it after an error too."""
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def _end(session: Session, uncover: list[Callable[[], None]]) -> None:
    for undo in uncover:
        undo()
    session.end()
