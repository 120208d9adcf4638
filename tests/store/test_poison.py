"""An interrupt at every single step of a change: the lock is poisoned, and what follows is right all the same."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import ssdtrain
from ssdtrain.store.poisonable_lock import ClosedError, PoisonableLock

MIB = 1 << 20
POLICY = {"min_nbytes": 0, "staging_nbytes": MIB, "mode": "all", "engine": "threads"}
OUR_FILES = (
    "activations/activation_store.py",
    "activations/open_drive.py",
    "activations/writeback.py",
    "store/tensor_store.py",
    "store/pending.py",
    "io/drive.py",
    "activations/reload.py",
    "io/host_space.py",
    "io/spill_space.py",
    "io/extents.py",
    "scheduling/schedule.py",
    "tracing/pass_trace.py",
    "store/record.py",
)


class Owner:
    def __init__(self) -> None:
        self.num_resets = 0
        self.lock = PoisonableLock(self.reset)

    def reset(self) -> None:
        self.num_resets += 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, TimeoutError, AssertionError])
def test_a_change_that_was_not_finished_poisons_the_lock(error: type[BaseException]) -> None:
    owner = Owner()
    with pytest.raises(error), owner.lock:
        raise error
    assert owner.num_resets == 0
    with owner.lock:
        assert owner.num_resets == 1
    with owner.lock:
        assert owner.num_resets == 1


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ClosedError("closed"), MemoryError()])
def test_errors_that_are_part_of_the_contract_do_not(error: Exception) -> None:
    owner = Owner()
    with pytest.raises(type(error)), owner.lock:
        raise error
    with owner.lock:
        assert owner.num_resets == 0


class Interrupter:
    """Raises `KeyboardInterrupt` at the n-th line that the cache's files execute."""

    def __init__(self, at: int) -> None:
        self.at, self.num_lines = at, 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        if not code.co_filename.endswith(tuple(f"ssdtrain/{name}" for name in OUR_FILES)):
            return None
        if code.co_name in ("_noted", "_held", "__del__"):  # no signal is answered before the note is there
            return None
        if event == "line":
            self.num_lines += 1
            if self.num_lines == self.at:
                raise KeyboardInterrupt
        return self

    @contextmanager
    def active(self) -> Iterator[None]:
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(None)


def train(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return [loss.detach(), *[parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]]


@pytest.mark.cpu_only
@pytest.mark.parametrize("is_shared", [False, True], ids=["own", "shared"])
def test_interrupted_at_every_line(tmp_path: Path, is_shared: bool) -> None:
    """Of a forward and a backward, each with an offload of its own; what comes after is equal to the bit.

    Threads that copy and write run on meanwhile, and memory they may touch must still be there. The drive may be that
    of an optimizer, whose state is not touched.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[layer for _ in range(3) for layer in (torch.nn.Linear(64, 64), torch.nn.GELU())])
    x = torch.randn(64, 64)
    expected = train(model, x)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.randn(64, 64))])
    optimizer.param_groups[0]["params"][0].grad = torch.randn(64, 64)
    home: Any = ssdtrain.offload_optimizer(optimizer, tmp_path, {"min_nbytes": 0, "staging_nbytes": 64 * 1024})
    home.step()
    state = copy.deepcopy(home.state_dict()["state"])
    at, num_begun_anew, interrupter = 0, 0, Interrupter(0)
    unraisable, sys.unraisablehook = sys.unraisablehook, lambda _: None  # swallowed where destructors run
    try:
        while at <= interrupter.num_lines + 40:
            at += 17 if at > 200 else 5
            interrupter = Interrupter(at)
            offload = ssdtrain.offload_activations(home if is_shared else tmp_path, POLICY)
            try:
                with interrupter.active(), offload:
                    train(model, x)
            except (KeyboardInterrupt, ClosedError):
                pass
            for _ in range(2):
                with offload:
                    actual = train(model, x)
                assert all(map(torch.equal, expected, actual)), f"interrupted at line {at}"
            num_begun_anew += any("interrupted" in text for text in offload.stats.fallbacks)
            assert offload.stats.num_live_records == 0, f"interrupted at line {at}"
            offload.close()
    finally:
        sys.unraisablehook = unraisable
    assert num_begun_anew > 10
    assert all(torch.equal(value, home.state_dict()["state"][0][name]) for name, value in state[0].items())
    home.close()
