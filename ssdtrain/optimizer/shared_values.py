"""What an optimizer keeps for all of its parameters together: entries of groups, attributes, state under other keys.

Knows optimizers, and neither drives nor state that is away.

[Note: one step in several chunks]
The plain step changes shared values once, a counter from 6 to 7. Of a step in chunks each chunk finds them as they were
before the step; what it has made of them is noted and taken back; when the step is over, what was noted takes their
place. Chunks that come to different values are not one step: that is an error. Whether an optimizer has such values is
found out before, see `ssdtrain.optimizer.trial.trial`.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ssdtrain.store.value_frames import tensors_of

Key = tuple[Any, ...]  # ("group", index, name), ("attribute", name) or ("state", key)

_OTHERS = frozenset({"state", "param_groups", "step", "pages_parameters", "grad_scale", "found_inf", "_opt_called"})
_MISSING = object()


def is_of_others(name: str) -> bool:
    """Whether an attribute of an optimizer is no value of its own."""
    return name in _OTHERS or name.endswith("_hooks") or name.startswith("_warned")


def kind_of(key: Key) -> Key:
    """A key, whatever the group."""
    return key if key[0] != "group" else ("group", key[2])


def words(key: Key) -> str:
    """A key in words, for messages."""
    place = {"group": "its group entry", "attribute": "its attribute", "state": "its state under"}[key[0]]
    return f"{place} {key[-1]!r}"


def read(optimizer: torch.optim.Optimizer) -> dict[Key, Any]:
    """All shared values of a kind that can be compared."""
    found: dict[Key, Any] = {("attribute", n): v for n, v in vars(optimizer).items() if not is_of_others(n)}
    for i, group in enumerate(optimizer.param_groups):
        found |= {("group", i, n): v for n, v in group.items() if n not in ("params", "param_names")}
    found |= {("state", key): v for key, v in optimizer.state.items() if not isinstance(key, torch.Tensor)}
    return {key: value for key, value in found.items() if _is_known(value)}


class ApartError(RuntimeError):
    """Chunks of one step have come to different shared values."""

    def __init__(self, key: Key, one: Any, other: Any) -> None:
        """`one` and `other` are what they came to."""
        self.reason = f"{words(key)} depends on which parameters are updated"
        super().__init__(
            f"Expected a step that can be taken for a few parameters at a time, got one where {self.reason}: "
            f"{_text(one)} or {_text(other)}; load a checkpoint, and raise chunk_nbytes until all state is one chunk"
        )


class SharedValues:
    """The shared values of one optimizer during a step."""

    def __init__(self, changing: frozenset[Key] = frozenset()) -> None:
        """`changing`: kinds of those whose objects a step changes in place."""
        self.changing = changing
        self._noted: dict[Key, Any] = {}

    def run(self, optimizer: torch.optim.Optimizer, call: Callable[[], Any]) -> tuple[Any, dict[Key, Any]]:
        """Calls, and takes back what that does to shared values of `optimizer`; the result, and what it did.

        Raises:
            RuntimeError: it changed something in place that cannot be taken back.
        """
        before = read(optimizer)
        marks = {key: _fingerprint(value) for key, value in before.items()}
        kept = {key: copied(value) for key, value in before.items() if kind_of(key) in self.changing}
        result = call()
        after = read(optimizer)
        changes: dict[Key, Any] = {}
        for key in before.keys() | after.keys():
            old, new = before.get(key, _MISSING), after.get(key, _MISSING)
            if new is not old:
                if not same_bits(old, new):
                    changes[key] = new
                    put(optimizer, key, old)
            elif key in kept:
                if not same_bits(new, kept[key]):
                    changes[key] = copied(new)
                    _assign(old, kept[key])
            elif _fingerprint(new) != marks[key]:
                raise RuntimeError(
                    f"Expected {type(optimizer).__name__} to change in a step what it has changed in its trial, got "
                    f"{words(key)} changed in place; load a checkpoint, and raise chunk_nbytes until all state is one "
                    "chunk"
                )
        return result, changes

    def note(self, changes: Mapping[Key, Any]) -> None:
        """Notes what one chunk has done to shared values.

        Raises:
            ApartError: another one has come to something else.
        """
        for key, value in changes.items():
            if key in self._noted and not same_bits(self._noted[key], value):
                raise ApartError(key, self._noted[key], value)
            self._noted[key] = value

    def apply(self, optimizer: torch.optim.Optimizer) -> None:
        """The step is over: it gets the values that were noted."""
        noted, self._noted = self._noted, {}
        now = read(optimizer) if noted else {}
        for key, value in noted.items():
            old = now.get(key, _MISSING)
            if kind_of(key) in self.changing and type(old) is type(value):
                _assign(old, value)
            else:
                put(optimizer, key, value.to(old.device) if isinstance(old, torch.Tensor) else value)

    def expect(self, changing: frozenset[Key]) -> None:
        """Kinds of those whose objects a step changes in place, as far as is known by now."""
        self.changing = changing

    def forget(self) -> None:
        """Drops what was noted: the step was given up."""
        self._noted = {}

    def own_copies(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives an optimizer that shares objects with another one its own of those that a step changes."""
        for key, value in read(optimizer).items():
            if kind_of(key) in self.changing:
                put(optimizer, key, copied(value))


def put(optimizer: torch.optim.Optimizer, key: Key, value: Any) -> None:
    """Sets a shared value, or deletes it."""
    place: Any = vars(optimizer) if key[0] == "attribute" else optimizer.state
    if key[0] == "group":
        place = optimizer.param_groups[key[1]]
    if value is _MISSING:
        place.pop(key[-1], None)
    else:
        place[key[-1]] = value


def copied(value: Any) -> Any:
    """A copy with tensors of its own; parameters stay the same objects."""
    if isinstance(value, torch.nn.Parameter):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        found = copy.copy(value)
        for key, entry in value.items():
            found[key] = copied(entry)
        return found
    if type(value) in (list, tuple):
        return type(value)(copied(entry) for entry in value)
    if isinstance(value, deque):
        return deque(map(copied, value), value.maxlen)
    return copy.copy(value) if isinstance(value, set) else value


def _assign(target: Any, source: Any) -> None:
    """Gives an object the contents of another one."""
    if isinstance(target, torch.Tensor):
        with torch.no_grad():
            target.set_(source.to(target.device)) if target.shape != source.shape else target.copy_(source)
    elif isinstance(target, list):
        target[:] = source
    elif isinstance(target, dict | set):
        target.clear()
        target.update(source)


def same_bits(one: Any, other: Any) -> bool:
    """Whether two values are equal to the bit, those of tensors too."""
    if one is other:
        return True
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and _same_tensors(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple | deque):
        return len(one) == len(other) and all(map(same_bits, one, other))
    if getattr(type(one), "__eq__", None) is object.__eq__ and hasattr(one, "__dict__") and not callable(one):
        return same_bits(vars(one), vars(other))
    try:
        return bool(one == other or (one != one and other != other))  # NaN is NaN
    except Exception:  # objects of others may compare as they like
        return False


def _same_tensors(one: torch.Tensor, other: torch.Tensor) -> bool:
    if type(one) is not type(other) or one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.layout is not other.layout:
        return False
    if one.layout is not torch.strided:
        one, other = one.to_dense(), other.to_dense()
    parts = tensors_of(one), tensors_of(other)
    return len(parts[0]) == len(parts[1]) and all(map(_same_bytes, *parts))


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat = [t.detach().to(one.device).contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*flat)


def _is_known(value: Any) -> bool:
    return value is None or isinstance(value, int | float | complex | str | torch.Tensor | dict | list | tuple | set)


def _fingerprint(value: Any) -> Any:
    """What tells of a change in place: of tensors inside, and of the number of entries."""
    if isinstance(value, torch.Tensor):
        return id(value), value._version
    if isinstance(value, dict):
        return len(value), [_fingerprint(entry) for entry in value.values()]
    if isinstance(value, list | tuple):
        return len(value), [_fingerprint(entry) for entry in value]
    if isinstance(value, set):
        return len(value)
    return value if _is_known(value) else None


def _text(value: Any) -> str:
    return str(value) if isinstance(value, int | float | str) else type(value).__name__
