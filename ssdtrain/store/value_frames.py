"""A value of optimizer state without its large tensors: what is left when those leave, and the value again.

Knows tensors, lists, tuples, deques, dictionaries and tensor subclasses that say what they are made of (`DTensor`,
quantised state); neither optimizers nor drives. In a frame, what has left is a `Gap`; the rest is as it was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@dataclass(frozen=True)
class Gap:
    """Where a tensor was that has left, by its number."""

    index: int


@dataclass(frozen=True)
class _Subclass:
    """A tensor of a class of its own: what that needs to make it of its inner tensors."""

    kind: Any
    inner: dict[str, Any]
    context: Any
    size: torch.Size
    stride: tuple[int, ...]


def take_apart(value: Any, leaves: Callable[[torch.Tensor, str], int | None], where: str = "") -> Any:
    """The frame of a value.

    Args:
        value: anything; what is not known stays as it is.
        leaves: told of every plain tensor and where in the value it is; its number when it leaves, None when it stays.
        where: where the value is.
    """
    if isinstance(value, torch.Tensor):
        if is_traceable_wrapper_subclass(value):
            names, context = value.__tensor_flatten__()
            inner = {name: take_apart(getattr(value, name), leaves, f"{where}.{name}") for name in names}
            is_here = not any(has_gaps(frame) for frame in inner.values())
            return value if is_here else _Subclass(type(value), inner, context, value.size(), value.stride())
        index = leaves(value, where)
        return value if index is None else Gap(index)
    if type(value) is dict:
        return {key: take_apart(entry, leaves, f"{where}[{key!r}]") for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)([take_apart(entry, leaves, f"{where}[{i}]") for i, entry in enumerate(value)])
    if type(value) is deque:
        entries = [take_apart(entry, leaves, f"{where}[{i}]") for i, entry in enumerate(value)]
        return deque(entries, value.maxlen)
    return value


def put_together(frame: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """The value of a frame, with these tensors in its gaps."""
    if isinstance(frame, Gap):
        return tensors[frame.index]
    if isinstance(frame, _Subclass):
        inner = {name: put_together(entry, tensors) for name, entry in frame.inner.items()}
        return frame.kind.__tensor_unflatten__(inner, frame.context, frame.size, frame.stride)
    if type(frame) is dict:
        return {key: put_together(entry, tensors) for key, entry in frame.items()}
    if type(frame) in (list, tuple):
        return type(frame)([put_together(entry, tensors) for entry in frame])
    if type(frame) is deque:
        return deque([put_together(entry, tensors) for entry in frame], frame.maxlen)
    return frame


def has_gaps(frame: Any) -> bool:
    """Whether any tensor has left."""
    if isinstance(frame, Gap | _Subclass):
        return True
    entries = frame.values() if type(frame) is dict else frame if type(frame) in (list, tuple, deque) else ()
    return any(has_gaps(entry) for entry in entries)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The plain tensors that a value is made of."""
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor, _: str) -> None:
        found.append(tensor)

    take_apart(value, note)
    return found


def nbytes_of(value: Any) -> int:
    """Bytes of those tensors, as far as they are here; sparse ones count as if they were not."""
    return sum([tensor.numel() * tensor.element_size() for tensor in tensors_of(value)])
