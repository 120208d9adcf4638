"""Computation that runs later: every operator below autograd is queued on the current stream.

- Views and changes of metadata run at once: they touch no data.
- Random numbers are drawn at once and written later, so that the generator moves in the order of the program.
- An operator whose result only a run can tell is queued too, and waited for.
- Everything else is queued on aliases of its arguments; its results are poisoned memory until it has run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_unflatten

from ssdtrain.devices.simulated.machine import Machine, Work
from ssdtrain.devices.simulated.order import Span
from ssdtrain.devices.simulated.shapes import Outcome, Shapes
from ssdtrain.devices.simulated.tensors import Alias, make, map_tensors, spans_of, tensors_in

_aten = torch.ops.aten
_VIEWS_IN_DISGUISE = {"aten::_unsafe_view", "aten::unsafe_split", "aten::unsafe_split_with_sizes", "aten::unsafe_chunk"}
_EMPTY = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided"}
_HIDDEN_TARGETS = {"aten::native_batch_norm": (3, 4)}  # the running statistics, in training
_HOST_READERS = {  # they read a CPU tensor's memory without an operator that could be seen
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.__array__,
    torch.Tensor.__repr__,
    torch.Tensor.__format__,
    torch.Tensor.tensor_split,
    torch.tensor_split,
    torch.ctc_loss,
}
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


class HostReaderMode(TorchFunctionMode):
    """Makes functions that read a tensor's memory on the host wait for the current stream."""

    def __init__(self, machine: Machine) -> None:
        """To be entered by the device."""
        super().__init__()
        self._machine = machine

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by PyTorch for every function of its interface."""
        if func in _HOST_READERS:
            synchronize(self._machine, func.__name__)
        return func(*args, **(kwargs or {}))


def synchronize(machine: Machine, what: str) -> None:
    """Waits for the current stream, as an accelerator does when the host wants data."""
    machine.synchronize(machine.record(machine.current), f"the data that `{what}` needs on the host")
    machine.raise_kept()


class LaterMode(TorchDispatchMode):
    """Queues operators of one thread on a `Machine`."""

    def __init__(self, machine: Machine, shapes: Shapes) -> None:
        """To be entered by the device."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._machine = machine
        self._shapes = shapes
        self._alias = Alias(machine)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by PyTorch for every operator."""
        kwargs = kwargs or {}
        tensors = tensors_in(*args, *kwargs.values())
        if not all(type(tensor) in _PLAIN_TYPES for tensor in tensors):
            return NotImplemented
        if not isinstance(func, OpOverload) or func.namespace == "profiler":  # marks what the host does
            return func(*args, **kwargs)
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if not all(map(_is_plain, tensors)) or torch.device(kwargs.get("device") or "cpu").type != "cpu":
            return self._run_outside(func, args, kwargs, tensors)
        if func is _aten.lift_fresh.default:  # `torch.tensor(...)`: onto the device with it
            return self._later(_aten.clone.default, args, {})
        if _is_view(func):
            return func(*args, **kwargs)
        return self._later(func, args, kwargs)

    def _later(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outcome = self._shapes.infer(func, args, kwargs)
        if outcome is None:
            return self._wait_for_result(func, args, kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            return self._draw(func, args, kwargs, outcome)
        result = self._prepare(func, args, kwargs, outcome)
        if func._schema.name not in _EMPTY:
            self._queue(func, args, kwargs, result)
        if _is_blocking_copy_to_host(func, args, kwargs) and not self._alias.is_managed(args[0]):
            synchronize(self._machine, str(func))
        return result

    def _prepare(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], outcome: Outcome) -> Any:
        """What the caller gets: targets as they are, new tensors from the pool."""
        if not _makes_tensors(func):
            return _own_targets(func, args, kwargs)
        made = [None if spec is None else make(self._machine, spec) for spec in outcome.specs]
        return made[0] if outcome.is_single else tree_unflatten(made, outcome.tree)

    def _queue(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """The operator on aliases; what it returns is copied to where the caller will look for it."""
        run_args, run_kwargs = map_tensors((args, kwargs), self._alias.of)
        targets = _targets(func, args, kwargs)
        fresh = tensors_in(result) if _makes_tensors(func) else []
        places = [self._alias.of(tensor) for tensor in fresh]

        def run() -> None:
            actual = func(*run_args, **run_kwargs)
            if places:
                _fill(places, actual, _name(func))

        reads = _spans(tensors_in(*args, *kwargs.values()))
        self._machine.submit(self._machine.current, Work(_name(func), run, reads, _spans(targets + fresh)))

    def _draw(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], outcome: Outcome) -> Any:
        """Random numbers that do not depend on data are drawn now; others when the stream has come this far."""
        targets = _targets(func, args, kwargs)
        tensors = tensors_in(*args, *kwargs.values())
        is_like = func._schema.name.endswith("_like")
        if len(tensors) != len(targets) and not (is_like and len(tensors) == 1):
            return self._wait_for_result(func, args, kwargs)
        drawn = func(*map_tensors(args, _stand_in), **map_tensors(kwargs, _stand_in))
        result = self._prepare(func, args, kwargs, outcome)
        self._queue(_aten.copy_.default, (result, drawn), {}, result)
        return result

    def _wait_for_result(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the operator on the current stream, now."""
        run_args, run_kwargs = map_tensors((args, kwargs), self._alias.of)
        targets = _targets(func, args, kwargs)
        actual: list[Any] = []
        reads = _spans(tensors_in(*args, *kwargs.values()))
        work = Work(str(func), lambda: _catch(actual, func, run_args, run_kwargs), reads, _spans(targets))
        self._machine.submit(self._machine.current, work)
        synchronize(self._machine, str(func))
        value, error = actual
        if error is not None:
            raise error
        return map_tensors(value, self._adopt) if _makes_tensors(func) else _own_targets(func, args, kwargs)

    def _adopt(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device of a result that is there already."""
        return self._later(_aten.clone.default, (tensor,), {}) if _is_plain(tensor) else tensor

    def _run_outside(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor]
    ) -> Any:
        """Sparse, quantised, meta: not of this device; what it needs of ours is there first."""
        if any(tensor.is_cpu for tensor in tensors):
            synchronize(self._machine, str(func))
        return func(*args, **kwargs)


@cache
def _is_view(func: OpOverload) -> bool:
    if torch.Tag.inplace_view in func.tags or func._schema.name in _VIEWS_IN_DISGUISE:
        return True
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_cpu and tensor.layout is torch.strided and not tensor.is_quantized


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """Memory that is filled in the same order."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)


@cache
def _is_composite(func: OpOverload) -> bool:
    """Whether PyTorch itself would run it as other operators: seen here in inference mode only."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(func.name(), "CompositeImplicitAutograd") and not has_kernel(func.name(), "CPU")


@cache
def _makes_tensors(func: OpOverload) -> bool:
    """Whether it returns something else than what it was given to write to."""
    return any(r.alias_info is None for r in func._schema.returns)


def _own_targets(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator in place, or with `out=`, returns."""
    returned = tuple(args[i] if i < len(args) else kwargs[name] for i, name in _returned(func))
    return returned[0] if len(returned) == 1 else returned or None


def _targets(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The arguments that the operator writes to, whether its schema says so or not."""
    return tensors_in(*(args[i] if i < len(args) else kwargs.get(name) for i, name in _written(func)))


@cache
def _returned(func: OpOverload) -> list[tuple[int, str]]:
    """Places and names of the arguments that it returns."""
    names = {name for r in func._schema.returns if r.alias_info for name in r.alias_info.before_set}
    arguments = enumerate(func._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.before_set & names]


@cache
def _written(func: OpOverload) -> list[tuple[int, str]]:
    """Places and names of the arguments that it writes to."""
    hidden = _HIDDEN_TARGETS.get(func._schema.name, ())
    arguments = list(enumerate(func._schema.arguments))
    told = [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return [(i, a.name) for i, a in arguments if i in hidden] + told


@cache
def _name(func: OpOverload) -> str:
    return str(func)


def _spans(tensors: list[torch.Tensor]) -> tuple[Span, ...]:
    return tuple(dict.fromkeys(span for tensor in tensors for span in spans_of(tensor)))


def _fill(places: list[torch.Tensor], actual: Any, name: str) -> None:
    results = tensors_in(actual)
    if [(t.shape, t.dtype) for t in places] != [(t.shape, t.dtype) for t in results]:
        expected, got = ([(tuple(t.shape), t.dtype) for t in tensors] for tensors in (places, results))
        raise RuntimeError(f"Expected `{name}` to return {expected} as its rule for fake tensors says, got {got}")
    for place, result in zip(places, results, strict=True):
        place.copy_(result)


def _catch(actual: list[Any], func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The waiting thread raises it: kept for the next synchronisation it would be raised twice."""
    try:
        actual[:] = func(*args, **kwargs), None
    except Exception as error:
        actual[:] = None, error


def _is_blocking_copy_to_host(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return func is _aten.copy_.default and not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
