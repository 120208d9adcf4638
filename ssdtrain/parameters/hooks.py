"""The hooks that find an offloaded parameter missing, and those of state dicts.

[Note: how a parameter is found missing]
Forward: every block has a hook before its forward. Whatever takes a parameter out of a module of a block without that
(`functional.linear(x, block.fc.weight)`) finds `_Register` in the place of the module's dictionary of parameters, which
reloads it; whatever else computes with one, see [Note: how a parameter is reached]. Backward: while the module or a
block runs forward, what autograd saves of an offloaded parameter becomes a `_Saved`, which reloads it when it is
unpacked. Everything else that is saved goes to whoever would have had it. A block's outputs reload it a little earlier,
for custom functions that keep a parameter without autograd.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._compile import _disable_dynamo
from torch._subclasses import FakeTensor
from torch.autograd.graph import register_multi_grad_hook, saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from ssdtrain.parameters.blocks import Block
from ssdtrain.parameters.parameter import ParameterRecord, not_real
from ssdtrain.parameters.placeholder import SHARDED, is_differentiated
from ssdtrain.parameters.working_set import WorkingSet, is_in_backward
from ssdtrain.stats import Counters
from ssdtrain.store.identity import ViewSpec, view_spec
from ssdtrain.store.record import Resident
from ssdtrain.store.saved_tensors import innermost_hooks, modified, take_off, unpack_resident

_LOW_PRECISION = (torch.float16, torch.bfloat16)
_RESHAPES = ("ToCopyBackward0", "TBackward0", "TransposeBackward0", "ViewBackward0", "PermuteBackward0")
_MAX_RESHAPES = 3
_is_traced = torch.compiler.is_compiling


class _Saved(NamedTuple):
    """What autograd saved of an offloaded parameter."""

    record: ParameterRecord
    spec: ViewSpec
    version: int
    cast: torch.dtype | None  # of autocast's copy: made again rather than held


class _Register(dict[str, Any]):
    """A module's dictionary of parameters, which has what is taken out of it reloaded."""

    def __init__(self, parameters: Mapping[str, Any], working_set: WorkingSet) -> None:
        super().__init__(parameters)
        self._working_set = working_set

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        if parameter is not None:
            self._working_set.gather_taken_out(parameter)
        return parameter

    def __setitem__(self, name: str, value: Any) -> None:
        if value is not self.get(name):
            self._refuse_to_lose(name, value)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self._refuse_to_lose(name)
        super().__delitem__(name)

    def pop(self, name: str, *default: Any) -> Any:
        self._refuse_to_lose(name)
        return super().pop(name, *default)

    def _refuse_to_lose(self, name: str, value: Any = None) -> None:
        parameter = self.get(name)
        for r in self._working_set.find([parameter] if parameter is not None else []):
            if isinstance(value, FakeTensor):
                raise not_real(r)
            raise RuntimeError(
                f"Expected parameter {r.name} to stay the same object while it is offloaded, got another in its place "
                "or none: shard, parametrise, quantise or replace it before offload_parameters()"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        """One parameter after the other in memory, for a copy that is all in memory."""
        return {name: copy.deepcopy(value, memo) for name, value in self.items()}

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "Expected a module whose parameters are in memory, got one whose parameters are offloaded: save its "
            "state_dict(), or copy.deepcopy(module), which is a plain one"
        )


class _Hook:
    """What a module calls; a copy of the module calls nothing."""

    def __init__(self, call: Callable[..., None] | None) -> None:
        self._call = call

    @_disable_dynamo
    def __call__(self, *args: Any) -> None:
        if self._call is not None:
            self._call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None)

    def __reduce__(self) -> Any:
        return _Hook, (None,)


class _Parallelisms(dict[Any, Any]):
    """The states of PyTorch's composable parallelisms of a module, which refuses those that take its parameters away.

    Only what is about to be applied is looked up in it; whoever asks what was applied looks elsewhere.
    """

    def __contains__(self, function: object) -> bool:
        if getattr(function, "__name__", None) in ("fully_shard", "replicate"):
            raise ValueError(SHARDED)
        return super().__contains__(function)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


class _Running(threading.local):
    """Forwards that run in this thread, of the module (None) and of blocks, with what takes what autograd saves."""

    def __init__(self) -> None:
        self.entries: list[tuple[Block | None, saved_tensors_hooks | None]] = []


class Hooks:
    """All hooks of one offloaded module, but those of optimizers."""

    def __init__(
        self,
        module: torch.nn.Module,
        working_set: WorkingSet,
        mapped_copy: Callable[[torch.Tensor, ViewSpec], torch.Tensor],
        check_complete: Callable[[], None],
        on_loaded: Callable[[list[ParameterRecord]], None],
    ) -> None:
        """Follows the forwards of `module`; `install` follows a block.

        `mapped_copy` makes values of state dicts. `check_complete` raises when none may be saved. `on_loaded` is told
        what `load_state_dict` has loaded.
        """
        self._on_loaded = on_loaded
        self._working_set, self._mapped_copy, self._check_complete = working_set, mapped_copy, check_complete
        self._running = _Running()
        self._loading: dict[torch.nn.Module, list[ParameterRecord]] = {}
        self._idle_counters = Counters()
        self._saving: dict[torch.nn.Module, list[tuple[ParameterRecord, int]]] = {}  # and their versions
        self._handles: list[Any] = [
            module.register_forward_pre_hook(_Hook(self._before_module), prepend=True),
            module.register_forward_hook(_Hook(self._after_module), always_call=True),
        ]
        self._marked = [module]
        _refuse_sharding(module)

    def install(self, block: Block, owners: Iterable[torch.nn.Module]) -> None:
        """Follows a block, whose parameters are those of `owners`."""
        for owner in owners:
            owner.__dict__["_parameters"] = _Register(owner._parameters, self._working_set)
            self._handles += [
                owner.register_state_dict_pre_hook(_Hook(self._before_state_dict)),
                owner.register_state_dict_post_hook(_Hook(self._fill_state_dict)),
                owner.register_load_state_dict_pre_hook(_Hook(self._before_load)),
                owner.register_load_state_dict_post_hook(_Hook(self._after_load)),
            ]
        block.remember()
        self._handles += [
            block.module.register_forward_pre_hook(_Hook(partial(self._before_block, block)), prepend=True),
            block.module.register_forward_hook(_Hook(partial(self._after_block, block)), always_call=True),
        ]
        for module in block.module.modules():
            self._marked.append(module)
            _refuse_sharding(module)

    def remove(self) -> None:
        """Removes every hook: the module is as it was before `install`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for module in self._marked:
            _allow_sharding(module)
        for block in self._working_set.blocks:
            for module in block.module.modules():
                if isinstance(module._parameters, _Register):
                    module.__dict__["_parameters"] = dict(module._parameters)

    # -- forward -------------------------------------------------------------------------------------------------------

    def _before_module(self, module: torch.nn.Module, args: Any) -> None:
        if not is_in_backward():
            self._leave_until(None)  # Ctrl-C in an earlier forward: PyTorch runs no hooks after it
        self._working_set.begin_forward()
        self._running.entries.append((None, self._enter()))

    def _after_module(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if self._running.entries:
            self._leave_until(None)

    def _before_block(self, block: Block, module: torch.nn.Module, args: Any) -> None:
        block.check()
        check_differentiable(block.records)
        self._working_set.use(block)
        self._begin(block)
        self._running.entries.append((block, self._enter()))

    def _after_block(self, block: Block, module: torch.nn.Module, args: Any, output: Any) -> None:
        if not any(entry[0] is block for entry in self._running.entries):  # its forward never began
            return
        self._leave_until(block)
        if block.num_running or is_in_backward():
            return
        if torch.is_grad_enabled():
            needing = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.grad_fn is not None]
            if needing:
                register_multi_grad_hook(needing, lambda _: self._working_set.use(block), mode="any")
        self._working_set.end_use(block)

    def _leave_until(self, last: Block | None) -> None:
        """Ends forwards of this thread, the latest first, up to one of `last`, or of the module."""
        entries = self._running.entries
        while entries:
            block, hooks = entries.pop()
            if hooks is not None:
                take_off(hooks.pack_hook)
            if block is None:
                self._working_set.end_forward()
            else:
                self._end(block)
            if block is last:
                break

    def _begin(self, block: Block) -> None:
        with self._working_set.lock:
            block.num_running += 1
            if block.num_running == 1:
                for r in block.records:
                    r.pin()

    def _end(self, block: Block) -> None:
        with self._working_set.lock:
            block.num_running -= 1
            if block.num_running == 0:
                for r in block.records:
                    if r.num_pins:  # not closed meanwhile
                        r.unpin()

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Takes what autograd saves of our parameters inside; a checkpoint, which counts what is saved, has it all."""
        outer = innermost_hooks()
        is_counted = outer is not None and outer[0].__module__ == "torch.utils.checkpoint"
        hooks = None if is_counted else self._enter()
        try:
            yield
        finally:
            if hooks is not None:
                hooks.__exit__()

    def _enter(self) -> saved_tensors_hooks | None:
        """Takes what autograd saves of our parameters from here on, unless we do already."""
        if not torch.is_grad_enabled() or is_differentiated():
            return None
        outer = innermost_hooks()
        if outer is not None and getattr(outer[0], "func", None) == self._pack:
            return None
        pack, unpack = outer if outer is not None else (self._hold, unpack_resident)
        hooks = saved_tensors_hooks(partial(self._pack, pack), partial(self._unpack, unpack))
        hooks.__enter__()
        return hooks

    # -- what autograd saves -------------------------------------------------------------------------------------------

    def _pack(self, outer: Callable[[torch.Tensor], Any], tensor: torch.Tensor, is_aside: bool = False) -> Any:
        if _is_traced() and not is_aside:  # by the compiler, see `ssdtrain.store.not_compiled`
            from ssdtrain.store.not_compiled import aside

            return aside(self._pack, outer, tensor, True)
        found = self._working_set.records.by_storage.get(_storage_address(tensor))
        if found is not None:
            return _Saved(found, view_spec(tensor), found.parameter._version, None)
        original = _autocast_source(tensor)
        for record in self._working_set.find([original]) if original is not None else ():
            return _Saved(record, view_spec(tensor), record.parameter._version, tensor.dtype)
        return outer(tensor)

    def _unpack(self, outer: Callable[[Any], torch.Tensor], saved: Any, is_aside: bool = False) -> torch.Tensor:
        if _is_traced() and not is_aside:
            from ssdtrain.store.not_compiled import aside

            return aside(self._unpack, outer, saved, True)  # type: ignore[no-any-return]
        if type(saved) is not _Saved:
            return outer(saved)
        record, spec, version, cast = saved
        self._working_set.use_parameter(record)
        if record.parameter._version != version:
            raise modified(record.spec, record.parameter._version, version)
        if cast is not None:
            copy = record.view(record.spec).to(cast)
            return copy.as_strided(spec.size, spec.stride, spec.storage_offset)
        return record.view(spec)  # not the parameter, which might leave while the operator runs

    def _hold(self, tensor: torch.Tensor) -> Resident:
        return Resident(tensor, 0, self._idle_counters)

    # -- state dicts ---------------------------------------------------------------------------------------------------

    def _mine(self, module: torch.nn.Module) -> dict[str, ParameterRecord]:
        named = {name: p for name, p in module._parameters.items() if p is not None}
        return {name: r for name, p in named.items() for r in self._working_set.find([p])}

    def _before_state_dict(self, module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
        self._saving[module] = [(r, r.version) for r in self._mine(module).values()]

    def _fill_state_dict(self, module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        """Copies in files in the place of parameters that come and go."""
        self._check_complete()
        for name, r in self._mine(module).items():
            if prefix + name in state:
                with self._working_set.lock, torch.no_grad():
                    self._working_set.records.reload([r])
                    state[prefix + name] = self._mapped_copy(r.view(r.spec), r.spec)
                    self._working_set.release([r])
                    self._working_set.records.copies.note(state[prefix + name], r)
        for r, version in self._saving.pop(module, []):
            if not r.is_shared:
                r.version = version  # what the module took out of it to put into the dict was not changed

    def _before_load(
        self, module: torch.nn.Module, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], *_: Any
    ) -> None:
        mine = [r for name, r in self._mine(module).items() if _fits(r, state.get(prefix + name))]
        if mine and metadata.get("assign_to_params_buffers"):
            raise RuntimeError(
                f"Expected load_state_dict(assign=False) where parameters are offloaded, got assign=True for "
                f"{mine[0].name}, which has to stay the same object"
            )
        with self._working_set.lock:
            for r in mine:
                if not r.is_valid:
                    self._working_set.records.materialize_empty(r)
            self._working_set.records.reload(mine)
            self._loading[module] = mine

    def _after_load(self, module: torch.nn.Module, incompatible: Any) -> None:
        with self._working_set.lock:
            mine = self._loading.pop(module, [])
            self._working_set.records.note_changed(mine)
            self._working_set.release(mine)
            self._on_loaded(mine)


def check_differentiable(records: Iterable[ParameterRecord]) -> None:
    """Raises where a `torch.func` transform would keep one that leaves, see `is_differentiated`."""
    if is_differentiated():
        for r in [r for r in records if not r.num_pins]:
            raise RuntimeError(
                f"Expected parameters in memory inside torch.func.grad, vjp, jacrev and hessian, got {r.name}, "
                "which is offloaded: call them inside parameter_offload(model).gathered(), or take torch.autograd.grad"
            )


def _fits(r: ParameterRecord, value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == r.spec.size


def _refuse_sharding(module: torch.nn.Module) -> None:
    if dist.is_available():
        from torch.distributed._composable.contract import STATE_KEY

        vars(module)[STATE_KEY] = _Parallelisms(vars(module).get(STATE_KEY, {}))


def _allow_sharding(module: torch.nn.Module) -> None:
    for name, value in list(vars(module).items()):
        if type(value) is _Parallelisms:
            vars(module)[name] = dict(value)


def _storage_address(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return 0


def _autocast_source(tensor: torch.Tensor) -> torch.Tensor | None:
    """The weight that autocast made `tensor` of, if `tensor` is that whole copy or a view of it."""
    node = tensor.grad_fn if tensor.dtype in _LOW_PRECISION else None
    for _ in range(_MAX_RESHAPES):
        if node is None or node.name() not in _RESHAPES:
            return None
        following = node.next_functions[0][0]
        if node.name() == "ToCopyBackward0":
            source = getattr(following, "variable", None)
            copy = tensor if tensor._base is None else tensor._base
            is_whole = source is not None and copy.size() == source.size() and copy.stride() == source.stride()
            return source if is_whole and copy._version == 0 else None
        node = following
    return None
