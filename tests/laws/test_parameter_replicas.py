"""Two ranks with gloo: what replicates offloaded models trains them as plain ones; what shards them is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from folders import JOBS
from forks import Forks, ranks


@pytest.fixture(scope="module")
def facts(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks came back with."""
    environments = [rank | {"ACCELERATE_USE_CPU": "1"} for rank in ranks(2)]
    done = forks.run([JOBS / "replicas_worker.py", tmp_path_factory.mktemp("replicas")], environments)
    assert [rank.returncode for rank in done] == [0, 0], done
    return [json.loads(rank.stdout.splitlines()[-1]) for rank in done]


def test_replicas_train_as_plain_ones(facts: list[dict[str, Any]]) -> None:
    """DistributedDataParallel evens out and averages the values, not placeholders; so does Accelerate's `prepare`."""
    for fact in facts:
        assert fact["replicas"] and fact["views"] and fact["prepared"] is not False


def test_broadcasts_by_hand(facts: list[dict[str, Any]]) -> None:
    assert all(fact["broadcast"] for fact in facts)


def test_sharding_is_refused_by_name(facts: list[dict[str, Any]]) -> None:
    """FSDP of both kinds puts parameters of its own in the place of ours: it hears so before it has changed one."""
    for fact in facts:
        assert len(fact["refused"]) == 6
        for message in fact["refused"]:
            assert message.startswith("Expected a module whose parameters are in memory for FSDP"), message
