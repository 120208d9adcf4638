"""How large our own buffers may be: a share of what training saves, up to what the policy allows.

Numbers only. Staging and memory kept for later reloads come on top of what training would hold anyway, so they start
small and grow with the largest step that was seen. What is prefetched is part of what training saved; its bound decides
how much of that is back in memory early.
"""

from __future__ import annotations

from ssdtrain.policy import ActivationPolicy

_LEAST_NBYTES = 16 << 20  # of staging and of prefetching: a few requests of a fast drive
_SHARE = 16  # staging, and what is prefetched, are at most one part in so many of what is saved, or the least
_IDLE_SHARE = 32
_HOST_TIMES = 10  # the buffers begun with: moving from host memory pays when so much is saved, as glibc keeps much too
_DEVICE_TIMES = 4  # what comes back early: the other buffers are not in an accelerator's memory
_FIRST_TIMES = 2  # the buffers begun with: before that nothing sets out while it is not known whether it pays
_RESERVE_SHARE = 4  # of a memory budget, at most, for a tensor that no plan knows of


def reserve_nbytes(budget: int, largest_nbytes: int | None = None) -> int:
    """What of a memory budget stays free for a tensor that no plan knows of, the largest so far where that is known."""
    most = budget // _RESERVE_SHARE
    return most if largest_nbytes is None else min(most, largest_nbytes)


class Buffers:
    """The sizes of staging, prefetching and idle memory of one offload context, by what it has seen so far."""

    def __init__(self, policy: ActivationPolicy) -> None:
        """Nothing was saved yet."""
        self._policy = policy
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

    def note_saved(self, alive_nbytes: int, nbytes: int) -> bool:
        """So many bytes are alive, the latest record with `nbytes`; whether staging may be larger now."""
        self._largest_nbytes = max(self._largest_nbytes, nbytes)
        self.saved_nbytes = max(self.saved_nbytes, alive_nbytes)
        before = self.staging_nbytes
        self._fit()
        return self.staging_nbytes > before

    def _fit(self) -> None:
        policy, share = self._policy, self.saved_nbytes // _SHARE
        while self.staging_nbytes * 2 <= share and self.staging_nbytes < policy.staging_nbytes:
            self.staging_nbytes = min(2 * self.staging_nbytes, policy.staging_nbytes)  # pinned anew: not every time
        self.prefetch_nbytes = max(share, _LEAST_NBYTES, 2 * self._largest_nbytes)
        self.idle_nbytes = min(policy.idle_nbytes, self.saved_nbytes // _IDLE_SHARE)
