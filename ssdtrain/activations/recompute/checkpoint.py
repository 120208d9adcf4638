"""PyTorch's activation checkpoint, whose inputs are all tensors that the function gets, whichever way.

PyTorch's own saves positional tensors alone; those in keywords, containers, closures, partials and bound methods stay
in memory by a plain reference, where no hook sees them.

[Note: two calls]
The first call is the user's own function with the user's own arguments. The second one, in backward, is of a function
and containers made anew round what was saved: what the first call appended to or assigned is not seen by the second.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.utils.checkpoint as plain
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_Fill = Callable[[Sequence[torch.Tensor], dict[int, Any]], Any]
"""Makes a value anew of the saved tensors; the second argument has the cells of closures made so far."""

_DEFAULTS = types.MappingProxyType(
    {"determinism_check": "default", "debug": False, "early_stop": True, "context_fn": plain.noop_context_fn}
)

_Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    use_reentrant: bool | None = None,
    context_fn: _Contexts = plain.noop_context_fn,
    determinism_check: str = "default",
    debug: bool = False,
    early_stop: bool = True,
    preserve_rng_state: bool = True,
    respect_saved_tensors_hooks: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Runs a function again in backward instead of keeping what it saves; all tensors it gets are offloaded inputs.

    A drop-in for `torch.utils.checkpoint.checkpoint`, equal to the bit. Inside `offload_activations` memory falls by
    every tensor that reaches the function: positional, keyword, in lists, tuples and dicts, in the cells and defaults
    of a closure, in a `functools.partial`, and what a method is bound to. Parameters stay where they are, and so do
    tensors in attributes of other objects. In backward the function sees what it saw in forward, also where a variable
    that it closes over has another value by then.

    Args:
        function: what to run twice.
        args: its arguments.
        use_reentrant: False or None; the reentrant kind is PyTorch's own alone.
        context_fn: as in PyTorch. What a selective checkpoint keeps is offloaded too.
        determinism_check: as in PyTorch.
        debug: as in PyTorch.
        early_stop: as in PyTorch, where it has it.
        preserve_rng_state: as in PyTorch.
        respect_saved_tensors_hooks: whether what a selective checkpoint keeps is offloaded; None means True. PyTorch
            has this argument since 2.14, where its default is False; here it is for older versions too.
        kwargs: the function's keyword arguments.

    Returns:
        What the function returns.

    Raises:
        ValueError: `use_reentrant` is True.
        RuntimeError: in backward: a tensor that the function gets was changed in place since.

    Example:
        >>> with ssdtrain.offload_activations("/mnt/nvme"):
        ...     for layer in layers:
        ...         x = ssdtrain.checkpoint(layer, x, attention_mask=mask)
    """
    if use_reentrant:
        raise ValueError(
            "Expected use_reentrant=False, got True: a reentrant checkpoint hides its graph from autograd's hooks. "
            "Pass False, or call torch.utils.checkpoint.checkpoint"
        )
    given = {"determinism_check": determinism_check, "debug": debug, "early_stop": early_stop, "context_fn": context_fn}
    options: dict[str, Any] = {name: value for name, value in given.items() if value != _DEFAULTS[name]}
    options |= {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
    if torch.compiler.is_compiling():  # the compiler knows PyTorch's by name, and what it saves is the graph's
        return plain.checkpoint(function, *args, **options, **kwargs)
    inputs = _Inputs()
    fill = inputs.take((function, args, kwargs))
    return _run(_Call(function, args, kwargs, fill), inputs.tensors, options, respect_saved_tensors_hooks is not False)


def _run(call: _Call, tensors: list[torch.Tensor], options: dict[str, Any], offloads_kept: bool) -> Any:
    if "context_fn" in options and _has_switch():
        pair = options["context_fn"]()
        options["context_fn"] = lambda: pair
        offloads_kept = offloads_kept and not _may_change(pair[1])
        return plain.checkpoint(call, *tensors, respect_saved_tensors_hooks=offloads_kept, **options)
    if "context_fn" not in options or not offloads_kept:
        return plain.checkpoint(call, *tensors, **options)
    modes: list[Any] = []
    options["context_fn"] = functools.partial(_noting, options["context_fn"], modes)
    result = plain.checkpoint(call, *tensors, **options)
    _send_kept(modes)
    return result


class _Call:
    """The function with its arguments; see [Note: two calls]."""

    def __init__(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], fill: _Fill | None) -> None:
        self._first: tuple[Any, ...] | None = (function, args, kwargs)
        self._fill = fill
        self._rest = self._first if fill is None else None  # without tensors there is nothing to hold back

    def __call__(self, *tensors: torch.Tensor) -> Any:
        call, self._first = self._first or self._rest, None
        if call is None:
            assert self._fill is not None
            call = self._fill(tensors, {})
        function, args, kwargs = call
        del call
        return function(*args, **kwargs)


class _Inputs:
    """Takes the tensors out of a call."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self._index: dict[int, int] = {}  # by the tensor's id
        self._entered: list[int] = []  # cells being looked into: a function may close over itself

    def take(self, value: Any) -> _Fill | None:
        """What makes a value anew of its tensors; None where it has none and may be held as it is."""
        leaves, spec = tree_flatten(value)
        fills = [self._leaf(leaf) for leaf in leaves]
        if not any(fills):
            return None
        rest = [leaf if fill is None else None for leaf, fill in zip(leaves, fills, strict=True)]

        def fill_all(tensors: Sequence[torch.Tensor], cells: dict[int, Any]) -> Any:
            made = [leaf if fill is None else fill(tensors, cells) for leaf, fill in zip(rest, fills, strict=True)]
            return tree_unflatten(made, spec)

        return fills[0] if spec.is_leaf() else fill_all

    def _leaf(self, leaf: Any) -> _Fill | None:
        if isinstance(leaf, torch.Tensor):
            return None if isinstance(leaf, torch.nn.Parameter) else self._tensor(leaf)
        if isinstance(leaf, functools.partial):
            return self._made_of((leaf.func, leaf.args, leaf.keywords), _partial)
        if isinstance(leaf, types.MethodType):
            return self._made_of((leaf.__func__, leaf.__self__), lambda made: types.MethodType(*made))
        if isinstance(leaf, types.BuiltinMethodType) and isinstance(leaf.__self__, torch.Tensor):
            name = leaf.__name__
            return self._made_of(leaf.__self__, lambda tensor: getattr(tensor, name))
        if isinstance(leaf, types.FunctionType) and not hasattr(leaf, "_torchdynamo_orig_callable"):
            return self._function(leaf)
        return None

    def _tensor(self, tensor: torch.Tensor) -> _Fill:
        index = self._index.setdefault(id(tensor), len(self.tensors))
        if index == len(self.tensors):
            self.tensors.append(tensor)
        return lambda tensors, _: tensors[index]

    def _made_of(self, value: Any, make: Callable[[Any], Any]) -> _Fill | None:
        fill = self.take(value)
        return None if fill is None else lambda tensors, cells: make(fill(tensors, cells))

    def _function(self, function: types.FunctionType) -> _Fill | None:
        cells = function.__closure__ or ()
        fills = [self._cell(cell) for cell in cells]
        defaults = self.take((function.__defaults__, function.__kwdefaults__))
        if defaults is None and not any(fills):
            return None
        rest = [cell if fill is None else None for cell, fill in zip(cells, fills, strict=True)]
        code, names, attributes = function.__code__, function.__globals__, dict(vars(function))
        own = None if defaults else (function.__defaults__, function.__kwdefaults__)

        def fill_function(tensors: Sequence[torch.Tensor], made: dict[int, Any]) -> Any:
            closure: tuple[Any, ...] = tuple(
                c if fill is None else fill(tensors, made) for c, fill in zip(rest, fills, strict=True)
            )
            positional, keyword = own or defaults(tensors, made)  # type: ignore[misc]
            again = types.FunctionType(code, names, code.co_name, positional, closure)
            again.__kwdefaults__ = keyword
            vars(again).update(attributes)
            return again

        return fill_function

    def _cell(self, cell: types.CellType) -> _Fill | None:
        """A new cell; functions that share one share the new one."""
        key = id(cell)
        if key in self._entered:
            return lambda _, made: made[key]
        self._entered.append(key)
        try:
            fill = self.take(cell.cell_contents)
        except ValueError:  # it is empty
            return None
        finally:
            self._entered.pop()
        if fill is None:
            return None

        def fill_cell(tensors: Sequence[torch.Tensor], made: dict[int, Any]) -> Any:
            if key not in made:
                made[key] = types.CellType()
                made[key].cell_contents = fill(tensors, made)
            return made[key]

        return fill_cell


def _partial(made: tuple[Any, Any, Any]) -> Any:
    function, args, keywords = made
    return functools.partial(function, *args, **keywords)


# -- what a selective checkpoint keeps -----------------------------------------------------------------------------


class _Save(torch.autograd.Function):
    """A node of autograd that is only there to save a tensor: no backward ever comes to it."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """`anchor` wants a gradient, or there would be no node, which what is returned owns."""
        ctx.save_for_backward(tensor)
        return anchor.clone()


class _Kept:
    """An output that is kept, held by autograd's means: the hooks around see it. In place of PyTorch's own holder."""

    def __init__(self, tensor: torch.Tensor) -> None:
        with torch.enable_grad():
            anchor = torch.empty(0, device="cpu", requires_grad=True)
            self._saved: Any = _Save.apply(anchor, tensor)  # type: ignore[no-untyped-call]

    def get_val(self, allow_cache_entry_mutation: bool) -> torch.Tensor:
        """What was kept, unless it was changed."""
        tensor: torch.Tensor = self._saved.grad_fn.saved_tensors[0]
        return tensor


def _has_switch() -> bool:
    return "respect_saved_tensors_hooks" in inspect.signature(plain.checkpoint).parameters


def _may_change(again: Any) -> bool:
    """Whether what is kept may be changed in place, which autograd would not allow."""
    return bool(getattr(again, "allow_cache_entry_mutation", False))


def _noting(context_fn: _Contexts, modes: list[Any]) -> Any:
    pair = context_fn()
    modes.extend(pair)
    return pair


def _send_kept(modes: list[Any]) -> None:
    """Has outputs that a selective checkpoint keeps offloaded, before the version of PyTorch that does so itself."""
    forward, again = modes
    if isinstance(forward, plain._CachingTorchDispatchMode) and not _may_change(again):
        for key, entries in forward.storage.items():
            forward.storage[key] = tree_map(_kept, entries)


def _kept(entry: Any) -> Any:
    """What has been changed since it was kept stays PyTorch's, which raises when it is asked for."""
    is_tensor = isinstance(entry, plain._VersionWrapper) and isinstance(entry.val, torch.Tensor)
    return _Kept(entry.val) if is_tensor and entry.val._version == entry.version else entry
