"""Gradients on the drive between backward and the optimizer step, and their clipping without having them all.

Knows parameters and pages; not how an optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ssdtrain.devices.base import Device
from ssdtrain.optimizer.state import Pages

_KEY = "grad"


class Gradients:
    """The gradients of one optimizer's parameters, as far as they are on the drive."""

    def __init__(self, pages: Pages, name_of: Callable[[torch.Tensor], str]) -> None:
        """There is none yet."""
        self._pages, self._name_of = pages, name_of
        self._norms: dict[torch.Tensor, torch.Tensor] = {}
        self.factor: torch.Tensor | None = None  # what the next step multiplies them by

    def __contains__(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter has a gradient here, or in memory."""
        return parameter.grad is not None or parameter in self._pages

    def take(self, parameter: torch.Tensor) -> None:
        """Backward has computed one: it is added to what is there and goes to the drive."""
        assert parameter.grad is not None
        if parameter.grad.layout is not torch.strided:
            return  # a sparse one is small: it stays
        state: dict[str, Any] = {_KEY: parameter.grad.detach()}
        if parameter in self._pages:
            self._pages.bring(parameter, state)
            state[_KEY].add_(parameter.grad)
        self._norms[parameter] = torch.linalg.vector_norm(state[_KEY])
        self._pages.send_away(parameter, self._name_of(parameter), state)
        parameter.grad = None

    def fetch(self, parameter: torch.Tensor, device: Device | None = None) -> int:
        """Begins to read one back, to where it came from or to host memory; how many reads."""
        return self._pages.fetch(parameter, device)

    def is_away(self, parameter: torch.Tensor) -> bool:
        """Whether one is on the drive: else it is in memory, where the parameter is."""
        return parameter in self._pages and parameter.grad is None and not self._pages.is_kept(parameter)

    def bring(self, parameter: torch.Tensor, host: Device) -> torch.Tensor:
        """One that is away, in host memory, not clipped. In any thread.

        Raises:
            StateLostError: the drive does not have it any more.
        """
        state: dict[str, Any] = {}
        self._pages.bring(parameter, state, host)
        found: torch.Tensor = state[_KEY]
        return found.cpu()  # one that could not even be copied from its device is still there

    def give_back(self, parameter: torch.Tensor) -> None:
        """Has one in memory, clipped, for the optimizer."""
        self.restore(parameter)
        if self.factor is not None and parameter.grad is not None:
            parameter.grad.mul_(self.factor)

    def restore(self, parameter: torch.Tensor) -> None:
        """Has one in memory, as backward left it."""
        state: dict[str, Any] = {}
        if parameter.grad is not None and parameter in self._pages:
            raise RuntimeError(
                f"Expected the gradient of {self._name_of(parameter)} on the drive only, got another one in .grad: "
                "call optimizer.zero_grad() before setting it"
            )
        self._pages.bring(parameter, state)
        if state:
            parameter.grad = state[_KEY]

    def clip_grad_norm_(self, parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
        """The 2-norm of all gradients; the next step scales them down where it is more than `max_norm`."""
        norms = [self._norms.get(p, _norm(p)) for p in parameters if p in self]
        if not norms:
            return torch.tensor(0.0)
        total: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
        self.factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        return total

    def forget(self, parameters: Iterable[torch.Tensor]) -> None:
        """They were used, or are not wanted."""
        for parameter in parameters:
            self._pages.drop(parameter)
            self._norms.pop(parameter, None)

    def finish_step(self) -> None:
        """The step is over, or will not be: no factor is left."""
        self.factor = None

    def close(self) -> None:
        """Brings all of them back to their parameters."""
        for parameter in self._pages:
            self.give_back(parameter)
        self._pages.forget()


def _norm(parameter: torch.Tensor) -> torch.Tensor:
    grad = parameter.grad
    if grad is None:
        return torch.tensor(0.0)
    norm: torch.Tensor = torch.linalg.vector_norm(grad if grad.layout is torch.strided else grad.coalesce().values())
    return norm
