"""Optimizer state leaves whatever it is made of; what cannot leave is said, never left in memory without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import JOBS
from forks import Forks, ranks
from kept_state import Momentum
from state_tools import EAGER_STATE, check_same, model_of, train, values

import ssdtrain

WORKER = JOBS / "sharded_worker.py"


def offloaded(optimizer: torch.optim.Optimizer, folder: Path, **policy: Any) -> Any:
    return ssdtrain.offload_optimizer(optimizer, folder, EAGER_STATE | {"chunk_nbytes": 40_000} | policy)


@pytest.mark.parametrize("kind", ["quantised", "list", "nested", "graph", "sparse"])
def test_state_of_any_kind_leaves_or_is_said_to_stay(kind: str, tmp_path: Path) -> None:
    """Quantised state in a tensor subclass, and tensors in lists and dictionaries, used to stay: 0 bytes, no word."""
    plain, model = model_of("mlp"), model_of("mlp")
    expected, inner = Momentum(plain.parameters(), kind), Momentum(model.parameters(), kind)
    optimizer = offloaded(inner, tmp_path)
    check_same(train(model, optimizer, 5), train(plain, expected, 5))
    check_same(values(model), values(plain))
    num_elements = sum(p.numel() for p in model.parameters() if p.numel() >= 1024)
    nbytes = {"quantised": 1, "list": 8, "nested": 8}.get(kind, 0) * num_elements
    assert optimizer.stats.away_nbytes == nbytes
    words = {"graph": "part of a graph", "sparse": "not strided"}.get(kind)
    assert any(words in text for text in optimizer.stats.fallbacks) if words else not optimizer.stats.fallbacks
    state = optimizer.state_dict()["state"]
    optimizer.close()
    for i, p in enumerate(expected.state):
        if kind == "quantised":
            check_same(state[i]["m"].values(), expected.state[p]["m"].values())
            check_same(inner.state_dict()["state"][i]["m"].codes, expected.state[p]["m"].codes)
        elif kind != "sparse":
            check_same(state[i], expected.state[p])
    check_same(train(model, inner, 2, first=5), train(plain, expected, 2, first=5))


def test_quantised_state_is_loaded(tmp_path: Path) -> None:
    """A state dict has tensors of the class they were, and goes on from there."""
    plain, model = model_of("mlp"), model_of("mlp")
    expected = Momentum(plain.parameters(), "quantised")
    optimizer = offloaded(Momentum(model.parameters(), "quantised"), tmp_path)
    train(plain, expected, 3)
    train(model, optimizer, 3)
    saved = optimizer.state_dict()
    optimizer.close()
    resumed = offloaded(Momentum(model.parameters(), "quantised"), tmp_path)
    resumed.load_state_dict(saved)
    assert resumed.stats.away_nbytes > 0
    check_same(train(model, resumed, 3, first=3), train(plain, expected, 3, first=3))
    check_same(values(model), values(plain))


def test_sharded_parameters(forks: Forks, tmp_path: Path) -> None:
    """After `fully_shard` state is made of DTensors: each rank's part leaves, equal to the bit, saved and loaded."""
    for rank in forks.run([WORKER, tmp_path], ranks(2)):
        assert rank.returncode == 0, rank.stderr
        for name, found in json.loads(rank.stdout.splitlines()[-1]).items():
            num_moments = 2 if name == "AdamW" else 1
            # Of four weights of 48 x 48 each rank has half; biases are smaller than min_nbytes.
            assert found == {"is_equal": True, "away_nbytes": num_moments * 4 * 48 * 48 * 4 // 2}
