"""`optimizer.state` of an optimizer whose state is on a drive: a mapping that reads and writes through.

Knows the optimizer that does the arithmetic and where its state is; not when it steps.

[Note: state that is handed out]
What is handed out is the optimizer's own dictionary with the state itself in memory, and nothing of it on the drive: so
whatever is done to it, by whatever name, is done to the state. It goes back to the drive when nobody else holds it any
more, which the reference counts say: of the dictionary, of every value in it and of the tensors' memory, of which views
are other holders. Looked for before every update, and when more than a chunk is handed out.
"""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch

from ssdtrain.optimizer.state import OffloadedState
from ssdtrain.store.value_frames import nbytes_of, tensors_of


class LiveState(MutableMapping[Any, Any]):
    """State by parameter, to be read and changed; what is looked at is in memory until nobody holds it."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        offloaded: OffloadedState,
        offload: Callable[[torch.Tensor], None],
        check: Callable[[torch.Tensor], None],
        max_nbytes: int,
    ) -> None:
        """`max_nbytes` of state stay in memory when nobody holds them, until the next update.

        `check` is called before state comes to memory.
        """
        self._optimizer, self._offloaded, self._offload, self._check = optimizer, offloaded, offload, check
        self._max_nbytes = max_nbytes
        self._own: dict[Any, Any] | None = None

    @property
    def own(self) -> dict[Any, Any]:
        """The optimizer's own dictionary."""
        return self._optimizer.state if self._own is None else self._own

    @property
    def is_in_place(self) -> bool:
        """Whether the optimizer itself looks for its state here."""
        return self._own is not None

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the optimizer itself looks for its state here: its methods read and write through, too."""
        if self.is_in_place:  # it calls a method of its own through us
            yield
            return
        self._own = own = self._optimizer.state
        self._optimizer.state = self  # type: ignore[assignment]
        try:
            yield
        finally:
            found, self._optimizer.state = self._optimizer.state, own
            self._own = None
            self.replace(found)
            self.settle(self._max_nbytes)

    def __getitem__(self, key: Any) -> Any:
        """A parameter's state; it gets an empty one while it has none."""
        found = self.own[key]
        if isinstance(key, torch.Tensor) and key not in self._offloaded.handed_out:
            self._check(key)
            self._offloaded.hand_out(key, found)
            self.settle(self._max_nbytes)
        return found

    def __setitem__(self, key: Any, value: Any) -> None:
        """Gives a parameter other state."""
        if isinstance(key, torch.Tensor):
            self._offloaded.drop(key)
            self._offloaded.handed_out[key] = nbytes_of(value)
        self.own[key] = value
        self.settle(self._max_nbytes)

    def __delitem__(self, key: Any) -> None:
        """Drops a parameter's state, in memory and on the drive."""
        if key not in self:
            raise KeyError(key)
        self.own.pop(key, None)
        self._forget(key)

    def clear(self) -> None:
        """Drops the state of every parameter."""
        keys = list(self)
        self.own.clear()
        for key in keys:
            self._forget(key)

    def get(self, key: Any, default: Any = None) -> Any:
        """A parameter's state, if it has some."""
        return self[key] if key in self else default  # noqa: SIM401

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """A parameter's state, which is this while it has none."""
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: Any, *default: Any) -> Any:
        """A parameter's state, which it has no more."""
        if key not in self and default:
            return default[0]
        found = self.get(key)
        del self[key]
        return found

    def _forget(self, key: Any) -> None:
        if isinstance(key, torch.Tensor):
            self._offloaded.drop(key)
            self._offloaded.handed_out.pop(key, None)

    def __contains__(self, key: object) -> bool:
        """Whether a parameter has state."""
        return key in self.own or (isinstance(key, torch.Tensor) and key in self._offloaded)

    def __iter__(self) -> Iterator[Any]:
        """Parameters with state, and what else the optimizer files there."""
        return iter({**self.own, **dict.fromkeys(self._offloaded)})

    def __len__(self) -> int:
        """How many keys `__iter__` yields."""
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"<state of {len(self)} parameters on a drive>"

    def __reduce__(self) -> Any:
        return _plain, (dict(self),)

    def replace(self, state: Mapping[Any, Any]) -> None:
        """Takes over other state instead of all that there is."""
        if state is not self:
            given = dict(state)
            self.clear()
            self.update(given)

    def settle(self, max_nbytes: int = 0) -> None:
        """Sends away what nobody holds, until no more than this is handed out."""
        handed_out, state = self._offloaded.handed_out, self.own
        total = sum(handed_out.values())
        for parameter, nbytes in list(handed_out.items()):
            if total <= max_nbytes and max_nbytes:
                break
            if parameter in state and (_num_refs(state, parameter) > _NUM_REFS or _is_held(state[parameter])):
                continue
            del handed_out[parameter]
            total -= nbytes
            self._offload(parameter)


def _plain(state: dict[Any, Any]) -> dict[Any, Any]:
    return defaultdict(dict, state)


def _is_held(value: Any) -> bool:
    """Whether somebody else has something that is inside of a value."""
    keys: Any = range(len(value)) if isinstance(value, list | tuple | deque) else ()
    if isinstance(value, dict):
        keys = list(value)
    if any([_num_refs(value, key) > _NUM_REFS for key in keys if _is_container(value[key])]):
        return True
    if isinstance(value, torch.Tensor):
        return any(
            [_num_storage_refs(tensor) > _NUM_STORAGE_REFS for tensor in tensors_of(value) if _has_storage(tensor)]
        )
    return any([_is_held(value[key]) for key in keys])


def _is_container(value: Any) -> bool:
    return isinstance(value, torch.Tensor | dict | list | deque)


def _has_storage(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided


def _num_refs(holder: Any, key: Any) -> int:
    return sys.getrefcount(holder[key])


def _num_storage_refs(tensor: torch.Tensor) -> int:
    found: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return found


_NUM_REFS = _num_refs({0: {}}, 0)  # of what nobody else has
_NUM_STORAGE_REFS = _num_storage_refs(torch.empty(1, device="cpu"))
