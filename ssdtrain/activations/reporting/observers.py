"""Has every finished step reviewed, and tells whoever watches: the run record, the log, callbacks.

Knows the schedule, which learns from a step, and the store, which has the totals; moves nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from ssdtrain.activations.activation_store import ActivationStore
from ssdtrain.io.files.paths import absolute_path
from ssdtrain.policy import ActivationPolicy
from ssdtrain.run_log import Recorder
from ssdtrain.run_log.path import record_path
from ssdtrain.scheduling.schedule import Schedule
from ssdtrain.tracing.finished_step import Callback, CallbackObserver, FinishedStep, Observer, StepLog


def recorder_for(policy: ActivationPolicy, directories: Sequence[str]) -> Recorder | None:
    """Who records the run; None where nobody is to.

    Raises:
        OSError: the record cannot be made.
        ValueError: its path has an unknown placeholder.
    """
    path = record_path(policy.record) if policy.record is not None and policy.enabled else None
    return Recorder(absolute_path(path, "a file for the record"), policy, directories) if path is not None else None


class StepObservers:
    """The watchers of one offload context."""

    def __init__(
        self, policy: ActivationPolicy, schedule: Schedule, store: ActivationStore, recorder: Recorder | None
    ) -> None:
        """Watches for the log and for `recorder`, if the run is recorded."""
        self._schedule, self._store, self._recorder = schedule, store, recorder
        self._observers: list[Observer] = []
        self._num_steps = 0
        if recorder is not None:
            self._add(recorder)
            weakref.finalize(self, recorder.close)
        if policy.enabled and policy.log_every:
            self._add(StepLog(policy.log_every))

    def call(self, callback: Callback) -> None:
        """Calls `callback` after every step from now on."""
        self._add(CallbackObserver(callback))

    def review(self) -> None:
        """A step is over: learns from it and tells of it. Not under the lock."""
        for remark in self._schedule.review.take_remarks():
            self._store.note_fallback(remark)
        if not self._schedule.has_news:
            return
        finished = self._schedule.review_step(self._store.counters, self._store.totals())
        if finished is not None:
            self._store.note_step_over()
            self._tell(finished)

    def leave(self) -> None:
        """The context is left: if no other step follows, this one was the last."""
        finished = self._last_step() if self._recorder is not None else None
        if finished is not None:
            assert self._recorder is not None
            self._recorder.offer_last(self._num_steps + 1, finished)

    def _last_step(self) -> FinishedStep | None:
        return self._schedule.review.finished(self._store.totals(), is_last=True) if self._schedule.has_news else None

    def close(self) -> None:
        """No step follows."""
        finished = self._last_step() if self._observers else None
        if finished is not None:
            self._tell(finished)
            self._observers = []
        if self._recorder is not None:
            self._recorder.close()

    def _add(self, observer: Observer) -> None:
        self._observers.append(observer)
        self._schedule.review.observe()

    def _tell(self, finished: FinishedStep) -> None:
        self._num_steps += 1
        for observer in self._observers:
            what_failed = observer.note_step(self._num_steps, finished)
            if what_failed:
                self._store.note_fallback(what_failed)
