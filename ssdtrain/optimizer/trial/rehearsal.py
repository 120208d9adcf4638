"""Steps of a shadow optimizer: as plain training takes them, and in chunks, with state that leaves and comes back.

Knows shadows and what an optimizer shares between parameters; not what follows from a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ssdtrain.optimizer.inner import having_only, inner_step, narrowed
from ssdtrain.optimizer.shared_values import Key, SharedValues, copied, kind_of, read, same_bits, words
from ssdtrain.optimizer.trial.shadow import Shadow
from ssdtrain.store.value_frames import nbytes_of, put_together, take_apart

_NUM_STEPS = 12  # what happens every ten steps is seen
_SMALL = 1e-4  # the first gradients: what is added so that nothing is divided by zero is seen

Run = Callable[[Shadow, SharedValues], Any]
"""Takes one step of a shadow in some way; what it returns."""


@dataclass(frozen=True)
class Setting:
    """How the small tensors get their gradients."""

    has_gaps: bool = True  # steps without some of the gradients
    gradients: str = "dense"  # or "sparse", or "graph": that can be differentiated
    cap: int = 12
    begins_with: str = ""  # a method that is called first


def rehearse(shadow: Shadow, setting: Setting) -> tuple[list[Any], frozenset[Key], bool]:
    """Takes the steps as plain training does.

    Returns:
        What comes of them, which shared values change in place, and whether any does in a step without gradients.
    """
    changing: set[Key] = set()
    counts = False
    found: list[Any] = []
    for _ in _steps(shadow, setting):
        before = read(shadow.optimizer)
        kept = {key: copied(value) for key, value in before.items()}
        found.append(copied(inner_step(shadow.optimizer)))
        after = read(shadow.optimizer)
        changed = {key for key in kept.keys() | after.keys() if not same_bits(kept.get(key), after.get(key))}
        changing |= {kind_of(key) for key in changed if before.get(key) is after.get(key)}
        counts |= bool(changed) and not shadow.with_gradients
    return [found, _outcome(shadow)], frozenset(changing), counts


def difference_of(shadow: Shadow, setting: Setting, run: Run, shared: SharedValues, expected: list[Any]) -> str:
    """What differs when it is done in another way; empty: nothing."""
    found = []
    try:
        for _ in _steps(shadow, setting):
            found.append(copied(run(shadow, shared)))
    except Exception as error:
        return str(getattr(error, "reason", f"{type(error).__name__}: {first_line(error)}"))
    results, outcome = expected
    if not same_bits(found, results):
        return "it returned something else"
    return _where_different(_outcome(shadow), outcome)


def in_chunks(shadow: Shadow, shared: SharedValues, *, takes_all: bool) -> Any:
    """A step for one parameter after the other, each with its state in memory only meanwhile."""
    chosen = list(shadow.group_of) if takes_all else shadow.with_gradients
    results = []
    shelf = _Shelf(shadow)
    for chunk in [[parameter] for parameter in chosen] or [[]]:
        for parameter in chunk:
            shelf.reload(parameter)
        with narrowed(shadow.optimizer, shadow.by_group(chunk), {}):
            result, changes = shared.run(shadow.optimizer, partial(inner_step, shadow.optimizer))
        shared.note(changes)
        results.append(result)
        for parameter in chunk:
            shelf.offload(parameter)
    shelf.reload_all()
    shared.apply(shadow.optimizer)
    return results[0] if all(same_bits(result, results[0]) for result in results) else results


def at_once(shadow: Shadow, _: SharedValues, *, takes_all: bool) -> Any:
    """A step for all parameters together, with all state in memory."""
    chosen = list(shadow.group_of) if takes_all else shadow.with_gradients
    _Shelf(shadow).reload_all()
    with having_only(shadow.optimizer, shadow.by_group(chosen), {}):
        return inner_step(shadow.optimizer)


class _Shelf:
    """Where state is while it is away: as on a drive, it comes back in other memory."""

    def __init__(self, shadow: Shadow) -> None:
        self._state = shadow.optimizer.state
        self._frames: dict[torch.Tensor, dict[str, Any]] = {}
        for parameter in shadow.group_of:
            self.offload(parameter)

    def offload(self, parameter: torch.Tensor) -> None:
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

    def reload(self, parameter: torch.Tensor) -> None:
        for key, (frame, tensors) in self._frames.pop(parameter, {}).items():
            self._state[parameter][key] = put_together(frame, tensors)

    def reload_all(self) -> None:
        for parameter in list(self._frames):
            self.reload(parameter)


def _steps(shadow: Shadow, setting: Setting) -> Iterator[None]:
    """A step is due, and the gradients for it are there."""
    generator = torch.Generator().manual_seed(0)
    if setting.begins_with:
        getattr(shadow.optimizer, setting.begins_with)()
    parameters = list(shadow.group_of)
    for number in range(_NUM_STEPS):
        gradients = _gradients(parameters, setting.gradients, generator, _SMALL if number == 0 else 1.0)
        without: list[torch.Tensor] = []
        if setting.has_gaps:
            without = {3: parameters, 4: parameters[-1:], 5: shadow.optimizer.param_groups[0]["params"]}.get(number, [])
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


def _outcome(shadow: Shadow) -> dict[str, Any]:
    return {
        "the parameters": [copied(parameter.detach()) for parameter in shadow.group_of],
        "their state": [dict(shadow.optimizer.state.get(parameter, {})) for parameter in shadow.group_of],
        "shared values": dict(read(shadow.optimizer)),
    }


def first_line(error: Exception) -> str:
    """What it says, short enough for another message."""
    return str(error).partition("\n")[0][:200]


def state_ratio(shadow: Shadow) -> float:
    """Bytes of state for a byte of a parameter."""
    nbytes = [(nbytes_of(dict(shadow.optimizer.state.get(p, {}))), p.nbytes) for p in shadow.group_of]
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
    """Whether it holds parameters, which are others in each shadow."""
    entries = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    if isinstance(entries, list | tuple | set):
        return any(_has_parameters(entry) for entry in entries)
    return isinstance(value, torch.nn.Parameter)
