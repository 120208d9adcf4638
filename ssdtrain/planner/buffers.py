"""How large our own buffers may be: a share of what training saves, up to what the policy allows.

Numbers only. Staging and memory kept for later reloads come on top of what training would hold anyway, so they start
small and grow with the largest step that was seen. What is prefetched is part of what training saved; its bound decides
how much of that is back in memory early.

[Note: staging]
Its size follows what a step sends, not what it saves: a slow drive takes little, and that little passes through few
slabs. Where tensors are saved in host memory, staging takes of the memory that it is to free. So a plan, which knows
what is sent, lets it shrink there; pinned memory of an accelerator stays.
"""

from __future__ import annotations

from ssdtrain.policy import ActivationPolicy, staging_under

_LEAST_NBYTES = 16 << 20  # of staging and of prefetching: a few requests of a fast drive
_LEAST_PLANNED_NBYTES = 8 << 20  # of staging: a plan knows that the drive is busy with so much
_SHARE = 16  # staging is one part in so many of what is sent, what is prefetched of what is saved, or the least
_IDLE_SHARE = 32
_HOST_TIMES = 10  # the buffers begun with: moving from host memory pays when so much is saved, as glibc keeps much too
_DEVICE_TIMES = 4  # what comes back early: the other buffers are not in an accelerator's memory
_FIRST_TIMES = 2  # the buffers begun with: before that nothing sets out while it is not known whether it pays
_FEW_MIB = 32 << 20
_RESERVE_SHARE = 4  # of a memory budget, at most, for a tensor that no plan knows of


def reserve_nbytes(budget: int, largest_nbytes: int | None = None) -> int:
    """What of a memory budget stays free for a tensor that no plan knows of, the largest so far where that is known."""
    most = budget // _RESERVE_SHARE
    return most if largest_nbytes is None else min(most, largest_nbytes)


def smallest_budget(held_nbytes: int, staging_nbytes: int, *, is_set: bool) -> int:
    """The budget that leaves so much room for what is held.

    `staging_nbytes`: what staging takes of this memory, 0 where it is in another. `is_set`: it is that, whatever the
    budget.
    """
    if is_set or not staging_nbytes:
        return held_nbytes + staging_nbytes
    budget = held_nbytes + staging_nbytes
    while (needed := held_nbytes + staging_under(budget)) > budget:
        budget = needed
    return budget


def budget_text(nbytes: int) -> str:
    """As a policy takes it, rounded up."""
    unit, name = (1 << 20, "MiB") if nbytes >= _FEW_MIB else (1 << 10, "KiB")
    return f'"{-(-nbytes // unit)}{name}"'


def staging_nbytes_for(sent_nbytes: float, limit: int, least: int = _LEAST_PLANNED_NBYTES) -> int:
    """The staging through which so many bytes of a step go to the drive, of at most `limit`."""
    nbytes = min(limit, least)
    while nbytes * 2 <= sent_nbytes // _SHARE and nbytes < limit:
        nbytes = min(2 * nbytes, limit)  # pinned anew: not every time
    return nbytes


class Buffers:
    """The sizes of staging, prefetching and idle memory of one offload context, by what it has seen so far."""

    def __init__(self, policy: ActivationPolicy) -> None:
        """Nothing was saved yet."""
        self._policy = policy
        self._sent_nbytes = 0  # of one step; see [Note: staging]
        self._is_planned = False
        self.saved_nbytes = 0
        """Most bytes of saved tensors alive at once, wherever they were."""
        self._largest_nbytes = 0  # of one record
        self.staging_nbytes = min(policy.staging_nbytes, _LEAST_NBYTES)
        """Staging in use at most."""
        self.prefetch_nbytes = 0
        """Bytes reloaded before backward asks for them, at most, where the policy allows so many."""
        self.idle_nbytes = 0
        """Memory of released reloads that is kept for the next ones, at most."""
        self._fit()

    @property
    def staging_limit_nbytes(self) -> int:
        """What the policy allows."""
        return self._policy.staging_nbytes

    def pays_at_nbytes(self, *, is_on_host: bool) -> int:
        """So many bytes of saved tensors have to be alive at once for moving them to pay."""
        if self._policy.decline_below_nbytes is not None:
            return self._policy.decline_below_nbytes
        return _HOST_TIMES * self._begun_with if is_on_host else _DEVICE_TIMES * self._early

    def begins_at_nbytes(self, *, is_on_host: bool) -> int:
        """So many have to be alive for moving to begin in the first step: nobody knows yet how much it saves."""
        return min(self.pays_at_nbytes(is_on_host=is_on_host), _FIRST_TIMES * self._begun_with)

    @property
    def _early(self) -> int:
        return min(self._policy.prefetch_nbytes, _LEAST_NBYTES)

    @property
    def _begun_with(self) -> int:
        return self._early + min(self._policy.staging_nbytes, _LEAST_NBYTES)

    def note_saved(self, alive_nbytes: int, nbytes: int, sent_nbytes: int) -> None:
        """So many bytes are alive, the latest record with `nbytes`; this step has sent so many."""
        self._largest_nbytes = max(self._largest_nbytes, nbytes)
        self.saved_nbytes = max(self.saved_nbytes, alive_nbytes)
        self.note_sent(sent_nbytes)

    def note_sent(self, nbytes: int) -> None:
        """A step has sent so many bytes so far."""
        if not self._is_planned:
            self._sent_nbytes = max(self._sent_nbytes, nbytes)
        self._fit()

    def note_planned(self, sent_nbytes: int) -> None:
        """A step sends so many bytes of host memory from now on."""
        self._sent_nbytes, self._is_planned = sent_nbytes, True
        self._fit()

    def _fit(self) -> None:
        policy, sent = self._policy, min(self._sent_nbytes, self.saved_nbytes)
        least = _LEAST_PLANNED_NBYTES if self._is_planned else _LEAST_NBYTES
        self.staging_nbytes = staging_nbytes_for(sent, policy.staging_nbytes, least)
        self.prefetch_nbytes = max(self.saved_nbytes // _SHARE, _LEAST_NBYTES, 2 * self._largest_nbytes)
        self.idle_nbytes = min(policy.idle_nbytes, self.saved_nbytes // _IDLE_SHARE)
