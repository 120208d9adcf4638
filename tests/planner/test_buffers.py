"""Our own buffers are a share of what training saves, up to what the policy allows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ssdtrain import ActivationPolicy
from ssdtrain.planner import Buffers, Goal, Lifetime, Machine, Step, Tier, make_plan

MIB = 1 << 20


def test_buffers_start_small_and_follow_the_largest_step() -> None:
    buffers = Buffers(ActivationPolicy())
    assert (buffers.staging_nbytes, buffers.idle_nbytes) == (16 * MIB, 0)
    buffers.note_saved(32 * MIB, 4 * MIB, 28 * MIB)
    assert buffers.staging_nbytes == 16 * MIB
    buffers.note_saved(1024 * MIB, 16 * MIB, 100 * MIB)  # the drive is slow
    assert buffers.staging_nbytes == 16 * MIB
    buffers.note_sent(1024 * MIB)
    assert (buffers.staging_nbytes, buffers.prefetch_nbytes, buffers.idle_nbytes) == (64 * MIB, 64 * MIB, 32 * MIB)
    buffers.note_saved(100 * MIB, 16 * MIB, 0)  # a smaller step: what was pinned stays
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
        buffers.note_saved(nbytes * MIB, MIB, nbytes * MIB)
    most = max(alive) * MIB
    assert buffers.staging_nbytes <= min(policy.staging_nbytes, max(16 * MIB, most // 16))
    assert buffers.idle_nbytes <= min(policy.prefetch_nbytes, most // 32)


def test_staging_follows_what_a_plan_sends() -> None:
    buffers = Buffers(ActivationPolicy(staging_nbytes=64 * MIB))
    buffers.note_saved(2048 * MIB, 16 * MIB, 2048 * MIB)
    assert buffers.staging_nbytes == 64 * MIB
    for sent, staging in ((100, 8), (300, 16), (2048, 64), (0, 8)):
        buffers.note_planned(sent * MIB)
        assert buffers.staging_nbytes == staging * MIB, sent
    assert buffers.staging_limit_nbytes == 64 * MIB


def test_a_plan_counts_staging_where_it_is_in_the_memory_that_tensors_are_saved_in() -> None:
    records = tuple(Lifetime(16 * MIB, i + 1.0, 40.0 - i, 41.0 - i) for i in range(16))
    step, machine = Step(records, 45.0), Machine(Tier(16 * MIB, 64 * MIB))
    elsewhere = make_plan(step, machine, Goal())
    same = make_plan(step, machine, Goal(staging_limit_nbytes=64 * MIB))
    assert elsewhere.disk_nbytes == same.disk_nbytes > 128 * MIB
    assert same.peak_nbytes == elsewhere.peak_nbytes + 8 * MIB
    little = Step(tuple(Lifetime(MIB, i + 1.0, 40.0 - i, 41.0 - i) for i in range(7)), 45.0)
    plan = make_plan(little, machine, Goal(staging_limit_nbytes=64 * MIB))
    assert plan.peak_nbytes >= plan.kept_peak_nbytes and "does not fall" in plan.statement
