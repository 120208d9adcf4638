"""What is left of a saved tensor of a class of its own when its bytes have gone their way, and the tensor again.

Knows the classes that say what they are made of (`DTensor`, jagged and quantised tensors), whose inner tensors are
offloaded one by one, and those that only override PyTorch's functions, whose memory is ordinary. Moves nothing.

[Note: whose version counts]
A tensor and its inner tensors have version counters of their own. Autograd looks at the outer one, which views of the
outer tensor share, and views made inside do not: what is made of a part is known by the outer counter.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ssdtrain.store.record import Handle

_EMPTY = torch.empty(0, device="cpu")


class Wrapped:
    """Handle of a tensor made of others: one handle for each of those, and what makes it of them."""

    __slots__ = ("context", "kind", "parts", "probe", "size", "source", "stride", "version")

    def __init__(self, tensor: torch.Tensor, parts: dict[str, Any], context: Any, probe: torch.Tensor) -> None:
        """`parts`: handles of tensors, and whatever else it is made of. `probe` shares its version counter."""
        self.kind: Any = type(tensor)
        self.parts, self.context, self.probe = parts, context, probe
        self.size, self.stride, self.version = tensor.size(), tensor.stride(), tensor._version
        self.source = None if tensor.requires_grad else weakref.ref(tensor)

    def living(self) -> torch.Tensor | None:
        """The object itself, if somebody holds it, with the memory it had: it comes back as it was."""
        tensor = self.source() if self.source is not None else None
        if tensor is None:
            return None
        for name, part in self.parts.items():
            if (
                isinstance(part, Handle)
                and getattr(tensor, name).untyped_storage()._cdata != part.record.identity.cdata
            ):
                return None
        tensor._fix_weakref()  # type: ignore[attr-defined]  # as in `identity`: the reference came out of a weak one
        return tensor

    def made_of(self, inner: dict[str, Any]) -> torch.Tensor:
        """The tensor again."""
        tensor: torch.Tensor = self.kind.__tensor_unflatten__(inner, self.context, self.size, self.stride)
        return tensor


class Subclassed:
    """Handle of a tensor whose class overrides functions and nothing of its memory."""

    __slots__ = ("handle", "kind")

    def __init__(self, handle: Handle, kind: Any) -> None:
        """`handle`: of the plain tensor that it is."""
        self.handle, self.kind = handle, kind


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor says what it is made of."""
    return bool(is_traceable_wrapper_subclass(tensor))


def is_only_named(tensor: torch.Tensor) -> bool:
    """Whether a tensor's class overrides functions and nothing else: its memory is its own."""
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def settle(tensor: torch.Tensor) -> None:
    """Waits for a collective that is to fill a tensor: the operator that saves it does so next anyway."""
    wait = getattr(tensor, "trigger_wait", None)
    if wait is not None:
        wait()


def parts_of(tensor: torch.Tensor) -> tuple[dict[str, Any], Any]:
    """What it is made of, and the context that `__tensor_unflatten__` asks for."""
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return {name: getattr(tensor, name) for name in names}, context


def inner_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors it is made of; a plain one is made of itself."""
    if not is_wrapper(tensor):
        yield tensor
        return
    for part in parts_of(tensor)[0].values():
        if isinstance(part, torch.Tensor):
            yield from inner_tensors(part)


def hollow(tensor: torch.Tensor) -> torch.Tensor | None:
    """One that shares its version counter and holds none of its memory; None where its class does not have it."""
    with torch.no_grad():
        probe = tensor.detach()
        if type(probe) is not type(tensor):
            return None
        for name, part in parts_of(probe)[0].items():
            if isinstance(part, torch.Tensor):
                try:
                    setattr(probe, name, _EMPTY)
                except AttributeError:
                    return None
    return probe
