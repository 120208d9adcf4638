"""What the tests on the stand-in share: contexts of each tier, and gates that hold a stream still."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import standin_gpu

import ssdtrain

POLICY = {"min_nbytes": "64KiB", "staging_nbytes": "16MiB"}
TIERS = [(mode, tier) for mode in ("all", "auto") for tier in ("drive", "host")]
Make = Callable[..., ssdtrain.ActivationOffload]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes contexts of a tier, closed at the end; whatever a kernel raised on the way fails the test."""
    made: list[ssdtrain.ActivationOffload] = []

    def make_context(tier: str = "drive", **fields: Any) -> ssdtrain.ActivationOffload:
        made.append(ssdtrain.offload_activations(tmp_path if tier == "drive" else None, POLICY | fields))
        return made[-1]

    yield make_context
    for offload in made:
        offload.close()
    failed, standin_gpu.errors[:] = list(standin_gpu.errors), []
    assert not failed


class Gate:
    """Holds the current stream still until it is opened, so that the device is far behind the process."""

    def __init__(self) -> None:
        self._is_open = threading.Event()
        standin_gpu.enqueue(lambda: self._is_open.wait(30))

    def open(self) -> None:
        self._is_open.set()


@pytest.fixture
def gates() -> Iterator[Callable[[], Gate]]:
    """Makes gates, which are open at the end."""
    made: list[Gate] = []

    def make_gate() -> Gate:
        made.append(Gate())
        return made[-1]

    yield make_gate
    for gate in made:
        gate.open()
