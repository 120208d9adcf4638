"""Whether an optimizer can update a few parameters at a time, found out on throw-away tensors before anything changes.

Small tensors stand in for parameters of every group and number of dimensions. Twins of the optimizer take the same
steps for them: one as it is, others in chunks, with state that leaves and comes back. What is equal to the bit may be
done with the real ones. Nothing of the optimizer, its parameters or the process is changed, random numbers included.

Knows optimizers; neither drives nor pages.
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ssdtrain.optimizer.inner import having_only, narrowed, plain_step
from ssdtrain.optimizer.shared_values import Key, SharedValues, copied, is_of_others, kind_of, read, same_bits, words
from ssdtrain.store.frames import nbytes_of, put_together, take_apart

_NUM_STEPS = 12  # what happens every ten steps is seen
_SMALL = 1e-4  # the first gradients: what is added so that nothing is divided by zero is seen
_NUM_OF_A_KIND = 2
_MAX_STAND_INS = 16


@dataclass(frozen=True)
class _Setting:
    """How the stand-ins are made."""

    has_gaps: bool = True  # steps without some of the gradients
    gradients: str = "dense"  # or "sparse", or "graph": that can be differentiated
    cap: int = 12
    begins_with: str = ""  # a method that is called first


@dataclass(frozen=True)
class Trial:
    """What was found out."""

    is_whole: bool = False
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


_SETTINGS = (
    _Setting(),
    _Setting(has_gaps=False),
    _Setting(begins_with="train"),
    _Setting(gradients="sparse"),
    _Setting(gradients="graph"),
    _Setting(gradients="graph", has_gaps=False),
    _Setting(has_gaps=False, cap=128),
)


@dataclass
class _Cast:
    """A twin of the optimizer with its stand-ins."""

    twin: torch.optim.Optimizer
    group_of: dict[torch.Tensor, int]

    @property
    def with_gradients(self) -> list[torch.Tensor]:
        return [parameter for parameter in self.group_of if parameter.grad is not None]

    def by_group(self, parameters: list[torch.Tensor]) -> dict[int, list[torch.Tensor]]:
        found: dict[int, list[torch.Tensor]] = {}
        for parameter in parameters:
            found.setdefault(self.group_of[parameter], []).append(parameter)
        return found


Like = Callable[[torch.Tensor], torch.Tensor]
StateOf = Callable[[torch.Tensor], Mapping[str, Any]]
Run = Callable[[_Cast, SharedValues], Any]


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
            start_anew()
            try:
                cast = _cast(optimizer, like, state_of, setting)
                expected, changing, counts = _rehearse_plain(cast, setting)
                draws = has_drawn()
            except Exception as error:
                why = why or f"{type(error).__name__}: {_first_line(error)}"
                continue
            trial = Trial(changing=changing, counts_empty_steps=counts, draws=draws, state_ratio=_state_ratio(cast))
            for is_whole, takes_all in ((False, False), (False, True), (True, False), (True, True)):
                if takes_all and not may_take_all:
                    continue
                start_anew()
                cast = _cast(optimizer, like, state_of, setting)
                run = partial(_at_once if is_whole else _in_chunks, takes_all=takes_all)
                difference = _difference(cast, setting, run, SharedValues(changing), expected)
                if not difference:
                    return replace(trial, is_whole=is_whole, takes_all=takes_all)
                trial = replace(trial, reason=trial.reason or difference)
            return replace(trial, is_impossible=True)
        return Trial(reason=f"its step on small tensors raised {why}", is_impossible=True)


# -- one rehearsal -------------------------------------------------------------------------------------------------


def _rehearse_plain(cast: _Cast, setting: _Setting) -> tuple[list[Any], frozenset[Key], bool]:
    """What comes of it, which shared values change in place, and whether any does in a step without gradients."""
    changing: set[Key] = set()
    counts = False
    found: list[Any] = []
    for _ in _steps(cast, setting):
        before = read(cast.twin)
        kept = {key: copied(value) for key, value in before.items()}
        found.append(copied(plain_step(cast.twin)))
        after = read(cast.twin)
        changed = {key for key in kept.keys() | after.keys() if not same_bits(kept.get(key), after.get(key))}
        changing |= {kind_of(key) for key in changed if before.get(key) is after.get(key)}
        counts |= bool(changed) and not cast.with_gradients
    return [found, _outcome(cast)], frozenset(changing), counts


def _difference(cast: _Cast, setting: _Setting, run: Run, shared: SharedValues, expected: list[Any]) -> str:
    """What differs when it is done in another way; empty: nothing."""
    found = []
    try:
        for _ in _steps(cast, setting):
            found.append(copied(run(cast, shared)))
    except Exception as error:
        return str(getattr(error, "reason", f"{type(error).__name__}: {_first_line(error)}"))
    results, outcome = expected
    if not same_bits(found, results):
        return "it returned something else"
    return _where_different(_outcome(cast), outcome)


def _in_chunks(cast: _Cast, shared: SharedValues, *, takes_all: bool) -> Any:
    chosen = list(cast.group_of) if takes_all else cast.with_gradients
    results = []
    shelf = _Shelf(cast)
    for chunk in [[parameter] for parameter in chosen] or [[]]:
        for parameter in chunk:
            shelf.bring(parameter)
        with narrowed(cast.twin, cast.by_group(chunk), {}):
            result, changes = shared.run(cast.twin, partial(plain_step, cast.twin))
        shared.note(changes)
        results.append(result)
        for parameter in chunk:
            shelf.send_away(parameter)
    shelf.bring_all()
    shared.apply(cast.twin)
    return results[0] if all(same_bits(result, results[0]) for result in results) else results


def _at_once(cast: _Cast, _: SharedValues, *, takes_all: bool) -> Any:
    chosen = list(cast.group_of) if takes_all else cast.with_gradients
    _Shelf(cast).bring_all()
    with having_only(cast.twin, cast.by_group(chosen), {}):
        return plain_step(cast.twin)


class _Shelf:
    """Where the state of stand-ins is while it is away: as on a drive, it comes back in other memory."""

    def __init__(self, cast: _Cast) -> None:
        self._state = cast.twin.state
        self._frames: dict[torch.Tensor, dict[str, Any]] = {}
        for parameter in cast.group_of:
            self.send_away(parameter)

    def send_away(self, parameter: torch.Tensor) -> None:
        if parameter not in self._state:
            return
        state, frames = self._state[parameter], self._frames.setdefault(parameter, {})
        for key in list(state):
            tensors: list[torch.Tensor] = []

            def leave(tensor: torch.Tensor, _: str, tensors: list[torch.Tensor] = tensors) -> int | None:
                if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.requires_grad:
                    return None
                tensors.append(tensor.clone())
                return len(tensors) - 1

            frame = take_apart(state[key], leave)
            if tensors:
                frames[key] = (frame, tensors)
                del state[key]

    def bring(self, parameter: torch.Tensor) -> None:
        for key, (frame, tensors) in self._frames.pop(parameter, {}).items():
            self._state[parameter][key] = put_together(frame, tensors)

    def bring_all(self) -> None:
        for parameter in list(self._frames):
            self.bring(parameter)


def _steps(cast: _Cast, setting: _Setting) -> Iterator[None]:
    """A step is due, and the gradients for it are there."""
    generator = torch.Generator().manual_seed(0)
    if setting.begins_with:
        getattr(cast.twin, setting.begins_with)()
    parameters = list(cast.group_of)
    for number in range(_NUM_STEPS):
        gradients = _gradients(parameters, setting.gradients, generator, _SMALL if number == 0 else 1.0)
        without: list[torch.Tensor] = []
        if setting.has_gaps:
            without = {3: parameters, 4: parameters[-1:], 5: cast.twin.param_groups[0]["params"]}.get(number, [])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if any(parameter is p for p in without) else gradient
        yield


def _gradients(
    parameters: list[torch.Tensor], kind: str, generator: torch.Generator, scale: float
) -> Sequence[torch.Tensor]:
    values = [(torch.randn(p.shape, generator=generator) * scale).to(p.device, p.dtype) for p in parameters]
    if kind == "sparse":
        return [value.to_sparse(1) if value.dim() else value for value in values]
    if kind == "graph":
        with torch.enable_grad():
            loss = torch.stack([(p * v).sum().float() for p, v in zip(parameters, values, strict=True)]).sum() ** 3
            return torch.autograd.grad(loss, parameters, create_graph=True)
    return values


def _outcome(cast: _Cast) -> dict[str, Any]:
    return {
        "the parameters": [copied(parameter.detach()) for parameter in cast.group_of],
        "their state": [dict(cast.twin.state.get(parameter, {})) for parameter in cast.group_of],
        "shared values": dict(read(cast.twin)),
    }


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _state_ratio(cast: _Cast) -> float:
    nbytes = [(nbytes_of(dict(cast.twin.state.get(p, {}))), p.nbytes) for p in cast.group_of]
    return sum(state for state, _ in nbytes) / max(1, sum(own for _, own in nbytes))


def _where_different(found: dict[str, Any], expected: dict[str, Any]) -> str:
    for key in found["shared values"].keys() | expected["shared values"].keys():
        values = found["shared values"].get(key), expected["shared values"].get(key)
        if not same_bits(*values) and not _has_parameters(values[1]):
            return f"{words(key)} comes out differently"
    for what in ("the parameters", "their state"):
        if not same_bits(found[what], expected[what]):
            return f"{what} comes out differently"
    return ""


def _has_parameters(value: Any) -> bool:
    """Whether it holds parameters, which are others in each cast."""
    entries = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    if isinstance(entries, list | tuple | set):
        return any(_has_parameters(entry) for entry in entries)
    return isinstance(value, torch.nn.Parameter)


# -- the cast ------------------------------------------------------------------------------------------------------


def _cast(optimizer: torch.optim.Optimizer, like: Like, state_of: StateOf, setting: _Setting) -> _Cast:
    """A twin, with small tensors in the place of parameters."""
    generator = torch.Generator().manual_seed(1)
    memo: dict[int, Any] = {}
    groups: list[tuple[dict[str, Any], list[torch.Tensor]]] = []
    group_of: dict[torch.Tensor, int] = {}
    states: dict[torch.Tensor, dict[str, Any] | None] = {}
    known: dict[str, int] = {}
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        kind = repr([(key, _kind_of_setting(value)) for key, value in settings.items()])
        known[kind] = known.get(kind, 0) + 1
        is_cast = known[kind] <= _NUM_OF_A_KIND
        stand_ins: list[torch.Tensor] = []
        for parameter in group["params"]:
            same_kind = [p for p in stand_ins if p.dim() == parameter.dim() and p.dtype == like(parameter).dtype]
            are_many = len(group_of) >= _MAX_STAND_INS and len(stand_ins) >= _NUM_OF_A_KIND
            if are_many or len(same_kind) >= _NUM_OF_A_KIND or not is_cast or not _may_train(parameter):
                memo[id(parameter)] = same_kind[-1] if same_kind else next(iter(group_of), None)
                continue
            stand_in = _stand_in(parameter, like(parameter), setting.cap, generator)
            memo[id(parameter)] = stand_in
            stand_ins.append(stand_in)
            group_of[stand_in] = len(groups)
            states[stand_in] = _state_for(stand_in, parameter, state_of(parameter))
        if is_cast:
            groups.append((settings, stand_ins))
    twin = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    own = {name: value for name, value in vars(optimizer).items() if not is_of_others(name)}
    vars(twin).update({n: {} if n.endswith("_hooks") else v for n, v in vars(optimizer).items() if n not in own})
    vars(twin).pop("step", None)
    vars(twin).update({name: _copied(value, memo) for name, value in own.items()})
    twin.param_groups = [{**_copied(settings, memo), "params": stand_ins} for settings, stand_ins in groups]
    twin.state = defaultdict(dict)
    for key, value in optimizer.state.items():
        if not isinstance(key, torch.Tensor):
            twin.state[key] = _copied(value, memo)
    for stand_in, state in states.items():
        if state is not None:
            twin.state[stand_in] = _copied(state, memo)
    return _Cast(twin, group_of)


def _kind_of_setting(value: Any) -> Any:
    """What of a group's setting may take an optimizer another way: 0 often means that something is off."""
    if isinstance(value, bool | str):
        return value
    return (type(value), bool(value)) if isinstance(value, int | float) else type(value)


def _may_train(parameter: torch.Tensor) -> bool:
    """Whether it has or may later get a gradient: what is frozen now may be thawed."""
    is_plain = type(parameter.data) is torch.Tensor and (parameter.is_floating_point() or parameter.is_complex())
    return parameter.requires_grad or (is_plain and not parameter.is_meta)


def _stand_in(parameter: torch.Tensor, like: torch.Tensor, cap: int, generator: torch.Generator) -> torch.Tensor:
    """A small tensor of as many dimensions, the longest of which is the longest of the parameter."""
    sizes = sorted(set(parameter.shape))
    short = max(2, cap // 3 if parameter.dim() > 2 else 2 * cap // 3)
    shape = [min(size, cap if size == sizes[-1] else short) for size in parameter.shape]
    values = torch.randn(shape, generator=generator).to(like.device, like.dtype)
    stand_in = torch.nn.Parameter(values)
    vars(stand_in).update({k: v for k, v in vars(parameter).items() if not k.startswith("_")})
    return stand_in


def _state_for(stand_in: torch.Tensor, parameter: torch.Tensor, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """A parameter's state, for a tensor of another size; None where nobody can tell how."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and type(value) is not torch.Tensor:
            return None
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            value = value[tuple(slice(size) for size in stand_in.shape)]
            value = value.detach().to(stand_in.device if value.device == parameter.device else value.device)
        elif isinstance(value, dict | list | tuple) or (isinstance(value, torch.Tensor) and value.numel() > 1):
            return None
        found[key] = value
    return found or None


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy whose parameters are the stand-ins; modules and what cannot be copied stay the same objects."""
    if isinstance(value, torch.nn.Module):
        return value
    if isinstance(value, dict):
        found = copy.copy(value)
        found.clear()
        found.update({_copied(k, memo): _copied(v, memo) for k, v in value.items()})
        return found
    if type(value) in (list, tuple, set):
        return type(value)([_copied(entry, memo) for entry in value])
    if isinstance(value, torch.Tensor) and id(value) not in memo:
        return value.detach().clone()
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        return value


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
