"""Two ranks with gloo: what replicates offloaded models trains them as plain ones; what shards them is refused."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

import pytest
from folders import HELPERS, JOBS, ROOT

LIMIT_SECONDS = 300


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks came back with."""
    folder = tmp_path_factory.mktemp("replicas")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(JOBS / "replicas_worker.py"), str(folder), str(rank)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | shared
            | {"PYTHONPATH": f"{ROOT}{os.pathsep}{HELPERS}"}
            | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=LIMIT_SECONDS)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


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
