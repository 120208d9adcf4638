"""A line in DeepSpeed's log, as often as DeepSpeed writes its own."""

from __future__ import annotations

import weakref
from typing import Any

from deepspeed.utils import log_dist

from ssdtrain.api.session import Offload


class StepLog:
    """That of one engine, which is not kept."""

    def __init__(self, engine: Any, session: Offload) -> None:
        """Has said nothing yet."""
        self._engine = weakref.ref(engine)
        self._session = session
        self._last_step = 0

    def after_step(self) -> None:
        """Every `steps_per_print` steps, what happened since the last time."""
        engine: Any = self._engine()
        every, step, last = engine.steps_per_print(), engine.global_steps, self._last_step
        if every and step % every == 0 and step != last:
            self._last_step = step
            log_dist(f"ssdtrain: step={step}, in {step - last} steps: {self._session.progress()}", ranks=[0])
