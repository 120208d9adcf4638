"""Our own buffers are a share of what training saves, up to what the policy allows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ssdtrain import ActivationPolicy
from ssdtrain.planner import Buffers

MIB = 1 << 20


def test_buffers_start_small_and_follow_the_largest_step() -> None:
    buffers = Buffers(ActivationPolicy())
    assert (buffers.staging_nbytes, buffers.idle_nbytes) == (16 * MIB, 0)
    assert not buffers.note_saved(32 * MIB, 4 * MIB)
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
