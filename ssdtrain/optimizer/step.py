"""The optimizer's step for a few parameters, whose state comes before and leaves after.

On the parameters' device, but for those that `cpu_updates` takes. Knows pages, gradients and the optimizer that does
the arithmetic; not when a step is due.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ssdtrain.optimizer.cpu_step import CpuUpdates
from ssdtrain.optimizer.gradients import Gradients
from ssdtrain.optimizer.inner import checked_step, narrowed
from ssdtrain.optimizer.state import Pages
from ssdtrain.parameters.offload import homes_of


class Updates:
    """Updates some parameters of one optimizer after the other."""

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        pages: Pages,
        gradients: Gradients,
        on_cpu: CpuUpdates,
        name_of: Callable[[torch.Tensor], str],
    ) -> None:
        """None was updated yet. `group_of`, the index of a parameter's group, is to be kept up to date."""
        self.group_of: dict[torch.Tensor, int] = {}
        self._inner, self._pages, self._gradients = inner, pages, gradients
        self._on_cpu, self._name_of = on_cpu, name_of

    def chunks(self, parameters: Iterable[torch.Tensor], chunk_nbytes: int) -> list[list[torch.Tensor]]:
        """As many parameters together as `chunk_nbytes` of state allow."""
        chunks: list[list[torch.Tensor]] = []
        room = 0
        for parameter in parameters:
            nbytes = self._pages.nbytes(parameter)
            if not chunks or nbytes > room:
                chunks.append([])
                room = chunk_nbytes
            chunks[-1].append(parameter)
            room -= nbytes
        return chunks

    def fetch(self, parameter: torch.Tensor) -> int:
        """Begins to read a parameter's state, and the parameter if it is away; how many reads of state."""
        if parameter in self._on_cpu:
            return self._on_cpu.fetch(parameter)
        num_begun = self._pages.fetch(parameter) + self._gradients.fetch(parameter)
        for home in homes_of([parameter]):
            home.prefetch([parameter])
        return num_begun

    def update(
        self, chunk: list[torch.Tensor], attributes: Mapping[str, Any], when_changing: Callable[[], None]
    ) -> None:
        """Has the optimizer take its step for these parameters alone. Those that the CPU updates, it begins to.

        Args:
            chunk: parameters with gradients.
            attributes: what the optimizer has besides, in this step.
            when_changing: called when all is in memory, before the first one changes.
        """
        others = [parameter for parameter in chunk if parameter not in self._on_cpu]
        if others:
            self._update_in_place(others, attributes, when_changing)
        if len(others) < len(chunk):
            for_cpu = {p: (self._name_of(p), self.group_of[p]) for p in chunk if p in self._on_cpu}
            self._on_cpu.begin(for_cpu, attributes, when_changing)

    def _update_in_place(
        self, chunk: list[torch.Tensor], attributes: Mapping[str, Any], when_changing: Callable[[], None]
    ) -> None:
        for parameter in chunk:
            self._gradients.give_back(parameter)
            if parameter in self._pages:  # looking a parameter up would give it an empty state
                self._pages.bring(parameter, self._inner.state[parameter])
        with contextlib.ExitStack() as stack:
            for home in homes_of(chunk):
                stack.enter_context(home.in_memory(chunk))
            when_changing()
            with narrowed(self._inner, self._by_group(chunk), attributes):
                checked_step(self._inner)
        self._gradients.put_back(chunk)
        for parameter in chunk:
            self.send_away(parameter)

    def _by_group(self, chunk: Iterable[torch.Tensor]) -> dict[int, list[torch.Tensor]]:
        found: dict[int, list[torch.Tensor]] = {}
        for parameter in chunk:
            found.setdefault(self.group_of[parameter], []).append(parameter)
        return found

    def send_away(self, parameter: torch.Tensor) -> None:
        """Begins to write a parameter's state, all of which is in memory."""
        if parameter in self._on_cpu:
            self._on_cpu.send_away(parameter, self._name_of(parameter))
            return
        state = self._inner.state.get(parameter, {})
        if state or parameter in self._pages:
            self._pages.send_away(parameter, self._name_of(parameter), state)
