"""The optimizer's step for a few parameters, whose state is reloaded before and offloaded after it.

On the parameters' device, but for those that the CPU updates. Knows state, gradients and the optimizer that does the
arithmetic; not when a step is due.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from ssdtrain.optimizer.cpu.cpu_updates import CpuUpdates
from ssdtrain.optimizer.gradients.gradients import Gradients
from ssdtrain.optimizer.inner import having_only, inner_step, load_part, narrowed
from ssdtrain.optimizer.live_state import LiveState
from ssdtrain.optimizer.state import OffloadedState
from ssdtrain.optimizer.state_dict import load_chunks, loads_apart, parameters_with_entries
from ssdtrain.optimizer.trial.trial import Trial, try_out
from ssdtrain.optimizer.trial.validation import check_trial
from ssdtrain.parameters.offload import offloads_of
from ssdtrain.policy import OptimizerPolicy
from ssdtrain.store.value_frames import nbytes_of


class Updates:
    """Updates some parameters of one optimizer after the other."""

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        offloaded: OffloadedState,
        gradients: Gradients,
        on_cpu: CpuUpdates,
        name_of: Callable[[torch.Tensor], str],
        chunk_nbytes: int,
    ) -> None:
        """No parameter was updated yet. `group_of` has the index of each parameter's group."""
        self.group_of: dict[torch.Tensor, int] = {}
        self.offloaded, self.gradients, self.on_cpu, self.name_of = offloaded, gradients, on_cpu, name_of
        self._inner = inner
        self._shared = on_cpu.shared
        self._trial = Trial()
        self._chunk_nbytes = chunk_nbytes
        self.live = LiveState(inner, offloaded, self.offload, self._check_lending, chunk_nbytes)

    def regroup(self, group_of: dict[torch.Tensor, int], policy: OptimizerPolicy) -> None:
        """Learns of all parameters and their groups; finds out on throw-away tensors how new ones can be offloaded.

        Raises:
            ValueError: they cannot; the message says why.
        """
        if group_of.keys() - self.group_of.keys():
            is_on_cpu = policy.update_on == "cpu"  # whose thread has no default device
            with torch.device("cpu") if is_on_cpu else contextlib.nullcontext():
                trial = try_out(self._inner, self.on_cpu.state_like, self._state_of, may_take_all=not is_on_cpu)
            nbytes = int(trial.state_ratio * sum(nbytes_of(p) for p in group_of if p.requires_grad))
            check_trial(type(self._inner), trial, policy, nbytes)
            self._trial = trial
            self._shared.expect(trial.changing)
        self.group_of = group_of

    def _state_of(self, parameter: torch.Tensor) -> dict[str, Any]:
        return {**self._inner.state.get(parameter, {}), **self.offloaded.copies(parameter)}

    def due(self, updated: set[torch.Tensor]) -> list[torch.Tensor]:
        """The parameters that a step has yet to update; `updated` are those it has updated in backward."""
        takes_all = self._trial.takes_all
        return [p for p in self.group_of if p in self.gradients or (takes_all and p not in updated)]

    def chunks(self, parameters: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
        """As many parameters together as `chunk_nbytes` of state allow; all, where they cannot be updated apart."""
        if self._trial.is_together:
            return [found] if (found := list(parameters)) else []
        chunks: list[list[torch.Tensor]] = []
        room = 0
        for parameter in parameters:
            nbytes = self.offloaded.nbytes(parameter)
            if not chunks or nbytes > room:
                chunks.append([])
                room = self._chunk_nbytes
            chunks[-1].append(parameter)
            room -= nbytes
        return chunks

    def update_none(self, attributes: Mapping[str, Any]) -> None:
        """A step without any gradient: optimizers may count it."""
        if self._trial.counts_empty_steps:
            self._step({}, attributes)

    @contextlib.contextmanager
    def everything(self) -> Iterator[None]:
        """Inside, the optimizer finds all of its state where it looks, and parameters with their values."""
        parameters = list(self.group_of)
        with self.live.in_place(), contextlib.ExitStack() as stack:
            for owner in offloads_of(parameters):
                stack.enter_context(owner.in_memory(parameters))
            yield

    def _check_lending(self, parameter: torch.Tensor) -> None:
        if parameter in self.on_cpu and self.on_cpu.is_busy:
            raise RuntimeError(
                f"Expected flush() or step() before a look at optimizer.state that was kept, got the state of "
                f"{self.name_of(parameter)} while the CPU updates it"
            )
        if parameter in self.on_cpu and self.live.is_in_place:
            raise RuntimeError(
                f"Expected update_on='device' for methods beside step() that need state, got 'cpu': that of "
                f"{self.name_of(parameter)} is in host memory, and the parameter is not"
            )

    def load(self, entries: Mapping[Any, Any], groups: list[dict[str, Any]], when_changing: Callable[[], None]) -> None:
        """Loads a state dict, a few parameters at a time where the optimizer can.

        Raises:
            ValueError: it has other groups.
        """
        own = {i for group in groups for i in group["params"]}
        likes, is_apart = self.on_cpu.state_likes(), loads_apart(self._inner)
        load_part(self._inner, {k: v for k, v in entries.items() if not is_apart or k not in own}, groups, likes)
        when_changing()
        self.offloaded.forget()
        keys = parameters_with_entries(self.group_of, entries, groups)
        if is_apart:
            chunks = [{p: keys[p] for p in chunk} for chunk in self.chunks(keys)]
            load_chunks(self._inner, entries, groups, chunks, self.offload, likes)
            return
        for parameter in keys:
            self.offload(parameter)

    def finish(self) -> None:
        """The step is over: parameters have their new values, and what all of them share has."""
        self.on_cpu.finish()
        self._shared.apply(self._inner)

    def prefetch(self, parameter: torch.Tensor) -> int:
        """Begins to read a parameter's state, and the parameter if it is away; how many reads of state."""
        if parameter in self.on_cpu:
            return self.on_cpu.prefetch(parameter)
        num_begun = self.offloaded.prefetch(parameter) + self.gradients.prefetch(parameter)
        for owner in offloads_of([parameter]):
            owner.prefetch([parameter])
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
        self.live.settle()
        others = [parameter for parameter in chunk if parameter not in self.on_cpu]
        if others:
            self._update_in_place(others, attributes, when_changing)
        if len(others) < len(chunk):
            for_cpu = {p: (self.name_of(p), self.group_of[p]) for p in chunk if p in self.on_cpu}
            self.on_cpu.begin(for_cpu, attributes, when_changing)

    def _update_in_place(
        self, chunk: list[torch.Tensor], attributes: Mapping[str, Any], when_changing: Callable[[], None]
    ) -> None:
        for parameter in chunk:
            self.gradients.reload(parameter)
        with self._in_memory(chunk):
            when_changing()
            self._step(self._by_group(chunk), attributes)
        self.gradients.put_back(chunk)
        for parameter in chunk:
            self.offload(parameter)

    @contextlib.contextmanager
    def _in_memory(self, chunk: list[torch.Tensor]) -> Iterator[None]:
        """Inside, these parameters and their state are there."""
        for parameter in chunk:
            if parameter in self.offloaded:  # looking a parameter up would give it an empty state
                self.offloaded.reload(parameter, self._inner.state[parameter])
        with contextlib.ExitStack() as stack:
            for owner in offloads_of(chunk):
                stack.enter_context(owner.in_memory(chunk))
            yield

    def _step(self, chosen: dict[int, list[torch.Tensor]], attributes: Mapping[str, Any]) -> None:
        step = functools.partial(inner_step, self._inner)
        if self._trial.is_together:
            with having_only(self._inner, chosen, attributes):
                step()
            return
        with narrowed(self._inner, chosen, attributes):
            _, changes = self._shared.run(self._inner, step)
        self._shared.note(changes)

    def _by_group(self, chunk: Iterable[torch.Tensor]) -> dict[int, list[torch.Tensor]]:
        found: dict[int, list[torch.Tensor]] = {}
        for parameter in chunk:
            found.setdefault(self.group_of[parameter], []).append(parameter)
        return found

    def offload(self, parameter: torch.Tensor) -> None:
        """Begins to write a parameter's state, all of which is in memory."""
        if parameter not in self.group_of:
            return
        if parameter in self.on_cpu:
            self.on_cpu.offload(parameter, self.name_of(parameter))
            return
        state = self.live.own.get(parameter, {})
        if state or parameter in self.offloaded:
            self.offloaded.offload(parameter, self.name_of(parameter), state)


def read_through(
    optimizer: torch.optim.Optimizer, name: str, found: Any, updates: Updates, when_called: Callable[[], None]
) -> Any:
    """An attribute of the optimizer; where it is a method, one that reads and writes state through.

    `when_called`: called before the method; it raises when nothing may be changed.
    """
    if name.startswith("_") or not inspect.ismethod(found) or found.__self__ is not optimizer:
        return found

    @functools.wraps(found)
    def call(*args: Any, **options: Any) -> Any:
        when_called()
        with updates.everything():
            return found(*args, **options)

    return call
