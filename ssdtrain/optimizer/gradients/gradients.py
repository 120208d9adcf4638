"""Gradients on the drive between backward and the optimizer step.

Knows parameters and the store; not how an optimizer steps. What stands in `parameter.grad` is the truth: it says
whether there is a gradient, and which; see [Note: gradients that are looked at].
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable

import torch

from ssdtrain.devices.base import Device
from ssdtrain.optimizer.gradients.gradient_record import GradientRecord
from ssdtrain.optimizer.gradients.offloaded_gradient import OffloadedGradient, UsedGradient, record_of
from ssdtrain.store.record import Record
from ssdtrain.store.state_store import StateLostError, StateStore


class Gradients:
    """The gradients of one optimizer's parameters, as far as they are on the drive."""

    def __init__(self, store: StateStore, name_of: Callable[[torch.Tensor], str]) -> None:
        """No gradient is on the drive yet."""
        self._store, self._name_of = store, name_of
        self._records: dict[weakref.ref[GradientRecord], Record] = {}
        self._dead: list[weakref.ref[GradientRecord]] = []  # nobody looks at them any more
        self._in_use: dict[torch.Tensor, tuple[OffloadedGradient, torch.Tensor, int]] = {}

    def __contains__(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter has a gradient, here or in memory."""
        return parameter.grad is not None and not isinstance(parameter.grad, UsedGradient)

    def offload(self, parameter: torch.Tensor) -> None:
        """Backward has computed one: it goes to the drive. What it adds to one that is there is there already."""
        grad = parameter.grad
        self.release()
        if grad is None or record_of(parameter) is not None:
            return
        if grad.layout is not torch.strided or not grad.nbytes:
            return  # a sparse one is small
        if type(grad) is not torch.Tensor or grad.requires_grad:
            kind = "with a graph" if grad.requires_grad else f"that are {type(grad).__name__}s"
            self._store.note(f"gradients {kind} stay in memory")
            return
        device = self._store.devices().of(grad)
        if isinstance(device, str):
            return
        record = GradientRecord(self._store, self._name_of(parameter), grad.detach(), device)
        self._records[weakref.ref(record, self._dead.append)] = record.record
        parameter.grad = OffloadedGradient(record)

    def prefetch(self, parameter: torch.Tensor, device: Device | None = None) -> int:
        """Begins to read one back, to where it came from or to host memory; how many reads."""
        record = record_of(parameter)
        return record.prefetch(device) if record is not None else 0

    # -- in a step ------------------------------------------------------------------------------------------

    def reload(self, parameter: torch.Tensor) -> None:
        """Has one in memory, for the optimizer.

        Raises:
            StateLostError: the drive does not have it any more.
        """
        placeholder, record = parameter.grad, record_of(parameter)
        if record is None:
            return
        assert isinstance(placeholder, OffloadedGradient)
        grad = record.load()
        self._in_use[parameter] = placeholder, grad, grad._version
        parameter.grad = grad

    def put_back(self, parameters: Iterable[torch.Tensor]) -> None:
        """The optimizer has used them: as without offload they are there until somebody drops them."""
        for parameter in parameters:
            placeholder, grad, version = self._in_use.pop(parameter, (None, None, 0))
            if placeholder is None or grad is None or parameter.grad is not grad:
                continue
            if grad._version != version:
                placeholder.record.replace(grad)
            parameter.grad = placeholder

    # -- after it -------------------------------------------------------------------------------------------

    def note_used(
        self, parameter: torch.Tensor, explain: Callable[[bool], str], norm: torch.Tensor | None = None
    ) -> None:
        """Frees a gradient; `explain` is what readers are told, but for those of `norm`, see `UsedGradient`."""
        like = {"size": parameter.size(), "dtype": parameter.dtype, "device": parameter.device}
        parameter.grad = UsedGradient(explain, norm, **like)

    def forget_used(self, parameters: Iterable[torch.Tensor]) -> None:
        """Takes the stand-ins of used gradients out of `parameter.grad`."""
        for parameter in parameters:
            if isinstance(parameter.grad, UsedGradient):
                parameter.grad = None

    def release(self) -> None:
        """Gives the drive's space back of those that nobody looks at any more."""
        with contextlib.suppress(IndexError):  # autograd has a thread for each device
            while True:
                self._store.release(self._records.pop(self._dead.pop()))

    def close(self, parameters: Iterable[torch.Tensor]) -> None:
        """Has all of them in memory, whoever looks at them.

        Raises:
            StateLostError: the drive does not have one any more; all others are there.
        """
        self.forget_used(parameters)
        lost: StateLostError | None = None
        for record in [record for reference in list(self._records) if (record := reference()) is not None]:
            try:
                record.hold()
            except StateLostError as error:
                lost = lost or error
        for parameter in parameters:
            found = record_of(parameter)
            if found is not None and not found.is_away:
                parameter.grad = found.hold()
        self.release()
        if lost is not None:
            raise lost
