"""Pipelines of `torch.distributed.pipelining`, two ranks with gloo: many graphs alive, backward order learned.

No schedule says anything to ssdtrain. Zero-bubble schedules split backward in two, which walks every graph twice.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from folders import JOBS
from forks import Forks, ranks

IN_ORDER = ["ScheduleGPipe", "Schedule1F1B", "ScheduleInterleaved1F1B", "ScheduleLoopedBFS"]
SPLIT = ["ScheduleInterleavedZeroBubble", "ScheduleZBVZeroBubble"]
LEARNED = 3  # steps: the first differs from the rest, and a plan is for what was seen twice

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

Facts = list[dict[str, Any]]


@pytest.fixture(scope="module")
def facts(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """What both ranks came back with."""
    folder = tmp_path_factory.mktemp("pipeline")
    done = forks.run([JOBS / "pipelining_worker.py", folder, *IN_ORDER, *SPLIT], ranks(2))
    assert [rank.returncode for rank in done] == [0, 0], done
    return [json.loads(rank.stdout.splitlines()[-1]) for rank in done]


@pytest.mark.parametrize("mode", ["auto", "all"])
@pytest.mark.parametrize("name", IN_ORDER + SPLIT)
def test_equal_to_the_bit_and_on_the_drive(facts: Facts, name: str, mode: str) -> None:
    for fact in facts:
        own = fact[f"{name} {mode}"]
        assert own["is_equal"] and own["num_compared"] > 50
        assert own["num_offloaded"] > 50 and own["written_nbytes"] > 0 and own["num_reloads"] > 50
        assert own["num_live_records"] == 0


@pytest.mark.parametrize("name", IN_ORDER)
def test_backward_order_is_learned(facts: Facts, name: str) -> None:
    """Hardly any reload is on demand, which is a wait, once a plan is followed; without one every tenth is."""
    for fact in facts:
        own = fact[f"{name} auto"]
        late = own["num_demands"][-1] - own["num_demands"][LEARNED]
        assert late <= 2 + 0.02 * own["num_reloads"], own
        assert own["plan"], "no plan was made"  # which one depends on how busy the machine is
