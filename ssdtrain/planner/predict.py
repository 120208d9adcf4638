"""Plays one step under one placement, waits included: what it will take in time and memory.

The general case of `timeline`: there nothing ever waits, here the clock of the training thread stands still whenever it
waits for a reload or, when it is patient, for room on the way out. Where nothing waits both agree: a test sees to it.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ssdtrain.planner.recorded_step import Where
from ssdtrain.planner.timeline import Placement, Timeline

_OTHER, _RELEASE, _SAVE, _NEED, _RELOAD = range(5)  # the order of what happens at the same time
_INSTANT = 1e-9


@dataclass(frozen=True)
class Prediction:
    """What one step will be like."""

    peak_nbytes: int
    """Most bytes in memory at once."""
    stall_seconds: float
    """Time the training thread waits."""
    num_late: int
    """Reloads that are waited for."""
    refused: tuple[int, ...]
    """Positions that stay in memory after all because the drive is behind."""


def latest_starts(timeline: Timeline, placement: Placement) -> list[float]:
    """When each reload starts so that all end as late as they may, whether or not the bytes are there by then."""
    starts, free = [-math.inf] * len(placement), [math.inf] * len(Where)
    per_byte = [1 / timeline.tiers[where].read_bandwidth if where in timeline.tiers else 0.0 for where in Where]
    for i in timeline.by_need:
        where, due = placement[i], timeline.needed[i]
        if where and due < math.inf:
            starts[i] = free[where] = min(due, free[where]) - timeline.nbytes[i] * per_byte[where]
    return starts


def predict(
    timeline: Timeline,
    placement: Placement,
    *,
    is_patient: bool,
    starts: Sequence[float] | None = None,
    staging_nbytes: int = 0,
) -> Prediction:
    """Plays the step.

    Args:
        timeline: the step and the machine.
        placement: what moves.
        starts: when reloads start; as late as this machine allows where nothing is said.
        is_patient: when the drive is behind, the training thread waits for it; otherwise the record stays in memory.
        staging_nbytes: slabs in the memory that tensors are saved in, which counts with them. What is on its way to the
            drive is copied to a slab, and not in memory twice.
    """
    play = _Play(timeline, placement, is_patient, staging_nbytes)
    return play.run(starts or latest_starts(timeline, placement))


class _Play:
    """One step while it is being played."""

    def __init__(self, timeline: Timeline, placement: Placement, is_patient: bool, staging_nbytes: int) -> None:
        self._staging_nbytes = staging_nbytes
        self._timeline, self._placement, self._is_patient = timeline, list(placement), is_patient
        self._stall, self._num_late = 0.0, 0
        self._changes: list[tuple[float, int]] = []  # of memory
        self._write_free = dict.fromkeys(timeline.tiers, 0.0)
        self._read_free = dict.fromkeys(timeline.tiers, 0.0)
        self._written: dict[int, float] = {}
        self._copied: dict[int, float] = {}  # when the source of a write is not needed any more
        self._in_flight: deque[int] = deque()  # towards the drive, the oldest first
        self._num_in_flight = 0
        self._due: list[tuple[float, int]] = []  # reloads whose time has come and for which there was no room yet
        self._back: dict[int, float] = {}  # when reloads end
        self._num_ahead = 0
        self._refused: list[int] = []
        self._idle: list[int] = []  # sizes of memory kept for later reloads, the oldest first

    def run(self, starts: Sequence[float]) -> Prediction:
        """From the first event to the last."""
        actions = {
            _OTHER: self._change_other,
            _SAVE: self._save,
            _RELOAD: self._reload,
            _NEED: self._need,
            _RELEASE: self._release,
        }
        for seconds, kind, i in self._script(starts):
            actions[kind](i, seconds + self._stall)
        self._changes.sort()
        peak = max(accumulate([delta for _, delta in self._changes]), default=0)
        return Prediction(peak + self._staging_nbytes, self._stall, self._num_late, tuple(self._refused))

    def _script(self, starts: Sequence[float]) -> list[tuple[float, int, int]]:
        timeline = self._timeline
        script = [(seconds, _OTHER, i) for i, (seconds, _) in enumerate(timeline.step.other)]
        for i, start in enumerate(starts):
            script += [(timeline.saved[i], _SAVE, i), (timeline.released[i], _RELEASE, i)]
            if timeline.needed[i] < math.inf:
                script.append((timeline.needed[i], _NEED, i))
            if start > -math.inf:
                script.append((max(start, timeline.saved[i]), _RELOAD, i))
        return sorted(script)

    def _change_other(self, i: int, now: float) -> None:
        other = self._timeline.step.other
        self._changes.append((now, other[i][1] - (other[i - 1][1] if i else 0)))

    # -- out -----------------------------------------------------------------------------------------------------

    def _save(self, i: int, now: float) -> None:
        nbytes, where = self._timeline.nbytes[i], Where(self._placement[i])
        self._changes.append((now, nbytes))
        if where == Where.KEEP:
            return
        if where == Where.DISK:
            if not self._has_room(nbytes, now):
                self._placement[i] = Where.KEEP
                self._refused.append(i)
                return
            now = max(now, self._timeline.saved[i] + self._stall)
            self._in_flight.append(i)
            self._num_in_flight += nbytes
        begun = max(now, self._write_free[where])
        bandwidth = self._timeline.tiers[where].write_bandwidth
        done = begun + nbytes / bandwidth
        self._written[i] = self._write_free[where] = self._copied[i] = done
        if where == Where.DISK:
            self._copied[i] = max(now, done - self._staging_nbytes / bandwidth)

    def _has_room(self, nbytes: int, now: float) -> bool:
        """Whether one more may be on its way to the drive: at once, or after a wait when there is patience."""
        staging = self._timeline.machine.staging_nbytes
        while self._in_flight:
            oldest = self._in_flight[0]
            if self._written[oldest] > now:
                if self._num_in_flight + nbytes <= staging:
                    return True
                if not self._is_patient:
                    return False
                self._stall += self._written[oldest] - now
                now = self._written[oldest]
            self._num_in_flight -= self._timeline.nbytes[self._in_flight.popleft()]
        return True

    # -- back ----------------------------------------------------------------------------------------------------

    def _reload(self, i: int, now: float) -> None:
        if i not in self._written:
            return
        heapq.heappush(self._due, (self._timeline.needed[i], i))
        self._begin_due(now)

    def _begin_due(self, now: float) -> None:
        nbytes, most = self._timeline.nbytes, self._timeline.machine.prefetch_nbytes
        while self._due:
            i = self._due[0][1]
            is_too_much = self._num_ahead + nbytes[i] > most and (self._num_ahead or not most)
            if i not in self._back and is_too_much:
                return
            heapq.heappop(self._due)
            if i not in self._back:
                self._begin(i, now)

    def _begin(self, i: int, now: float) -> None:
        """Starts a reload; one whose bytes are not written yet is served from memory, where it was all the time."""
        where, nbytes, written = Where(self._placement[i]), self._timeline.nbytes[i], self._written[i]
        self._num_ahead += nbytes
        if self._copied[i] <= now:
            self._changes += [(self._copied[i], -nbytes), (now, nbytes)]
        if written > now:
            self._back[i] = now
            return
        self._reuse_idle(nbytes, now)
        begun = max(now, self._read_free[where])
        self._back[i] = self._read_free[where] = begun + nbytes / self._timeline.tiers[where].read_bandwidth

    def _need(self, i: int, now: float) -> None:
        if i not in self._written:
            return
        if i not in self._back:
            self._begin(i, now)
        wait = self._back[i] - now
        if wait > _INSTANT:
            self._stall += wait
            self._num_late += 1
            now += wait
        self._num_ahead -= self._timeline.nbytes[i]
        self._begin_due(now)

    def _release(self, i: int, now: float) -> None:
        nbytes = self._timeline.nbytes[i]
        gone = i in self._written and i not in self._back  # never asked for: it left when it was written
        is_reload = i in self._back and self._back[i] > self._written[i]
        if is_reload and self._timeline.machine.idle_nbytes:
            self._idle.append(nbytes)  # it is not given back yet
        else:
            self._changes.append((min(now, self._copied[i]) if gone else now, -nbytes))

    def _reuse_idle(self, nbytes: int, now: float) -> None:
        """A reload takes memory of its size that is idle; where there is too much, the oldest goes."""
        if nbytes in self._idle:
            self._idle.reverse()
            self._idle.remove(nbytes)  # the youngest
            self._idle.reverse()
            self._changes.append((now, -nbytes))
        while self._idle and sum(self._idle) > self._timeline.machine.idle_nbytes:
            self._changes.append((now, -self._idle.pop(0)))
