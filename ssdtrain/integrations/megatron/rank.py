"""One rank of a job: its session, or why there is none; see [Note: one error on every rank]."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from ssdtrain.activations.offload import ActivationOffload
from ssdtrain.api.functions import Directories
from ssdtrain.api.ranks import LateAgreement, path_fields
from ssdtrain.api.section import Section
from ssdtrain.api.session import Offload
from ssdtrain.integrations.megatron.models import REFILLED, check_model, weights_of
from ssdtrain.io.files.paths import absolute_directories
from ssdtrain.policy import ActivationPolicy


class Rank:
    """What runs forward steps with activations offloaded, once all ranks have agreed that they can."""

    def __init__(self) -> None:
        """Opens nothing."""
        self.session: Offload | None = None
        self.agreement = LateAgreement(self._close)
        self._seen: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def open(self, directories: Directories, policy: ActivationPolicy) -> None:
        """Opens engine and spill files, and keeps them open between micro-batches."""
        session = Offload(Section(tuple(absolute_directories(directories, path_fields())), policy))
        session.begin((), is_agreed=False)  # the agreement is for that
        if session.activations is not None:
            session.activations.leave_alone(REFILLED)
        self.session = session

    @property
    def offload(self) -> ActivationOffload | None:
        """What moves activations, where it is open."""
        return self.session.activations if self.session is not None else None

    def prepare(self, model: torch.nn.Module) -> None:
        """Checks a model chunk's configuration and marks its weights, the first time it comes along."""
        self.agreement.check()
        if model in self._seen or self.offload is None:
            return
        self._seen.add(model)
        check_model(model)
        self.offload.mark_weights(weights_of(model))

    def run(self, forward_step: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Runs a forward step, and later the loss function it returns, with hooks on."""
        session = self.session if self.agreement.error is None else None
        run = session.around(forward_step) if session is not None else forward_step
        output, loss = run(*args, **kwargs)
        return output, (session.around(loss) if session is not None and loss is not None else loss)

    def _close(self) -> None:
        if self.session is not None:
            self.session.close()
