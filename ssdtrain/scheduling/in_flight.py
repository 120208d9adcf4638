"""How many bytes of saved tensors may be under way at once: the policy's bounds, more for large records, or none.

[Note: bounds that follow the records]
One record may always be on its way, whatever its size. But with one at a time an accelerator waits for each of them:
the next sets out only when the last has arrived. So where a bound was not set, it grows to twice the largest record
that an accelerator saves, as far as an eighth of the memory that is free there allows: that memory holds them
meanwhile. A bound that was set stays, and none grows under a memory budget, which counts every byte.

[Note: a budget that cannot be met]
What is too small to be moved, say, may take more than a memory budget by itself. Were everything else then waited for,
training would wait for every transfer alone, and memory be what it is anyway. So a few records may be there beside what
cannot leave, two of them ahead of need; and once there is a plan, as much as it needs.

[Note: declining]
What moving takes (staging, what comes back early, what the C library keeps of freed memory) does not pay where little
is saved. In the first step nobody knows how much that will be: what is saved is put off until a little more is alive
than the buffers are large, then it moves. When a step is over it is known: below what pays, nothing moves from then on,
until more is alive at once. Where memory is short (a limit of the process, a container, a full machine) little pays
too.
"""

from __future__ import annotations

import math
from typing import cast

from ssdtrain.devices.base import Accelerator
from ssdtrain.devices.spare_memory import spare_nbytes
from ssdtrain.planner import Buffers
from ssdtrain.policy import ActivationPolicy
from ssdtrain.stats import Counters
from ssdtrain.store.record import SavedRecord

_NUM_RECORDS = 2
_NUM_BESIDE = 4  # records beside what cannot leave
_FREE_SHARE = 8
_SPARE_TIMES = 4
_FIRST_STEPS, _ASK_EVERY = 4, 64  # after which it is asked what memory there is: that takes a millisecond


def _is_short(nbytes: int) -> bool:
    """Whether the host has no memory for a few times so much."""
    return spare_nbytes() < _SPARE_TIMES * nbytes


class Limits:
    """The bounds in force, which are in the counters for all to see."""

    def __init__(self, policy: ActivationPolicy, counters: Counters, buffers: Buffers) -> None:
        """Those of the policy, within which `buffers` grow."""
        self._largest_nbytes = self._num_reviewed = self._sent_before = 0
        self._budget_nbytes = policy.memory_budget
        self._planned_nbytes = 0  # what the plan that is followed needs, where that is more
        self._resident_nbytes = self._resident_before = 0  # at most, in this step and in the last one
        self._buffers = buffers
        least = buffers.begins_at_nbytes(is_on_host=True)
        self._may_decline = policy.may_decline and not _is_short(least)
        counters.is_declining = self._may_decline  # see [Note: declining]
        self._counters = counters
        names = ("staging_nbytes", "prefetch_nbytes") if policy.memory_budget is None else ()
        self._may_grow = [name not in policy.model_fields_set for name in names] or [False, False]
        counters.staging_limit_nbytes, counters.prefetch_limit_nbytes = policy.staging_nbytes, policy.prefetch_nbytes

    def note_plan(self, needed_nbytes: int) -> None:
        """The plan that is followed needs so much; 0: no more than the budget."""
        self._planned_nbytes = needed_nbytes

    def allowed_nbytes(self, *, is_on_host: bool) -> float:
        """The budget, or where that cannot be met, what must be allowed; see [Note: a budget that cannot be met]."""
        if self._budget_nbytes is None:
            return math.inf
        counters = self._counters
        staging = counters.staging_limit_nbytes if is_on_host else 0
        self._resident_nbytes = max(self._resident_nbytes, counters.resident_nbytes)
        if max(self._resident_nbytes, self._resident_before) + staging <= self._budget_nbytes:
            return self._budget_nbytes
        beside = counters.resident_nbytes + staging + _NUM_BESIDE * self._largest_nbytes
        return max(self._budget_nbytes, self._planned_nbytes, beside)

    def may_come_back(self, nbytes: int, *, is_on_host: bool) -> bool:
        """Whether the budget allows to reload so many bytes ahead of need."""
        counters, allowed = self._counters, self.allowed_nbytes(is_on_host=is_on_host)
        if counters.committed_nbytes(is_on_host=is_on_host) + nbytes <= allowed:
            return True
        is_beyond = self._budget_nbytes is not None and allowed > self._budget_nbytes
        return is_beyond and counters.prefetched_nbytes + nbytes <= _NUM_RECORDS * self._largest_nbytes

    def note_saved(self, record: SavedRecord) -> bool:
        """A record more is alive; whether other bounds are in force."""
        alive = self._counters.live_nbytes
        if alive > self._buffers.saved_nbytes:
            self._buffers.note_saved(alive, record.nbytes, self._counters.offloaded_nbytes - self._sent_before)
        if self._counters.is_declining:
            self._begin_where_it_pays(alive, record)
        if record.nbytes <= self._largest_nbytes:
            return False
        self._note_largest(record)
        return True

    def _begin_where_it_pays(self, alive_nbytes: int, record: SavedRecord) -> None:
        counters, buffers, is_on_host = self._counters, self._buffers, record.device.driver is None
        counters.pays_at_nbytes = buffers.pays_at_nbytes(is_on_host=is_on_host)
        is_decided = bool(self._num_reviewed)
        least = counters.pays_at_nbytes if is_decided else buffers.begins_at_nbytes(is_on_host=is_on_host)
        counters.is_declining = alive_nbytes < least

    def note_step_over(self) -> bool:
        """It is known by now how much a step saves; whether that is too little for moving to pay."""
        counters, saved = self._counters, self._buffers.saved_nbytes
        self._num_reviewed += 1
        self._resident_before, self._resident_nbytes = self._resident_nbytes, 0
        self._buffers.note_sent(counters.offloaded_nbytes - self._sent_before)
        self._sent_before = counters.offloaded_nbytes
        self._may_decline = self._may_decline and saved < counters.pays_at_nbytes
        if self._may_decline and (self._num_reviewed < _FIRST_STEPS or self._num_reviewed % _ASK_EVERY == 0):
            self._may_decline = not _is_short(saved)
        counters.is_declining = self._may_decline and saved > 0
        return counters.is_declining

    def _note_largest(self, record: SavedRecord) -> None:
        self._largest_nbytes = record.nbytes
        if record.device.driver is None or not any(self._may_grow):
            return
        room = cast(Accelerator, record.device).free_nbytes() // _FREE_SHARE
        most = min(_NUM_RECORDS * record.nbytes, room)
        counters, (staging, prefetch) = self._counters, self._may_grow
        counters.staging_limit_nbytes = max(counters.staging_limit_nbytes, most if staging else 0)
        counters.prefetch_limit_nbytes = max(counters.prefetch_limit_nbytes, most if prefetch else 0)
