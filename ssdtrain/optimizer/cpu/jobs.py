"""What is known of one chunk that the CPU updates, from its copies out to the new values."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

import torch

from ssdtrain.optimizer.gradients.gradient_record import GradientRecord
from ssdtrain.tracing.spans import named

Wait = Callable[[], torch.Tensor]  # for a tensor on its way to host memory


@dataclass(eq=False)
class Entry:
    """One parameter in a job."""

    parameter: torch.Tensor
    name: str
    value: Wait
    gradient: Wait
    record: GradientRecord | None  # of the gradient, where that is offloaded
    state: dict[str, Any] | None  # what is not on the drive; None: there is none
    version: int
    noted: dict[str, Any]
    """What users have noted on the parameter."""
    result: torch.Tensor | None = None

    def note_version(self) -> None:
        """The parameter was not changed by others until now."""
        self.version = self.parameter._version

    def check_unchanged(self) -> None:
        """Raises when somebody has changed the parameter since its copy was begun."""
        if self.parameter._version != self.version:
            raise RuntimeError(
                f"Expected {self.name} unchanged while the CPU updates it, got a change, which would be lost: change "
                "parameters after optimizer.step(), and with delayed_update after optimizer.flush()"
            )


@dataclass(eq=False)
class Job:
    """The update of one chunk."""

    entries: list[Entry]
    shadow: torch.optim.Optimizer
    attributes: dict[str, Any]
    num_threads: int
    future: Future[None] | None = None
    following: Job | None = None
    changes: dict[Any, Any] = field(default_factory=dict)
    """What its step did to values that all parameters share."""

    @property
    def name(self) -> str:
        """What spans call it."""
        return named([entry.name for entry in self.entries])

    def submit(self, pool: Executor, run: Callable[[Job], None]) -> None:
        """Has `run` called for it by a thread of `pool`."""
        self.future = pool.submit(run, self)

    def note_following(self, job: Job) -> None:
        """The job that comes after it, whose state may be read meanwhile."""
        self.following = job
