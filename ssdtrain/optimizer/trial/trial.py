"""Whether an optimizer can update a few parameters at a time, found out on throw-away tensors before anything changes.

Small tensors stand for parameters of every group and number of dimensions. Shadows of the optimizer take the same steps
for them: one as it is, others in chunks, with state that leaves and comes back. What is equal to the bit may be
done with the real ones. Nothing of the optimizer, its parameters or the process is changed, random numbers included.

Knows optimizers; neither drives nor where state is.
"""

from __future__ import annotations

import contextlib
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ssdtrain.optimizer.shared_values import Key, SharedValues
from ssdtrain.optimizer.trial.rehearsal import (
    Setting,
    at_once,
    difference_of,
    first_line,
    in_chunks,
    rehearse,
    state_ratio,
)
from ssdtrain.optimizer.trial.shadow import Like, Shadow, StateOf, make_shadow

_SETTINGS = (
    Setting(),
    Setting(has_gaps=False),
    Setting(begins_with="train"),
    Setting(gradients="sparse"),
    Setting(gradients="graph"),
    Setting(gradients="graph", has_gaps=False),
    Setting(has_gaps=False, cap=128),
)


@dataclass(frozen=True)
class Trial:
    """What was found out."""

    is_together: bool = False
    """All parameters are to be updated together."""
    reason: str = ""
    """Why they are, or why they cannot even be."""
    is_impossible: bool = False
    takes_all: bool = False
    """Those without a gradient are to be updated, too."""
    changing: frozenset[Key] = frozenset()
    """Kinds of shared values that a step changes in place."""
    counts_empty_steps: bool = False
    """A step without any gradient changes something, too."""
    draws: bool = False
    """A step draws random numbers: those of a parameter depend on its turn."""
    state_ratio: float = 0.0
    """Bytes of state for a byte of a parameter."""


def try_out(optimizer: torch.optim.Optimizer, like: Like, state_of: StateOf, *, may_take_all: bool) -> Trial:
    """Finds out how an optimizer's step can be taken.

    Args:
        optimizer: it is not changed.
        like: for a parameter, an empty tensor of the device and dtype that it is updated in.
        state_of: a parameter's state, wherever it is.
        may_take_all: whether parameters without a gradient can be updated.
    """
    with _leaving_no_trace(optimizer, like) as (start_anew, has_drawn):
        why = ""
        for setting in _SETTINGS:
            if setting.begins_with and not callable(getattr(optimizer, setting.begins_with, None)):
                continue

            def shadow(setting: Setting = setting) -> Shadow:
                start_anew()
                return make_shadow(optimizer, like, state_of, setting.cap)

            try:
                first = shadow()
                expected, changing, counts = rehearse(first, setting)
                draws = has_drawn()
            except Exception as error:
                why = why or f"{type(error).__name__}: {first_line(error)}"
                continue
            trial = Trial(changing=changing, counts_empty_steps=counts, draws=draws, state_ratio=state_ratio(first))
            return _first_that_is_equal(trial, shadow, setting, expected, may_take_all=may_take_all)
        return Trial(reason=f"its step on small tensors raised {why}", is_impossible=True)


def _first_that_is_equal(
    trial: Trial, shadow: Callable[[], Shadow], setting: Setting, expected: list[Any], *, may_take_all: bool
) -> Trial:
    """Tries the ways to take the same steps, the one that needs least memory first."""
    for is_together, takes_all in ((False, False), (False, True), (True, False), (True, True)):
        if takes_all and not may_take_all:
            continue
        run = partial(at_once if is_together else in_chunks, takes_all=takes_all)
        difference = difference_of(shadow(), setting, run, SharedValues(trial.changing), expected)
        if not difference:
            return replace(trial, is_together=is_together, takes_all=takes_all)
        trial = replace(trial, reason=trial.reason or difference)
    return replace(trial, is_impossible=True)


@contextlib.contextmanager
def _leaving_no_trace(
    optimizer: torch.optim.Optimizer, like: Like
) -> Iterator[tuple[Callable[[], None], Callable[[], bool]]]:
    """Inside, random numbers may be drawn and warnings given.

    What is yielded goes back to where they began, and tells whether any have moved since.
    """
    devices = {like(p).device for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    modules = {device: torch.get_device_module(device) for device in devices if device.type != "cpu"}
    states = {device: module.get_rng_state(device) for device, module in modules.items()}
    cpu, own = torch.get_rng_state(), random.getstate()
    numpy = sys.modules.get("numpy")
    theirs = numpy.random.get_state() if numpy is not None else None

    def start_anew() -> None:
        torch.set_rng_state(cpu)
        random.setstate(own)
        if numpy is not None:
            numpy.random.set_state(theirs)
        for device, module in modules.items():
            module.set_rng_state(states[device], device)

    def has_drawn() -> bool:
        now = {device: module.get_rng_state(device) for device, module in modules.items()}
        is_numpy_same = numpy is None or repr(numpy.random.get_state()) == repr(theirs)
        is_same = torch.equal(torch.get_rng_state(), cpu) and random.getstate() == own and is_numpy_same
        return not (is_same and all(map(torch.equal, now.values(), states.values())))

    try:
        with warnings.catch_warnings(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            warnings.simplefilter("ignore")
            yield start_anew, has_drawn
    finally:
        start_anew()
