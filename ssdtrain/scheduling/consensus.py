"""Ranks of one job plan with the same bandwidths: the lowest that any of them measured.

Replicas wait for each other in every step, so a plan that only the fastest drive can follow gains nothing. What is
shared are measurements, not plans: stages of a pipeline have steps of their own.

[Note: no collective]
Ranks may take different numbers of steps, or end at different times, and a collective would then hang. So the job's
key-value store is used: a rank publishes when its measurement has changed by much, and looks at one counter per step to
see whether anybody has. Nobody waits; a store that does not answer is left alone from then on.
"""

from __future__ import annotations

import json
import logging
from typing import Protocol

import torch.distributed

from ssdtrain.scheduling.bandwidth import Speeds, lowest

logger = logging.getLogger("ssdtrain")

_CHANGE = 0.1  # of a bandwidth: less is not published


class Store(Protocol):
    """What is used of `torch.distributed.Store`."""

    def add(self, key: str, amount: int, /) -> int:
        """Adds to a counter; its value."""

    def set(self, key: str, value: str, /) -> None:
        """Writes."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all of them were written."""

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """Reads; waits for those that were not written."""


class Consensus:
    """One offload context on every rank: those made first, second, ... in each process belong together."""

    def __init__(self, store: Store, rank: int, num_ranks: int) -> None:
        """Joins. `store` is the job's."""
        self._store = store
        self._rank, self._num_ranks = rank, num_ranks
        number = store.add(f"ssdtrain contexts of rank {rank}", 1)
        self._prefix = f"ssdtrain context {number}"
        self._num_seen = 0
        self._own: Speeds = (0.0, 0.0, 0.0, 0.0)
        self._others: list[Speeds] = []
        self._is_alone = num_ranks == 1

    def lowest(self, own: Speeds) -> Speeds:
        """The lowest of what ranks have measured; never waits for one that has not."""
        if not self._is_alone:
            try:
                self._publish(own)
                self._look()
            except (RuntimeError, ValueError) as error:  # the store's process may be gone: training decides, not we
                self._is_alone = True
                logger.warning("bandwidths are not shared between ranks any more: %s", error)
        return lowest([own, *self._others])

    def _publish(self, own: Speeds) -> None:
        if all(abs(new - old) <= _CHANGE * old for new, old in zip(own, self._own, strict=True)):
            return
        self._own = own
        self._store.set(self._key(self._rank), json.dumps(own))
        self._store.add(self._prefix, 1)

    def _look(self) -> None:
        num = self._store.add(self._prefix, 0)
        if num == self._num_seen:
            return
        self._num_seen = num
        others = [self._key(rank) for rank in range(self._num_ranks) if rank != self._rank]
        there = [key for key in others if self._store.check([key])]
        self._others = [tuple(json.loads(speeds)) for speeds in self._store.multi_get(there)] if there else []

    def _key(self, rank: int) -> str:
        return f"{self._prefix} rank {rank}"


def consensus_of_job() -> Consensus | None:
    """Joins the ranks of the running job; None where there are none."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    if torch.distributed.get_world_size() == 1:
        return None
    store = torch.distributed.distributed_c10d._get_default_store()
    return Consensus(store, torch.distributed.get_rank(), torch.distributed.get_world_size())
