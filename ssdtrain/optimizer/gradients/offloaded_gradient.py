"""Tensors without memory that stand in `parameter.grad`: for a gradient on the drive, or for one that was used.

Know gradients' records and operators, not optimizers.

[Note: gradients that are looked at]
Clipping, norms in a log, checks for NaN, GradScaler, hooks and other optimizers read `parameter.grad`, each in its own
way. So there stands a tensor of the gradient's shape, dtype and device: every operator that is given one gets the
gradient, which is in memory while the operator runs and goes to the drive again where the operator has changed it.
What scales or limits it by a number is only noted, and done whenever it is read: clipping costs no trip, nor does the
2-norm, which is computed when a gradient leaves. Who takes a view gets memory that may be written to at any time: that
gradient stays in memory from then on. What stands for a gradient that was used raises, whoever reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_iter, tree_map_only

from ssdtrain.optimizer.gradients.gradient_record import ITSELF, Change, GradientRecord

_NOTED = frozenset(
    f"{prefix}{name}_" for name in ("mul", "div", "clamp_min", "clamp_max", "zero") for prefix in ("", "_foreach_")
) | {"clamp_"}
"""Operators that change every element by itself, and the same way each time."""
_OF_MEMORY = "__array__ __dlpack__ data_ptr numpy share_memory_ storage tolist untyped_storage".split()
"""Methods that no operator tells of."""


class OffloadedGradient(torch.Tensor):
    """Stands for a gradient on the drive."""

    record: GradientRecord
    """What it stands for."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, record: GradientRecord) -> OffloadedGradient:
        """Looks like the gradient."""
        found: OffloadedGradient = torch.Tensor._make_wrapper_subclass(cls, **record.like())
        found.record = record
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Runs an operator with the gradients themselves."""
        name = func.overloadpacket.__name__
        if name in ("detach", "alias"):
            return cls(args[0].record)
        if name.startswith(("_foreach_", "_amp_foreach_")) and (calls := _one_by_one(args)):
            return _joined([cls._run(func, name, one, kwargs or {}) for one in calls])
        return cls._run(func, name, args, kwargs or {})

    @classmethod
    def _run(cls, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        given = {id(x.record): x for x in tree_iter((args, kwargs)) if isinstance(x, cls)}
        if len(given) == 1:
            (only,) = given.values()
            if _is_two_norm(func, args, kwargs) and (norm := only.record.known_norm()) is not None:
                return norm
            if name in _NOTED and not any(x.dim() for x in tree_iter((args[1:], kwargs)) if torch.is_tensor(x)):
                args, kwargs = tree_map_only(cls, lambda _: ITSELF, (args, kwargs))
                only.record.change(Change(func, args, kwargs))
                return None if name.startswith("_") else only
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        loaded = {key: x.record.hand_out() if is_view else x.record.load() for key, x in given.items()}
        real_args, real_kwargs = tree_map_only(cls, lambda x: loaded[id(x.record)], (args, kwargs))
        result = func(*real_args, **real_kwargs)
        for x in _written(func, args, kwargs):
            x.record.replace(loaded[id(x.record)])
        back = {id(loaded[key]): x for key, x in given.items()}
        return tree_map_only(torch.Tensor, lambda x: back.get(id(x), x), result)

    @property
    def data(self) -> torch.Tensor:
        """As of any tensor: what is changed in it changes the gradient."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if isinstance(value, OffloadedGradient):
            if value.record is self.record:
                return  # as after `grad.data *= 2`
            value = value.clone()
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.record = self.record.in_place_of(value)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.clone())


def _in_memory(name: str) -> Callable[..., Any]:
    """A method that no operator tells of: it is that of the gradient, which stays in memory."""

    def method(self: OffloadedGradient, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.record.hand_out(), name)(*args, **kwargs)

    return method


for _name in _OF_MEMORY:
    setattr(OffloadedGradient, _name, _in_memory(_name))


class UsedGradient(torch.Tensor):
    """Stands for a gradient whose parameter is updated already: whoever reads it is told so."""

    _explain: Callable[[bool], str]
    _norm: torch.Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, explain: Callable[[bool], str], norm: torch.Tensor | None = None, **like: Any) -> UsedGradient:
        """Looks like the gradient.

        `explain` says what is wrong; its argument, whether a backward pass wants to add to the gradient. `norm`: its
        2-norm, where somebody wants to log that.
        """
        found: UsedGradient = torch.Tensor._make_wrapper_subclass(cls, **like)
        found._explain, found._norm = explain, norm
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Raises; a copy, on whatever device, is another one.

        Raises:
            RuntimeError: the gradient is to be read or changed.
        """
        used = next(x for x in tree_iter((args, kwargs)) if isinstance(x, cls))
        name = func.overloadpacket.__name__
        if name in ("alias", "clone", "detach", "_to_copy"):
            like = {"size": used.size(), "dtype": used.dtype, "device": used.device}
            like |= {key: value for key, value in (kwargs or {}).items() if key in like and value}
            return cls(used._explain, used._norm, **like)
        if used._norm is not None and _is_two_norm(func, args, kwargs or {}):
            return used._norm
        if used._norm is not None and name == "mul_" and not isinstance(args[1], cls) and bool(args[1] == 1):
            return args[0]  # clipped to infinity, by who reads the norm so
        raise RuntimeError(used._explain(torch._C._current_graph_task_id() >= 0 and name in ("add", "add_")))

    def __repr__(self) -> str:  # type: ignore[override]
        return "UsedGradient()"


def _refused(self: UsedGradient, *_: Any, **__: Any) -> Any:
    raise RuntimeError(self._explain(False))


for _name in (*_OF_MEMORY, "__reduce_ex__", "__deepcopy__"):
    setattr(UsedGradient, _name, _refused)


def record_of(parameter: torch.Tensor) -> GradientRecord | None:
    """That of a parameter's gradient, if it is offloaded."""
    grad = parameter.grad
    return grad.record if isinstance(grad, OffloadedGradient) else None


def _is_two_norm(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return func is torch.ops.aten.linalg_vector_norm.default and list(args[1:]) in ([], [2]) and not kwargs


def _one_by_one(args: Sequence[Any]) -> list[list[Any]]:
    """The arguments of an operator on lists, for one place of the lists after the other."""
    length = len(args[0])
    if any(torch.is_tensor(x) and x.dim() for x in args) and length != 1:
        return []  # numbers for all of them, in one tensor
    return [[[x[i]] if isinstance(x, list | tuple) else x for x in args] for i in range(length)]


def _joined(results: list[Any]) -> Any:
    """The results of `_one_by_one` as one."""
    if not isinstance(results[0], list | tuple):
        return None
    if isinstance(results[0], tuple):
        return tuple(_joined(list(part)) for part in zip(*results, strict=True))
    return [x for result in results for x in result]


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[OffloadedGradient]:
    """The gradients among the arguments that an operator changes."""
    names = [argument.name for argument in func._schema.arguments]
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    changed = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [x for name in changed for x in tree_iter(values.get(name)) if isinstance(x, OffloadedGradient)]
