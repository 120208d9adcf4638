"""Our own buffers are a share of what training saves, up to what the policy allows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssdtrain import ActivationPolicy
from ssdtrain.planner import Buffers, Goal, Lifetime, Machine, Step, Tier, make_plan

MIB = 1 << 20


def test_buffers_start_small_and_follow_the_largest_step() -> None:
    buffers = Buffers(ActivationPolicy())
    assert (buffers.staging_nbytes, buffers.idle_nbytes, buffers.pays) == (16 * MIB, 0, False)
    assert not buffers.note_saved(31 * MIB, 4 * MIB) and not buffers.pays
    assert not buffers.note_saved(32 * MIB, 4 * MIB) and buffers.pays
    assert buffers.note_saved(1024 * MIB, 16 * MIB)
    assert (buffers.staging_nbytes, buffers.prefetch_nbytes, buffers.idle_nbytes) == (64 * MIB, 64 * MIB, 32 * MIB)
    assert not buffers.note_saved(100 * MIB, 16 * MIB)  # a smaller step: what was pinned stays
    assert buffers.staging_nbytes == 64 * MIB


@given(
    staging=st.integers(1, 512),
    prefetch=st.integers(0, 512),
    alive=st.lists(st.integers(1, 8192), min_size=1, max_size=20),
)
def test_what_comes_on_top_of_training_is_a_small_share_of_what_it_saves(
    staging: int, prefetch: int, alive: list[int]
) -> None:
    policy = ActivationPolicy(staging_nbytes=staging * MIB, prefetch_nbytes=prefetch * MIB)
    buffers = Buffers(policy)
    for nbytes in alive:
        buffers.note_saved(nbytes * MIB, MIB)
    most = max(alive) * MIB
    assert buffers.staging_nbytes <= min(policy.staging_nbytes, max(16 * MIB, most // 16))
    assert buffers.idle_nbytes <= min(policy.prefetch_nbytes, most // 32)


@pytest.mark.parametrize("asked", [{"mode": "all"}, {"memory_budget": MIB}])
def test_who_asks_for_the_lowest_memory_gets_it_whatever_the_size(asked: dict[str, object]) -> None:
    assert Buffers(ActivationPolicy.of(asked)).pays


def test_a_plan_counts_staging_and_declines_below_what_it_costs() -> None:
    """What lowers the peak of saved tensors by less than the staging it needs lowers no one's memory."""
    records = tuple(Lifetime(MIB, saved=i, needed=40.0 - i, released=40.5 - i) for i in range(20))
    step = Step(records, 41.0)
    fast = Machine(Tier(1e12, 1e12), staging_nbytes=8 * MIB, prefetch_nbytes=4 * MIB)
    assert not make_plan(step, fast, Goal()).is_declined
    dear = Machine(Tier(1e12, 1e12), staging_nbytes=8 * MIB, prefetch_nbytes=4 * MIB, buffers_nbytes=20 * MIB)
    assert make_plan(step, dear, Goal()).is_declined
    little = Machine(Tier(1e12, 1e12), pays_at_nbytes=32 * MIB)
    plan = make_plan(step, little, Goal())
    assert plan.is_declined
    assert plan.statement == (
        "declined: saved tensors are 20.0 MiB: nothing to gain; offloading begins to pay at about 32.0 MiB here"
    )
