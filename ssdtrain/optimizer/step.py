"""When parameters are updated: all in `step()`, some in backward, or one step later; and what an interruption leaves.

Knows updates of a few parameters and how far the step is; neither groups nor state dicts.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.profiler import record_function

from ssdtrain.optimizer.gradients.reached import Loop, Reach, has_reentrant_checkpoints
from ssdtrain.optimizer.inner import what_stayed
from ssdtrain.optimizer.progress import StepProgress
from ssdtrain.optimizer.trial.validation import check_alone
from ssdtrain.optimizer.updates import Updates
from ssdtrain.policy import OptimizerPolicy
from ssdtrain.state_stats import StateCounters
from ssdtrain.store.state_store import StateStore
from ssdtrain.tracing.spans import named, span
from ssdtrain.verdict import on_optimizer

_AHEAD = 2  # chunks whose state is read before their turn


class Stepper:
    """Takes the steps of one optimizer, chunk after chunk."""

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        store: StateStore,
        updates: Updates,
        counters: StateCounters,
        policy: OptimizerPolicy,
        scaler: Callable[[], dict[str, Any]],
        loop: Loop,
    ) -> None:
        """No step is under way. `scaler`: what a GradScaler told the optimizer by now."""
        self.progress = StepProgress()
        self.reach = Reach(policy, type(inner).__name__, updates.name_of, loop)
        self._keeps_norms = loop.reads_norms and bool(policy.step_in_backward)
        self._inner, self._store, self._updates, self._counters = inner, store, updates, counters
        self._on_cpu, self._policy, self._scaler = updates.on_cpu, policy, scaler
        self._lock = threading.RLock()  # of what happens in backward
        self._is_judged = False

    def check_complete(self, *, in_step: bool = False) -> None:
        """Raises when a step was interrupted; `in_step`: one that updates in backward may be under way."""
        may_go_on = in_step and bool(self._policy.step_in_backward)
        self.progress.check_complete(self._store.checkpoint, may_go_on=may_go_on)

    def step(self) -> None:
        """Updates all parameters that are due.

        Raises:
            RuntimeError: those that were updated in backward would be updated otherwise by now.
        """
        if self._policy.step_in_backward:
            self.progress.early.check(self._updates.group_of, self._inner.param_groups, self._updates.name_of)
        self._updates.offloaded.take_over_copies()
        with torch.no_grad(), record_function("ssdtrain::optimizer_step"), self.noting_errors():
            self._update_all()
            if not self._on_cpu.is_busy or not self._policy.delayed_update:
                self._updates.finish()
        self.progress.finish_step(self._updates.group_of)
        self._counters.num_steps = self.progress.num_steps
        self._inner._opt_called = True  # type: ignore[attr-defined]  # for schedulers that were made with it
        if not self._on_cpu.is_busy:
            self._judge()

    def _update_all(self) -> None:
        chunks = self._updates.chunks(self._updates.due(self.progress.updated))
        if not chunks and not self.progress.updated:
            self._updates.update_none(self._scaler())
        for i, chunk in enumerate(chunks):
            for parameter in [p for ahead in chunks[i : i + 1 + _AHEAD] for p in ahead if p not in self._on_cpu]:
                self._prefetch(parameter)
            self._update(chunk)

    def _prefetch(self, parameter: torch.Tensor) -> None:
        self._counters.num_prefetched += self._updates.prefetch(parameter)

    def _update(self, chunk: list[torch.Tensor]) -> None:
        """Updates these, and frees their gradients where gradients do not stay until the step is over.

        Those that the CPU updates have their new values after `finish`.
        """
        name_of, policy = self._updates.name_of, self._policy
        begin = partial(self.progress.begin_update, name_of(chunk[0]), self._updates.group_of)
        norms = {p: torch.linalg.vector_norm(p.grad) for p in chunk if p.grad is not None} if self._keeps_norms else {}
        with span("update", lambda: named([name_of(parameter) for parameter in chunk])):
            self._updates.update(chunk, self._scaler(), begin)
        if policy.step_in_backward or policy.offload_gradients or policy.delayed_update:
            self.progress.updated.update(chunk)
        for parameter in chunk if policy.step_in_backward else []:
            explain = self.progress.explain_used(name_of(parameter))
            self._updates.gradients.note_used(parameter, explain, norms.get(parameter))
        for parameter in chunk if policy.delayed_update else []:
            parameter.grad = None

    def update_in_backward(self, parameter: torch.Tensor, regroup: Callable[[], None]) -> None:
        """The gradient of a parameter is complete; with enough of them, their parameters are updated.

        `regroup`: learns of changes to the groups, in a backward that has just begun.
        """
        if self.reach.is_accumulating:
            return
        with self._lock:  # autograd has a thread for each device
            self.check_complete(in_step=True)
            if self.progress.follow_backward():
                check_alone(self._policy)
                regroup()
                self._begin_backward()
            if parameter in self._updates.group_of and not self.progress.is_late(parameter):
                self._arrive(parameter)

    def _begin_backward(self) -> None:
        self.reach.check()
        self._updates.offloaded.take_over_copies()
        if self.progress.count_arrivals(has_reentrant_checkpoints):
            self._store.note("a checkpoint is reentrant: all gradients of the first step stay in memory until it")

    @torch.no_grad()
    def _arrive(self, parameter: torch.Tensor) -> None:
        progress, nbytes_of, chunk_nbytes = self.progress, self._updates.offloaded.nbytes, self._policy.chunk_nbytes
        progress.arrive(parameter, self._updates.name_of(parameter))
        for following in progress.following(parameter, nbytes_of, _AHEAD * chunk_nbytes):
            self._prefetch(following)
        if sum(map(nbytes_of, progress.arrived)) >= chunk_nbytes:
            with self.noting_errors():
                arrived = progress.take_arrived()
                self._update(arrived)
            progress.early.note(arrived, self._updates.group_of, self._inner.param_groups, self._on_cpu.__contains__)

    @contextlib.contextmanager
    def noting_errors(self) -> Iterator[None]:
        """Inside, an error gives up what the CPU updates, and the step counts as incomplete."""
        try:
            yield
        except BaseException:
            self.progress.note_error()
            self._on_cpu.abandon()
            raise

    def finish(self) -> None:
        """All that the CPU updates has its new values."""
        is_late = self._policy.delayed_update and self._on_cpu.is_busy
        if is_late:
            self._on_cpu.wait()
        with self.noting_errors():
            if is_late:
                late = f"step {self.progress.num_steps}, whose update was delayed"
                self.progress.note_incomplete(late, self._updates.group_of)
                self._updates.finish()
            self._on_cpu.finish()
        if is_late:
            self.progress.note_incomplete("", self._updates.group_of)
            self._judge()

    def _judge(self) -> None:
        """Once some state was made: whether any of it has left. Without a directory the CPU's stays with it."""
        if self._is_judged or not self.progress.has_updated:
            return
        self._is_judged = True
        if self._policy.update_on == "device" or self._store.directory is not None:
            left = what_stayed(self._inner, self._policy.min_nbytes)
            verdict = on_optimizer(self._counters, type(self._inner).__name__, left)
            if verdict is not None:
                self._store.note(verdict)
