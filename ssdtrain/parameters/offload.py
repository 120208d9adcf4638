"""`ParameterOffload`: a module's blocks live on the drive, and are in memory only while they are used.

What the user, the optimizer and checkpoints ask of offloaded parameters. `working_set` says which block is in memory,
`hooks` finds out that a parameter is needed, and `parameter` knows where the bytes of each one are.
"""

from __future__ import annotations

import contextlib
import fnmatch
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ssdtrain.parameters.blocks import Block, choose_blocks, choose_parameters
from ssdtrain.parameters.hooks import Hooks, check_differentiable
from ssdtrain.parameters.parameter import ParameterRecord, ParameterRecords
from ssdtrain.parameters.placeholder import OWNER
from ssdtrain.parameters.working_set import WorkingSet
from ssdtrain.policy import ParameterPolicy
from ssdtrain.state_stats import StateCounters, StateStats
from ssdtrain.stats import nbytes_text
from ssdtrain.store.identity import spec_nbytes, view_spec
from ssdtrain.store.state_store import StateLostError, StateStore
from ssdtrain.verdict import on_parameters

_ATTRIBUTE = "_ssdtrain_parameters"


class ParameterOffload:
    """The offloaded parameters of one module; see `offload_parameters`, which makes it."""

    def __init__(
        self,
        module: torch.nn.Module,
        open_store: Callable[[], StateStore],
        policy: ParameterPolicy,
        names: Sequence[str] | None,
    ) -> None:
        """Writes the parameters of the blocks and frees their memory."""
        self.policy = policy
        self._module = module
        self._counters = StateCounters("parameters")
        self._incomplete = ""  # what was interrupted
        self._stale: set[ParameterRecord] = set()  # since then not loaded
        self._stepping: list[ParameterRecord] = []  # pinned for a plain optimizer
        self._is_closed = False
        chosen = choose_blocks(module, names)
        leaving = choose_parameters(module, chosen, policy.min_nbytes, self._counters)
        self._store = open_store()
        self._records = ParameterRecords(self._store, self._counters)
        self._working_set = WorkingSet(self._records, self._counters, policy.prefetch_nbytes, len(chosen))
        self._lock = self._working_set.lock
        self._hooks = Hooks(module, self._working_set, self._store.mapped_copy, self.check_complete, self._note_loaded)
        self._optimizer_hooks = self._hook_optimizers()
        try:
            self._store.reserve(sum(spec_nbytes(view_spec(p)) for p in leaving.values()), "parameters")
            self._offload_blocks(chosen, leaving)
        except BaseException:
            self.close()
            raise
        module.__dict__[_ATTRIBUTE] = self
        verdict = on_parameters(self._counters)
        if verdict is not None:
            self._store.note(verdict)

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

    def _offload_blocks(self, chosen: Mapping[str, torch.nn.Module], leaving: Mapping[str, torch.nn.Parameter]) -> None:
        devices = self._store.devices()
        names = {id(parameter): name for name, parameter in leaving.items()}
        for name, module in chosen.items():
            owners = [m for m in module.modules() if any(id(p) in names for p in m._parameters.values())]
            records = []
            for p in {id(p): p for m in owners for p in m._parameters.values() if id(p) in names}.values():
                assert p is not None
                device = devices.cpu if p.is_meta else devices.of(p)
                if isinstance(device, str):
                    raise ValueError(
                        f"Expected parameters in memory of the CPU, given a directory, or of CUDA, got {device}: "
                        f"{names[id(p)]}"
                    )
                records.append(ParameterRecord(names[id(p)], p, device, self))
            block = Block(len(self._working_set.blocks), name, module, records)
            for r in records:
                r.guard()
                self._counters.offload(r.nbytes)
            self._working_set.add(block)
            self._hooks.install(block, owners)

    def close(self) -> None:
        """Brings everything back into memory and takes all hooks away: the module is as it was. Idempotent.

        Raises:
            StateLostError: the drive does not have a parameter any more.
        """
        with self._lock:
            if self._is_closed:
                return
            lost: StateLostError | None = None
            for r in self._working_set:
                try:
                    if r.is_valid:
                        self._records.reload([r])
                except StateLostError as error:
                    lost = lost or error
            for handle in self._optimizer_hooks:
                handle.remove()
            self._hooks.remove()
            for r in self._working_set:
                r.disown()
                self._store.release(r.record)
            self._working_set.clear()
            if vars(self._module).get(_ATTRIBUTE) is self:
                del self._module.__dict__[_ATTRIBUTE]
            self._is_closed = True
            self._store.close()
        if lost is not None:
            raise lost

    def __repr__(self) -> str:
        """What it is doing, without waiting for anybody."""
        state = "closed" if self._is_closed else self._incomplete or "open"
        where = ", ".join(self._store.directories) or "host memory"
        away = f"{nbytes_text(self._counters.away_nbytes)} in {self._counters.num_away} parameters offloaded"
        return f"ParameterOffload({state}, {where}, {len(self._working_set.blocks)} blocks, {away})"

    @property
    def stats(self) -> StateStats:
        """What it did and what it cost so far."""
        return StateStats.of(self._store.totals(self._counters))

    @property
    def store(self) -> StateStore:
        """The store that its parameters are in, for others to share."""
        return self._store

    def flush(self) -> None:
        """Blocks until the drive has all that has changed.

        Raises:
            OSError: it could not take some of it, which is in memory.
        """
        with self._lock:
            self._records.write(self._working_set)
            self._store.flush()
            self._working_set.dismiss_idle()

    def note_checkpoint(self, text: str) -> None:
        """Says which checkpoint to go back to, for messages of lost bytes."""
        self._store.note_checkpoint(text)

    def note_incomplete(self, what: str) -> None:
        """Says that some parameters were updated and others not: until all are loaded, none is saved. Empty: not so."""
        self._incomplete = what
        self._stale = set(self._working_set) if what else set()

    def _note_loaded(self, records: Iterable[ParameterRecord]) -> None:
        self._stale.difference_update(records)
        if not self._stale:
            self._incomplete = ""

    def check_complete(self) -> None:
        """Raises when a step was interrupted."""
        if self._incomplete:
            raise RuntimeError(
                f"Expected whole steps, got one that was interrupted: {self._incomplete}. Some parameters are updated "
                f"and others are not: load a checkpoint ({self._store.checkpoint})"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the module is a plain one."""

    def __reduce__(self) -> Any:
        raise TypeError("Expected parameters in memory, got one that is offloaded: save the module's state_dict()")

    # -- what the optimizer and the user need -------------------------------------------------------------------------

    @contextlib.contextmanager
    def gathered(self, *patterns: str) -> Iterator[None]:
        """Inside, the parameters whose names match a pattern (all without any) are in memory and may be changed.

        After `close()` all of them are in any case.

        Example:
            >>> with offload.gathered("blocks.0.*"):
            ...     print(model.blocks[0].fc.weight.norm())
        """
        chosen = [r for r in self._working_set if not patterns or _matches(r.name, patterns)]
        if patterns and not chosen and not self._is_closed:
            raise ValueError(f"Expected names of offloaded parameters, got {', '.join(patterns)}, which match none")
        with self.in_memory([r.parameter for r in chosen]):
            yield

    @contextlib.contextmanager
    def in_memory(self, parameters: Iterable[torch.Tensor], *, to_change: bool = True) -> Iterator[None]:
        """Inside, these are in memory; those that are not its own do not matter."""
        chosen = self._working_set.find(parameters)
        with self._lock:
            for r in chosen:
                r.pin()
            try:
                self._records.reload(chosen)
            except BaseException:
                self._unpin(chosen)
                raise
        try:
            yield
        finally:
            with self._lock:
                if to_change:
                    self._records.note_changed(chosen)
                self._unpin(chosen)
                self._working_set.release(chosen)

    @contextlib.contextmanager
    def accessed(self, parameters: Iterable[torch.Tensor], *, to_change: bool, stays: bool = False) -> Iterator[None]:
        """See `ssdtrain.parameters.placeholder.Owner`."""
        chosen = list({id(r): r for r in self._working_set.find(parameters)}.values())
        with self._lock:
            check_differentiable(chosen)
            for r in chosen:
                r.pin()
            try:
                self._working_set.access(chosen, stays=stays)
            except BaseException:
                self._unpin(chosen)
                raise
        try:
            with self._hooks.following():
                yield
        finally:
            with self._lock:
                self._records.note_changed([r for r in chosen if to_change or r.is_shared])
                self._unpin(chosen)
                self._working_set.limit_gathered()

    def assign(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        """See `ssdtrain.parameters.placeholder.Owner`."""
        with self._lock, contextlib.ExitStack() as stack:
            for r in self._working_set.find([parameter]):
                for offload in offloads_of([value]):
                    stack.enter_context(offload.accessed([value], to_change=False))
                self._records.assign(r, value)
                self._working_set.gather([r])
                self._working_set.limit_gathered()

    def values(self, parameter: torch.Tensor) -> torch.nn.Parameter:
        """See `ssdtrain.parameters.placeholder.Owner`."""
        with self.in_memory([parameter], to_change=False):
            return torch.nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)

    def name_of(self, parameter: torch.Tensor) -> str | None:
        """The parameter's name in the module; None for one that is not its own."""
        return next((r.name for r in self._working_set.find([parameter])), None)

    def prefetch(self, parameters: Iterable[torch.Tensor]) -> None:
        """Begins to read those of these that are away."""
        with self._lock:
            self._counters.num_prefetched += self._records.prefetch(self._working_set.find(parameters))

    def read_to_host(self, parameter: torch.Tensor) -> Callable[[], torch.Tensor] | None:
        """Begins to read one that is away to host memory; what is returned waits for it. None: it is in memory."""
        with self._lock:
            (r,) = self._working_set.find([parameter])
            return self._records.read_to_host(r)

    def replace(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        """Gives a parameter a new value of its dtype, which is in host memory: on the drive if that is where it is."""
        with self._lock, torch.no_grad():
            (r,) = self._working_set.find([parameter])
            if not self._records.replace(r, value):
                r.pin()
                r.parameter.copy_(value, non_blocking=True)
                r.unpin()
                self._records.note_changed([r])
                self._working_set.release([r])

    def fill(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        """Gives a parameter a new value without reading the old one; it is cast to the parameter's dtype."""
        with self._lock, torch.no_grad():
            (r,) = self._working_set.find([parameter])
            self._records.materialize_empty(r)
            r.pin()
            r.parameter.copy_(value)  # not its memory alone: a graph that has saved it learns of the change
            r.unpin()
            self._records.note_changed([r])
            self._note_loaded([r])
            self._working_set.release([r])

    def _unpin(self, records: Iterable[ParameterRecord]) -> None:
        for r in records:
            if r.num_pins:  # not closed meanwhile
                r.unpin()

    def _hook_optimizers(self) -> list[Any]:
        """A plain optimizer updates all its parameters at once: they are in memory meanwhile."""

        def before(offload: ParameterOffload, optimizer: torch.optim.Optimizer) -> None:
            if not getattr(optimizer, "pages_parameters", False):
                offload._before_step(optimizer)

        def after(offload: ParameterOffload, optimizer: torch.optim.Optimizer) -> None:
            if not getattr(optimizer, "pages_parameters", False):
                offload._after_step()

        handles = [
            register_optimizer_step_pre_hook(_StepHook(self, before)),
            register_optimizer_step_post_hook(_StepHook(self, after)),
        ]
        for handle in handles:
            _StepHook.clear_away(handle.hooks_dict_ref() or {})
        return handles

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        with self._lock:
            self._after_step()  # of a step that raised
            mine = self._working_set.find(
                p for group in optimizer.param_groups for p in group["params"] if _may_change(p)
            )
            if mine:
                self._store.note(
                    f"{type(optimizer).__name__} updates all parameters at once: they are in memory during its step; "
                    "ssdtrain.offload_optimizer() needs a few of them at a time"
                )
                for r in mine:  # with or without a gradient yet: its closure may compute them
                    r.pin()
                self._stepping = mine
                self._records.reload(mine)

    def _after_step(self) -> None:
        with self._lock:
            self._records.note_changed(self._stepping)
            self._unpin(self._stepping)
            self._working_set.release(self._stepping)
            self._stepping = []


class _StepHook:
    """Tells an offload of every optimizer's step.

    It stays when the offload is gone, which may be in the middle of a step, while PyTorch goes through its hooks; the
    next offload clears it away.
    """

    def __init__(
        self, offload: ParameterOffload, act: Callable[[ParameterOffload, torch.optim.Optimizer], None]
    ) -> None:
        self._offload, self._act = weakref.ref(offload), act

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        offload = self._offload()
        if offload is not None:
            self._act(offload, optimizer)

    @staticmethod
    def clear_away(hooks: dict[int, Any]) -> None:
        """Takes those away whose offload is gone."""
        for key, hook in list(hooks.items()):
            if isinstance(hook, _StepHook) and hook._offload() is None:
                del hooks[key]


def _may_change(parameter: torch.Tensor) -> bool:
    """Whether a step may update it: also one that was frozen when its gradient was there already."""
    return parameter.requires_grad or parameter.grad is not None


def offloads_of(parameters: Iterable[torch.Tensor]) -> list[ParameterOffload]:
    """Whose these parameters are, each once; of those that are not offloaded, nobody's."""
    found = (getattr(parameter, OWNER, None) for parameter in parameters)
    return list({id(offload): offload for offload in found if offload is not None}.values())


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
