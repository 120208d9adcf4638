"""`Offload`: everything that ssdtrain does for one training, for the callbacks of trainers and for loops.

A trainer's adapter translates its events into `begin`, `enter`, `leave` and `end`; it decides nothing.

[Note: whatever raises wherever]
Trainers tell of exceptions late, elsewhere or not at all. So nothing counts here: `enter` and `leave` say what is to be
and may be said twice, `begin` and `end` leave first, and hooks are a thread's own. Until `begin` nothing is open: a
session may be made before the processes of a job are, also when they are forked.

[Note: what stays on the drive]
`end` frees what activations needed. Parameters and optimizer state stay where they are, since all of them may be more
than memory holds: models and optimizers are saved, evaluated and trained further as they are. `close` brings them back.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import EllipsisType
from typing import Any

import torch
from typing_extensions import Never

from ssdtrain.activations.offload import ActivationOffload
from ssdtrain.api.functions import Directories, offload_activations, offload_parameters, page_optimizer
from ssdtrain.api.other_offloaders import check_others, check_replicas
from ssdtrain.api.ranks import agree
from ssdtrain.api.section import FEATURES, Section
from ssdtrain.api.wrappers import rewrap, unwrap
from ssdtrain.optimizer.gradients.reached import Loop
from ssdtrain.optimizer.optimizer import OffloadedOptimizer
from ssdtrain.parameters.offload import ParameterOffload
from ssdtrain.policy import ActivationPolicy, OptimizerPolicy, ParameterPolicy
from ssdtrain.state_stats import StateStats
from ssdtrain.stats import Stats
from ssdtrain.store.saved_tensors import hooks_may_be_entered
from ssdtrain.tracing.finished_step import progress_line

Feature = bool | Mapping[str, Any]


@dataclass(frozen=True)
class _Paged:
    """An optimizer, as it was given and as it is."""

    given: Any  # perhaps a wrapper
    inner: torch.optim.Optimizer
    offload: OffloadedOptimizer


class _Thread(threading.local):
    """Whose hooks are on in one thread."""

    def __init__(self) -> None:
        self.entered: ActivationOffload | None = None
        self.inside: list[bool] = []  # of each `with`, whether it entered


def _unknown(name: str) -> TypeError:
    """What to write instead of a keyword that there is not."""
    near = difflib.get_close_matches(name, FEATURES, n=1)
    hint = f"did you mean {near[0]}=?" if near else "see ssdtrain.Offload"
    if name in ActivationPolicy.model_fields:
        hint = f"fields of a policy stand in one of them, activations={{{name!r}: ...}}"
    return TypeError(f"Expected keywords among directory, {', '.join(FEATURES)}, got {name!r}: {hint}")


class Offload:
    """Saved activations, parameters and optimizer state of one training, on the drive.

    Nothing is opened or changed before `begin`. Every method but the constructor may be called again.

    Args:
        directory: as for `offload_activations`; or a `Section`, or a mapping with its keys. Left out: all is as the
            environment says, see `Section.from_environment`.
        activations: True, False, an `ActivationPolicy` or a mapping with its fields.
        parameters: the same with `ParameterPolicy`; a mapping may have ``"blocks"`` too.
        optimizer: the same with `OptimizerPolicy`.

    Raises:
        ValueError: an unknown key or a bad value.

    Example:
        >>> session = ssdtrain.Offload("/mnt/nvme", optimizer=True)
        >>> (optimizer,) = session.begin(model, optimizer)
        >>> for batch in loader:
        ...     with session:
        ...         loss = model(batch)
        ...     loss.backward(); optimizer.step(); optimizer.zero_grad()
        >>> session.end()
    """

    def __init__(
        self,
        directory: Directories | Section | Mapping[str, Any] | EllipsisType | None = ...,
        *,
        activations: Feature | ActivationPolicy = True,
        parameters: Feature | ParameterPolicy = False,
        optimizer: Feature | OptimizerPolicy = False,
        **unknown: Never,
    ) -> None:
        """Checks what is asked."""
        if unknown:
            raise _unknown(next(iter(unknown)))
        if isinstance(directory, EllipsisType):
            self.section = _of_environment()
        elif isinstance(directory, Section):
            self.section = directory
        elif isinstance(directory, Mapping):
            self.section = Section.of(directory)
        else:
            self.section = Section.given(directory, activations=activations, parameters=parameters, optimizer=optimizer)
        self._activations: ActivationOffload | None = None
        self._has_ended = True  # the activations' offload is closed, or there is none
        self._parameters: list[ParameterOffload] = []
        self._optimizers: list[_Paged] = []
        self._handles: list[Any] = []
        self._reported: Stats | None = None
        self._thread = _Thread()

    def __repr__(self) -> str:
        """What it is doing, without waiting for anybody."""
        parts = [repr(self._activations)] if self._activations is not None else []
        parts += [repr(offload) for offload in (*self._parameters, *(paged.offload for paged in self._optimizers))]
        section = self.section
        asked = [name for name in ("activations", "parameters", "optimizer") if getattr(section, name) is not None]
        where = ", ".join(section.directories) or "host memory"
        return f"Offload({'; '.join(parts) or f'not begun, {where}, ' + (', '.join(asked) or 'nothing')})"

    # -- begin and end ---------------------------------------------------------------------------------------

    def begin(
        self,
        model: torch.nn.Module | Sequence[torch.nn.Module],
        *optimizers: Any,
        is_last: Callable[[], bool] | None = None,
        switches: Mapping[str, object] | None = None,
        reads_norms: bool = False,
        is_agreed: bool = True,
    ) -> tuple[Any, ...]:
        """Opens the drive, and moves parameters and state there, on every rank or on none. All ranks call this.

        Args:
            model: one, several or none; as the trainer wraps them or not.
            optimizers: as the trainer wraps them or not; those that are offloaded already stay as they are.
            is_last: whether the backward that runs is the last one before a step, for trainers that accumulate.
            switches: settings of the trainer that make it offload activations itself, by name; none may be on.
            reads_norms: the trainer logs the norm of gradients, also of those that `step_in_backward` has used.
            is_agreed: False where the caller has all ranks go on or none, see `ssdtrain.api.ranks`.

        Returns:
            The optimizers to use. A wrapped one is the same wrapper.

        Raises:
            ValueError: another offloader is on, the optimizer cannot be paged, or what is asked does not go together.
            OSError: a directory is missing, not writable or full on this rank.
            RuntimeError: another rank could not begin; the message says which and why.
        """
        self.leave()
        models = [model] if isinstance(model, torch.nn.Module) else list(model)
        page = partial(page_optimizer, loop=Loop(is_last, reads_norms))
        begin = partial(self._begin, models, optimizers, page, switches or {})
        return agree(begin, undo=lambda _: self.close()) if is_agreed else begin()

    def _begin(
        self,
        models: list[torch.nn.Module],
        optimizers: tuple[Any, ...],
        page: Callable[..., OffloadedOptimizer],
        switches: Mapping[str, object],
    ) -> tuple[Any, ...]:
        if not self.section.is_enabled:
            return optimizers
        check_replicas(models, self.section.optimizer)
        if self.section.activations is not None:
            check_others(models, switches)
        try:
            for model in models if self.section.parameters is not None else []:
                self._offload_parameters(model)
            offloaded = tuple(self._offload_optimizer(optimizer, page) for optimizer in optimizers)
            if self.section.activations is not None and self._has_ended:
                self._activations = offload_activations(self._drive(), self.section.activations, *models[:1])
                self._activations.keep_open()
                self._has_ended, self._reported = False, self._activations.stats
            self._flush_before(models)
        except BaseException:
            self.close()
            raise
        return offloaded

    def _drive(self) -> Any:
        """What is open already, which is shared, or the directories."""
        state = [*self._parameters, *(paged.offload for paged in self._optimizers)]
        return state[0] if state else (self.section.directories or None)

    def _offload_parameters(self, model: torch.nn.Module) -> None:
        if any("_ssdtrain_parameters" in vars(module) for module in model.modules()):
            return
        offload_parameters(model, self._drive(), self.section.parameters, self.section.blocks)
        self._parameters.append(ParameterOffload.of(model))

    def _offload_optimizer(self, optimizer: Any, page: Callable[..., OffloadedOptimizer]) -> Any:
        inner = unwrap(optimizer)
        if self.section.optimizer is None or isinstance(inner, OffloadedOptimizer):
            return optimizer
        offload = page(inner, self._drive(), self.section.optimizer)
        self._optimizers.append(_Paged(optimizer, inner, offload))
        return rewrap(optimizer, offload)

    def _flush_before(self, models: list[torch.nn.Module]) -> None:
        """Updates that are late are over before a model is saved or evaluated."""
        if self._handles or not any(paged.offload.policy.delayed_update for paged in self._optimizers):
            return

        def before_forward(module: torch.nn.Module, *_: object) -> None:
            if not module.training:
                self.flush()

        for model in models:
            self._handles.append(model.register_forward_pre_hook(before_forward))
            self._handles.append(model.register_state_dict_pre_hook(lambda *_: self.flush()))

    def flush(self) -> None:
        """Has updates over that are late (`delayed_update`); nothing else is waited for."""
        for paged in self._optimizers:
            if paged.offload.policy.delayed_update:
                paged.offload.flush()

    def end(self) -> None:
        """Leaves, and frees what activations needed; see [Note: what stays on the drive]."""
        self.leave()
        self.flush()
        self._end_activations()

    def close(self) -> None:
        """Ends, and brings parameters and optimizer state back to memory: all is as it was before `begin`.

        Raises:
            StateLostError: the drive does not have something any more; all else is there.
        """
        with contextlib.ExitStack() as stack:  # all of it, whatever raises
            for handle in self._handles:
                stack.callback(handle.remove)
            for home in self._parameters:
                stack.callback(home.close)
            for paged in self._optimizers:
                stack.callback(rewrap, paged.given, paged.inner)
                stack.callback(paged.offload.close)
            stack.callback(self._end_activations)
            stack.callback(self.leave)
            self._handles, self._parameters, self._optimizers = [], [], []

    def _end_activations(self) -> None:
        self._has_ended = True
        if self._activations is not None:
            self._activations.close()

    # -- steps -----------------------------------------------------------------------------------------------

    def enter(self) -> bool:
        """Has what autograd saves in this thread offloaded from here on; whether it did not before.

        Without gradients, and before `begin`, nothing happens.
        """
        offload = self._activations
        if self._thread.entered is not None and self._thread.entered is not offload:
            self.leave()
        if self._has_ended or offload is None or self._thread.entered is not None or not _may_enter():
            return False
        offload.__enter__()
        self._thread.entered = offload
        return True

    def leave(self) -> None:
        """Has it no longer offloaded; what was saved stays available for backward. Hooks of others are as they were."""
        entered, self._thread.entered = self._thread.entered, None
        if entered is not None:
            entered.__exit__(None, None, None)

    def __enter__(self) -> Offload:
        """As `enter`, until the block ends; an inner block ends nothing."""
        self._thread.inside.append(self.enter())
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.inside.pop():
            self.leave()

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that runs in the session, whoever calls it and however it ends."""
        return _Covered(self, function)

    def cover(self, model: torch.nn.Module) -> Callable[[], None]:
        """Has every forward of a model in the session, whoever calls it and however it ends; the result undoes that."""
        before = vars(model).get("forward")
        covered = vars(model)["forward"] = self.around(model.forward)

        def uncover() -> None:
            if vars(model).get("forward") is covered:
                del vars(model)["forward"]
                vars(model).update({"forward": before} if before is not None else {})

        return uncover

    def within(self, context: Callable[..., AbstractContextManager[Any]]) -> Callable[..., AbstractContextManager[Any]]:
        """A function that makes contexts, whose contexts are in the session too."""

        @functools.wraps(context)
        @contextlib.contextmanager
        def both(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with context(*args, **kwargs) as value, self:
                yield value

        return both

    # -- what came of it -------------------------------------------------------------------------------------

    @property
    def activations(self) -> ActivationOffload | None:
        """The offload of activations; None before `begin`, and where they are to stay."""
        return self._activations

    def note(self, text: str) -> None:
        """Adds a remark to the statistics of activations, and warns with it once."""
        if self._activations is not None:
            self._activations.note(text)

    @property
    def stats(self) -> Stats | None:
        """What was offloaded of the activations, and what it cost so far."""
        return self._activations.stats if self._activations is not None else None

    @property
    def state_stats(self) -> list[StateStats]:
        """The same of parameters, by model, and then of the state of each optimizer."""
        return [home.stats for home in self._parameters] + [paged.offload.stats for paged in self._optimizers]

    def progress(self) -> str:
        """What happened since this was asked last, in one line for a log; empty where activations stay."""
        last, now = self._reported, self.stats
        self._reported = now
        return progress_line(last, now) if last is not None and now is not None else ""


def _of_environment() -> Section:
    section = Section.from_environment()
    if section is None:
        raise ValueError("Expected a directory, got none, nor SSDTRAIN_DIR in the environment: pass one")
    return section


class _Covered:
    """A function inside a session; what is copied or pickled is the plain one, of a copied model the copy's forward."""

    def __init__(self, session: Offload, function: Callable[..., Any]) -> None:
        self._session = session
        self.__wrapped__ = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._session:
            return self.__wrapped__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce__(self) -> Any:
        return self.__wrapped__.__reduce__()


def _may_enter() -> bool:
    """Not without gradients, nor inside `torch.autograd.graph.disable_saved_tensors_hooks`."""
    return hooks_may_be_entered() and torch.is_grad_enabled()
