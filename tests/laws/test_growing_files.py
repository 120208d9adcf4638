"""A file system that takes its time to make a spill file longer holds up whoever needs the room, and nobody else.

Every body runs in a child of its own, where a library plays the drive: see `fault_tools` and `preload.c`.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from engine_tools import eventually
from fault_tools import ENGINES, KIB, Lab, Trainer, check_equal, drain, plain_steps, policy

import ssdtrain
from ssdtrain.io import spill_space
from ssdtrain.policy import OptimizerPolicy
from ssdtrain.store.record import Record
from ssdtrain.store.state_store import StateStore

every_engine = pytest.mark.parametrize("engine", ENGINES)
PATIENT = {"io_timeout_seconds": 120.0}  # longer than the child may live


def stick(under: str) -> None:
    """From here on nothing that makes a file longer returns."""
    os.environ["FAKE_STUCK_UNDER"] = under
    os.environ["FAKE_STUCK"] = "g"


def is_growing() -> bool:
    return any(thread.name == "ssdtrain-timed-call" for thread in threading.enumerate())


def backward_goes_on(directory: str, engine: str) -> None:
    spill_space._FIRST_NBYTES = 0
    spill_space._GROW_NBYTES = 0
    offload = ssdtrain.offload_activations(directory, policy(engine, **PATIENT))
    first, second = Trainer(), Trainer()
    with offload:
        loss = first.forward()
    drain(offload)
    losses = list[torch.Tensor]()

    def needs_room() -> None:
        with offload:
            losses.append(second.forward())

    stick(directory)
    waiting = threading.Thread(target=needs_room)
    waiting.start()
    assert eventually(is_growing)
    check_equal(first.finish(loss), plain_steps(1)[0])
    assert waiting.is_alive() and offload.stats.read_nbytes > 0
    del os.environ["FAKE_STUCK"]
    waiting.join()
    check_equal(second.finish(losses[0]), plain_steps(1)[0])
    assert not offload.stats.fallbacks, offload.stats.fallbacks
    offload.close()


@every_engine
def test_backward_goes_on_while_another_thread_waits_for_room(lab: Lab, tmp_path: Path, engine: str) -> None:
    """Its unpacks hung on the lock for as long as the file system took, up to `io_timeout_seconds`."""
    lab.run(backward_goes_on, str(tmp_path), engine)


def state_goes_on(directory: str, engine: str) -> None:
    spill_space._FIRST_NBYTES = 0
    spill_space._GROW_NBYTES = 0
    store = StateStore([directory], OptimizerPolicy(engine=engine, staging_nbytes=1024 * KIB, **PATIENT))
    small, large = Record("small"), Record("large")
    store.write(small, torch.arange(KIB).untyped_storage())
    store.flush()
    stick(directory)
    waiting = threading.Thread(target=store.write, args=(large, torch.arange(64 * KIB).untyped_storage()))
    waiting.start()
    assert eventually(is_growing)
    storage = store.wait(store.read(small))
    assert torch.equal(torch.empty(0, dtype=torch.int64).set_(storage), torch.arange(KIB))
    assert waiting.is_alive()
    del os.environ["FAKE_STUCK"]
    waiting.join()
    storage = store.wait(store.read(large))
    assert torch.equal(torch.empty(0, dtype=torch.int64).set_(storage), torch.arange(64 * KIB))
    assert store.counters.fallbacks == []
    store.close()


@every_engine
def test_state_is_read_while_another_thread_waits_for_room(lab: Lab, tmp_path: Path, engine: str) -> None:
    lab.run(state_goes_on, str(tmp_path), engine)
