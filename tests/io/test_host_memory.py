"""Host memory that is little at first and grows as it is used: the host tier takes what there is, and more later."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import ssdtrain
from ssdtrain.devices.simulated import SimulatedDevice
from ssdtrain.io import host_space
from ssdtrain.io.host_space import HostSpace
from ssdtrain.io.open_engine import open_engine
from ssdtrain.policy import ActivationPolicy

pytest.importorskip("ssdtrain._C", reason="the host tier is the extension's")

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SLAB_NBYTES = 4 * KIB


class Memory:
    """What the kernel says is free, and the tier that is asked to grow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free_nbytes: int) -> None:
        self.free_nbytes = free_nbytes
        self.grown: list[int] = []
        self.said: list[str] = []
        monkeypatch.setattr(host_space, "available_nbytes", lambda: self.free_nbytes)
        monkeypatch.setattr(host_space, "_RETRY_SECONDS", 0.0)

    def grow(self, nbytes: int) -> str:
        self.free_nbytes -= nbytes - (self.grown[-1] if self.grown else 0)
        self.grown.append(nbytes)
        return ""

    def space(self, limit_nbytes: int, *, takes_half: bool) -> HostSpace:
        return HostSpace(0, limit_nbytes, self.grow, self.said.append, takes_half=takes_half)


def test_half_of_what_is_free_is_asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch, 64 * MIB)
    space = memory.space(1 << 40, takes_half=True)
    assert space.room_nbytes == 32 * MIB
    assert space.allocate(20 * MIB) is not None and memory.grown == [32 * MIB]
    assert space.allocate(20 * MIB) is None
    assert len(memory.said) == 1 and "while 32.0 MiB of host memory are free" in memory.said[0]
    memory.free_nbytes = 10 * GIB  # the machine has got more
    assert space.allocate(20 * MIB) is not None
    assert memory.grown == [32 * MIB, 32 * MIB + 256 * MIB], "in steps"
    assert space.room_nbytes > 5 * GIB - 256 * MIB and len(memory.said) == 1


def test_a_limit_that_was_set_takes_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch, 64 * MIB)
    space = memory.space(GIB, takes_half=False)
    assert space.room_nbytes == GIB
    assert space.allocate(60 * MIB) is not None and memory.grown == [64 * MIB]
    assert space.allocate(60 * MIB) is None
    memory.free_nbytes = 2 * GIB
    assert space.allocate(60 * MIB) is not None
    assert space.allocate(2 * GIB) is None and memory.grown[-1] <= GIB


def test_memory_is_pinned_while_others_allocate_and_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinning 256 MiB takes a tenth of a second: nobody else waits for it."""
    memory = Memory(monkeypatch, 10 * GIB)
    begun, may_end = threading.Event(), threading.Event()
    space = HostSpace(0, GIB, memory.grow, memory.said.append)
    first = space.allocate(200 * MIB)
    assert first is not None

    def grow_slowly(nbytes: int) -> str:
        begun.set()
        assert may_end.wait(30)
        return memory.grow(nbytes)

    space._grow = grow_slowly
    thread = threading.Thread(target=space.prepare, args=(200 * MIB,))
    thread.start()
    assert begun.wait(30)
    assert space.allocate(200 * MIB) is None, "not there yet"
    small = space.allocate(50 * MIB)
    assert small is not None
    space.release(small)
    may_end.set()
    thread.join()
    assert space.allocate(200 * MIB) is not None
    assert len(memory.grown) == 2


def test_there_are_addresses_for_more_than_there_is_memory() -> None:
    """1 TiB: Linux refuses to map so much where it has to promise the memory."""
    choice = open_engine("threads", [], 16 * SLAB_NBYTES, SLAB_NBYTES, host_nbytes=None)
    assert choice.takes_half and choice.host_nbytes == 1 << 40
    choice.close()
    explicit = open_engine("threads", [], 16 * SLAB_NBYTES, SLAB_NBYTES, host_nbytes=256 * GIB)
    assert not explicit.takes_half and explicit.host_nbytes == 256 * GIB
    explicit.close()


LIMITED = """
import resource
from ssdtrain.io.open_engine import open_engine
resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
choice = open_engine("threads", [], 65536, 4096, host_nbytes=None)
assert choice.takes_half and (1 << 30) <= choice.host_nbytes < (24 << 30), choice.host_nbytes
choice.close()
try:
    open_engine("threads", [], 65536, 4096, host_nbytes=32 << 30)
except RuntimeError as error:
    print(error)
"""


def test_few_addresses_are_taken_where_few_are_allowed() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "bytes of address space for the host tier" in done.stdout and "lower host_nbytes" in done.stdout


def test_training_fills_the_host_tier_as_memory_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch, 256 * KIB)
    monkeypatch.setattr(host_space, "_GROW_NBYTES", 64 * KIB)
    policy = ActivationPolicy(min_nbytes=0, mode="all", staging_nbytes=64 * KIB, prefetch_nbytes=64 * KIB)
    grads, peaks = [], []
    with SimulatedDevice(seed=1) as device:
        offload = ssdtrain.ActivationOffload(None, policy, None, device)
        for free_nbytes in (256 * KIB, GIB):
            memory.free_nbytes = free_nbytes
            x = torch.linspace(0, 1, 2048, requires_grad=True)
            y = x
            with offload:
                for _ in range(48):
                    y = y.sin()
            y.sum().backward()
            assert x.grad is not None
            grads.append(x.grad.tolist())
            peaks.append(offload.stats.peak_host_nbytes)
            assert offload.stats.host_limit_nbytes >= peaks[-1]
        offload.close()
    device.close()
    assert grads[0] == grads[1] and 0 < peaks[0] <= 256 * KIB < peaks[1]
