"""`offload_parameters`: a module's blocks live on the drive, and are in memory only while they are used.

Which block comes next is `order`'s, where a parameter is `residence`'s; here are the hooks.

[Note: how a parameter is found missing]
Forward: every block has a hook before its forward. Whatever takes a parameter out of a module of a block without that
(`functional.linear(x, block.fc.weight)`) finds `_Register` in the place of the module's dictionary of parameters, which
brings it. Backward: while a block runs forward, what autograd saves of its parameters becomes a `_Saved`, which brings
it when it is unpacked. Everything else that is saved goes to whoever would have had it.

[Note: when a block leaves]
In forward after its forward, unless it is the next one needed. In backward when a parameter of another block is
unpacked: autograd runs operators in the reverse order of forward. It leaves at the first unpacking by a later operator,
because the one that unpacks now may still use what it has unpacked before.
"""

from __future__ import annotations

import contextlib
import fnmatch
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ssdtrain.devices import Devices
from ssdtrain.identity import ViewSpec, spec_nbytes, view_spec
from ssdtrain.mapped import mapped, settle
from ssdtrain.order import UseOrder
from ssdtrain.parameter_blocks import Block, choose_blocks, choose_parameters, own_storage
from ssdtrain.policy import ParameterPolicy
from ssdtrain.record import Resident
from ssdtrain.residence import Residence, Residences
from ssdtrain.saving import innermost_hooks, modified
from ssdtrain.state_stats import StateCounters, StateStats
from ssdtrain.stats import Counters
from ssdtrain.vault import Vault

_ATTRIBUTE = "_ssdtrain_parameters"
_LOW_PRECISION = (torch.float16, torch.bfloat16)
_RESHAPES = ("ToCopyBackward0", "TBackward0", "TransposeBackward0", "ViewBackward0", "PermuteBackward0")
_MAX_RESHAPES = 3


class _Saved(NamedTuple):
    """What autograd saved of an offloaded parameter."""

    residence: Residence
    spec: ViewSpec
    version: int
    cast: torch.dtype | None  # of autocast's copy: made again rather than held


class _Register(dict[str, Any]):
    """A module's dictionary of parameters, which brings what is taken out of it."""

    def __init__(self, parameters: Mapping[str, Any], offload: ParameterOffload) -> None:
        super().__init__(parameters)
        self._offload = offload

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        if parameter is not None:
            self._offload.note_taken(parameter)
        return parameter

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "Expected a module whose parameters are in memory, got one whose parameters are offloaded: save its "
            "state_dict(), or copy the module before offload_parameters()"
        )


class ParameterOffload:
    """The offloaded parameters of one module; see `offload_parameters`, which makes it."""

    def __init__(
        self, module: torch.nn.Module, directories: Sequence[str], policy: ParameterPolicy, names: Sequence[str] | None
    ) -> None:
        """Writes the parameters of the blocks and frees their memory."""
        self.policy = policy
        self._module = module
        self._counters = StateCounters("parameters")
        self._lock = threading.RLock()
        self._handles: list[Any] = []
        self._blocks: list[Block] = []
        self._by_id: dict[int, tuple[Residence, Block]] = {}  # parameters, which it keeps alive
        self._by_storage: dict[int, tuple[Residence, Block]] = {}
        self._active: list[Block] = []  # the latest last
        self._visitors: list[Residence] = []  # in memory although no block needs them
        self._loading: dict[torch.nn.Module, list[Residence]] = {}
        self._idle_counters = Counters()
        chosen = choose_blocks(module, names)
        leaving = choose_parameters(module, chosen, policy.min_nbytes, self._counters)
        self._vault = Vault(directories, policy, self._counters)
        self._residences = Residences(self._vault, self._counters)
        self._order = UseOrder(len(chosen))
        try:
            self._vault.reserve(sum(spec_nbytes(view_spec(p)) for p in leaving.values()), "parameters")
            self._settle_in(chosen, leaving)
        except BaseException:
            self.close()
            raise
        module.__dict__[_ATTRIBUTE] = self

    @classmethod
    def of(cls, module: torch.nn.Module) -> ParameterOffload:
        """See `ssdtrain.parameter_offload`."""
        found: ParameterOffload | None = vars(module).get(_ATTRIBUTE)
        if found is None:
            raise ValueError(
                f"Expected a module whose parameters are offloaded, got {type(module).__name__}, which is not"
            )
        return found

    # -- life ----------------------------------------------------------------------------------------------------

    def _settle_in(self, chosen: Mapping[str, torch.nn.Module], leaving: Mapping[str, torch.nn.Parameter]) -> None:
        devices = Devices(self._vault.cpu, has_host_tier_only=False)
        names = {id(parameter): name for name, parameter in leaving.items()}
        for name, module in chosen.items():
            owners = [m for m in module.modules() if any(id(p) in names for p in m._parameters.values())]
            residences = []
            for p in {id(p): p for m in owners for p in m._parameters.values() if id(p) in names}.values():
                assert p is not None
                device = devices.cpu if p.is_meta else devices.of(p)
                if isinstance(device, str):
                    raise ValueError(
                        f"Expected parameters in memory of the CPU or of CUDA, got {device}: {names[id(p)]}"
                    )
                if not p.is_meta:
                    own_storage(p)
                residences.append(Residence(names[id(p)], p, device))
            block = Block(len(self._blocks), name, module, residences)
            self._blocks.append(block)
            for r in residences:
                self._by_id[id(r.parameter)] = self._by_storage[r.storage._cdata] = r, block
                r.parameter._ssdtrain_home = self  # type: ignore[attr-defined]
                self._counters.go(r.nbytes)
            self._install(block, owners)
            self._residences.leave(residences)
        self._watch_optimizers()

    def _install(self, block: Block, owners: Iterable[torch.nn.Module]) -> None:
        """All hooks of one block."""
        for owner in owners:
            owner.__dict__["_parameters"] = _Register(owner._parameters, self)
            self._handles += [
                owner.register_state_dict_post_hook(partial(self._fill_state_dict)),
                owner.register_load_state_dict_pre_hook(self._before_load),
                owner.register_load_state_dict_post_hook(self._after_load),
            ]
        block.remember()
        self._handles += [
            block.module.register_forward_pre_hook(partial(self._before_forward, block), prepend=True),
            block.module.register_forward_hook(partial(self._after_forward, block), always_call=True),
        ]

    def close(self) -> None:
        """Brings everything back into memory and takes all hooks away: the module is as it was. Idempotent.

        Raises:
            StateLostError: the drive does not have a parameter any more.
        """
        with self._lock:
            for r, _ in self._by_id.values():
                self._residences.bring([r])
            for handle in self._handles:
                handle.remove()
            for block in self._blocks:
                for module in block.module.modules():
                    if isinstance(module._parameters, _Register):
                        module.__dict__["_parameters"] = dict(module._parameters)
            for r, _ in self._by_id.values():
                del r.parameter._ssdtrain_home  # type: ignore[attr-defined]
            self._handles, self._blocks, self._by_id, self._by_storage = [], [], {}, {}
            self._active, self._visitors = [], []
            if vars(self._module).get(_ATTRIBUTE) is self:
                del self._module.__dict__[_ATTRIBUTE]
            self._vault.close()

    @property
    def stats(self) -> StateStats:
        """What it did and what it cost so far."""
        return StateStats.of(self._vault.totals())

    def flush(self) -> None:
        """Blocks until the drive has all that has changed.

        Raises:
            OSError: it could not take some of it, which is in memory.
        """
        with self._lock:
            self._residences.leave([r for r, _ in self._by_id.values()])
            self._vault.flush()
            self._residences.settle()

    def note_checkpoint(self, text: str) -> None:
        """Says which checkpoint to go back to, for messages of lost bytes."""
        self._vault.checkpoint = text

    def __reduce__(self) -> Any:
        raise TypeError("Expected parameters in memory, got one that is offloaded: save the module's state_dict()")

    # -- what the optimizer and the user need -------------------------------------------------------------------------

    @contextlib.contextmanager
    def gathered(self, *patterns: str) -> Iterator[None]:
        """Inside, the parameters whose names match a pattern (all without any) are in memory and may be changed.

        Example:
            >>> with offload.gathered("blocks.0.*"):
            ...     print(model.blocks[0].fc.weight.norm())
        """
        chosen = [r for r, _ in self._by_id.values() if not patterns or _matches(r.name, patterns)]
        if patterns and not chosen:
            raise ValueError(f"Expected names of offloaded parameters, got {', '.join(patterns)}, which match none")
        with self.in_memory([r.parameter for r in chosen]):
            yield

    @contextlib.contextmanager
    def in_memory(self, parameters: Iterable[torch.Tensor], *, to_change: bool = True) -> Iterator[None]:
        """Inside, these are in memory; those that are not its own do not matter."""
        chosen = [self._by_id[id(p)][0] for p in parameters if id(p) in self._by_id]
        with self._lock:
            for r in chosen:
                r.num_pins += 1
            try:
                self._residences.bring(chosen)
            except BaseException:
                self._unpin(chosen)
                raise
        try:
            yield
        finally:
            with self._lock:
                if to_change:
                    self._residences.note_changed(chosen)
                self._unpin(chosen)
                self._residences.leave([r for r in chosen if not self._is_in_use(r)])

    def name_of(self, parameter: torch.Tensor) -> str | None:
        """The parameter's name in the module; None for one that is not its own."""
        known = self._by_id.get(id(parameter))
        return known[0].name if known is not None else None

    def prefetch(self, parameters: Iterable[torch.Tensor]) -> None:
        """Begins to read those of these that are away."""
        with self._lock:
            self._residences.fetch(self._by_id[id(p)][0] for p in parameters if id(p) in self._by_id)

    def fill(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        """Gives a parameter a new value without reading the old one; it is cast to the parameter's dtype."""
        with self._lock, torch.no_grad():
            r = self._by_id[id(parameter)][0]
            self._residences.accept(r)
            r.view(r.spec).copy_(value)
            self._residences.note_changed([r])
            if not self._is_in_use(r):
                self._residences.leave([r])

    def _unpin(self, residences: Iterable[Residence]) -> None:
        for r in residences:
            r.num_pins -= 1

    def _is_in_use(self, r: Residence) -> bool:
        return self._by_id[id(r.parameter)][1] in self._active

    def _watch_optimizers(self) -> None:
        """A plain optimizer updates all its parameters at once: they are in memory meanwhile."""
        me = weakref.ref(self)

        def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            offload = me()
            if offload is not None and not getattr(optimizer, "pages_parameters", False):
                offload._before_step(optimizer)

        def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            offload = me()
            if offload is not None:
                offload._after_step()

        self._handles += [
            register_optimizer_step_pre_hook(before),
            register_optimizer_step_post_hook(after),
        ]

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        with self._lock:
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            mine = [self._by_id[id(p)][0] for p in parameters if id(p) in self._by_id]
            if mine:
                self._vault.note(
                    f"{type(optimizer).__name__} updates all parameters at once: they are in memory during its step; "
                    "ssdtrain.offload_optimizer() pages through them"
                )
                self._visitors += mine
                self._residences.bring(mine)
                self._residences.note_changed(mine)

    def _after_step(self) -> None:
        with self._lock:
            self._send_visitors_home()

    # -- forward and backward ------------------------------------------------------------------------------------------

    def _before_forward(self, block: Block, module: torch.nn.Module, args: Any) -> None:
        block.check()
        self._use(block)
        hooks = None
        if torch.is_grad_enabled():
            outer = innermost_hooks()
            pack, unpack = outer if outer is not None else (self._hold, _release)
            hooks = saved_tensors_hooks(partial(self._pack, pack), partial(self._unpack, unpack))
            hooks.__enter__()
        block.entered.append(hooks)

    def _after_forward(self, block: Block, module: torch.nn.Module, args: Any, output: Any) -> None:
        if not block.entered:  # its forward never began
            return
        hooks = block.entered.pop()
        if hooks is not None:
            hooks.__exit__()
        if block.entered or _is_in_backward():
            return
        with self._lock:
            if next(self._order.upcoming(), None) != block.index:
                self._active = [b for b in self._active if b is not block]
                self._residences.leave(block.residences)

    def _use(self, block: Block) -> None:
        """`block` is needed now: it comes, others go, the next ones are read ahead."""
        with self._lock:
            if self._active and self._active[-1] is block and _is_in_backward():
                self._residences.bring(block.residences)
                return
            self._order.note(block.index)
            self._residences.settle()
            self._residences.bring(block.residences)
            self._active = [b for b in self._active if b is not block] + [block]
            num_kept = 2 if _is_in_backward() else 1
            gone = [b for b in self._active[:-num_kept] if not b.entered]
            self._active = [b for b in self._active if b not in gone]
            for other in gone:
                self._residences.leave(other.residences)
            if not _is_in_backward():
                self._send_visitors_home()
            self._prefetch()

    def _send_visitors_home(self) -> None:
        visitors, self._visitors = self._visitors, []
        self._residences.leave(r for r in visitors if not self._is_in_use(r))

    def _prefetch(self) -> None:
        """Reads ahead within the budget, and forgets what was read ahead in error."""
        room, wanted = self.policy.prefetch_nbytes, []
        for index in self._order.upcoming():
            block = self._blocks[index]
            if block in wanted:
                break
            room -= sum(r.nbytes for r in block.residences if not r.is_full)
            if room < 0:
                break
            wanted.append(block)
        self._residences.forget(r for b in self._blocks if b not in wanted and not b.entered for r in b.residences)
        for block in wanted:
            self._counters.num_prefetched += self._residences.fetch(block.residences)

    def note_taken(self, parameter: torch.nn.Parameter) -> None:
        """Somebody takes it out of its module: see [Note: how a parameter is found missing]."""
        known = self._by_id.get(id(parameter))
        if known is None or known[1].entered or known[0].is_settled:
            return
        residence, block = known
        if _is_in_backward():
            self._use(block)
            return
        with self._lock:
            self._residences.bring([residence])
            if torch.is_grad_enabled() and not residence.num_pins:
                self._residences.give_up([residence])
                self._counters.stay("used outside its block", residence.nbytes)
            else:
                self._visitors.append(residence)

    # -- what autograd saves -------------------------------------------------------------------------------------------

    def _pack(self, outer: Callable[[torch.Tensor], Any], tensor: torch.Tensor) -> Any:
        found = self._by_storage.get(_storage_address(tensor))
        if found is not None:
            return _Saved(found[0], view_spec(tensor), tensor._version, None)
        original = _autocast_source(tensor)
        if original is not None and id(original) in self._by_id:
            residence = self._by_id[id(original)][0]
            return _Saved(residence, view_spec(tensor), original._version, tensor.dtype)
        return outer(tensor)

    def _unpack(self, outer: Callable[[Any], torch.Tensor], saved: Any) -> torch.Tensor:
        if type(saved) is not _Saved:
            return outer(saved)
        residence, spec, version, cast = saved
        known = self._by_id.get(id(residence.parameter))
        if known is not None:
            self._use(known[1])
        if residence.parameter._version != version:
            raise modified(residence.spec, residence.parameter._version, version)
        if cast is not None:
            copy = residence.view(residence.spec).to(cast)
            return copy.as_strided(spec.size, spec.stride, spec.storage_offset)
        return residence.parameter if spec == residence.spec else residence.view(spec)

    def _hold(self, tensor: torch.Tensor) -> Resident:
        return Resident(tensor, 0, self._idle_counters)

    # -- state dicts ---------------------------------------------------------------------------------------------------

    def _mine(self, module: torch.nn.Module) -> dict[str, Residence]:
        found = {name: self._by_id.get(id(p)) for name, p in module._parameters.items()}
        return {name: known[0] for name, known in found.items() if known is not None}

    def _fill_state_dict(self, module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        """Copies in files in the place of parameters that come and go."""
        for name, r in self._mine(module).items():
            if prefix + name in state:
                copy = mapped(r.spec, self._vault.directories[0])
                with self.in_memory([r.parameter], to_change=False), torch.no_grad():
                    copy.copy_(r.view(r.spec))
                settle(copy)
                state[prefix + name] = copy

    def _before_load(self, module: torch.nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        mine = [r for name, r in self._mine(module).items() if prefix + name in state]
        with self._lock:
            for r in mine:
                if not r.is_valid:
                    self._residences.accept(r)
            self._residences.bring(mine)
            self._loading[module] = mine

    def _after_load(self, module: torch.nn.Module, incompatible: Any) -> None:
        with self._lock:
            mine = self._loading.pop(module, [])
            self._residences.note_changed(mine)
            self._residences.leave(r for r in mine if not self._is_in_use(r))


def _release(saved: Resident) -> torch.Tensor:
    if saved.tensor._version != saved.version:
        raise modified(saved.tensor, saved.tensor._version, saved.version)
    return saved.tensor


def _is_in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _storage_address(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return 0


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


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
