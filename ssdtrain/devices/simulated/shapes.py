"""What an operator will return, found without running it: PyTorch's own fake tensors tell, and the answer is kept.

None means that only a run tells: the result depends on data, is no tensor, or PyTorch has no rule for the operator.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only

_Op = Callable[..., Any]
_PLAIN = (int, float, bool, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class Spec(NamedTuple):
    """One tensor to come."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Outcome(NamedTuple):
    """All that an operator returns."""

    specs: list[Spec | None]
    tree: TreeSpec
    is_single: bool
    """Nothing but one tensor, or None."""


class Shapes:
    """Asks and remembers."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._fake = FakeTensorMode(allow_non_fake_inputs=False)
        self._known: dict[Any, Outcome | None] = {}
        self._lock = threading.RLock()  # fake tensors are made for one thread

    def infer(self, func: _Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome | None:
        """What `func` returns for such arguments."""
        with self._lock:
            return self._infer(func, args, kwargs)

    def _infer(self, func: _Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome | None:
        described = _describe([*args, *kwargs.items()])
        if described is None:
            return self._ask(func, args, kwargs)
        key = (func, torch.get_default_dtype(), described)
        if key not in self._known:
            self._known[key] = self._ask(func, args, kwargs)
        return self._known[key]

    def _ask(self, func: _Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome | None:
        try:
            with self._fake, torch.no_grad():
                fake_args, fake_kwargs = tree_map_only(torch.Tensor, self._imitate, (args, kwargs))
                fakes = [f for f in tree_flatten((fake_args, fake_kwargs))[0] if isinstance(f, torch.Tensor)]
                sizes = [fake.shape for fake in fakes]
                results, tree = tree_flatten(func(*fake_args, **fake_kwargs))
        except Exception:  # also for wrong arguments: then the real operator raises its own error
            return None
        if not all(result is None or _is_plain(result) for result in results):
            return None
        if sizes != [fake.shape for fake in fakes]:  # `out=` of another size
            return None
        specs = [None if r is None else Spec(tuple(r.shape), r.stride(), r.dtype) for r in results]
        return Outcome(specs, tree, tree.is_leaf())

    def _imitate(self, tensor: torch.Tensor) -> torch.Tensor:
        fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        if tensor.is_conj():
            fake = torch._conj(fake)
        return torch._neg_view(fake) if tensor.is_neg() else fake


@cache
def shared_shapes() -> Shapes:
    """One memo for all devices of the process: the answers are the same for all."""
    return Shapes()


def _is_plain(result: Any) -> bool:
    return isinstance(result, torch.Tensor) and result.layout is torch.strided and result.device.type == "cpu"


def _describe(value: Any) -> Any:
    """What of an argument decides over results; None where that cannot be told."""
    if isinstance(value, torch.Tensor):
        return (value.shape, value.stride(), value.dtype, value.device, value.is_conj(), value.is_neg())
    kind = type(value)
    if kind in _PLAIN:
        return (kind, value)
    if kind not in (list, tuple):
        return None
    parts = [_describe(part) for part in value]
    return None if None in parts else (kind, *parts)
