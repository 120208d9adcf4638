"""Megatron: offloads the activations of loops of Megatron-LM, megatron-core and Megatron-Bridge. Decides nothing.

Every forward step runs inside `offload_activations`; backward needs no hook. Nothing of Megatron is patched.

[Note: one error on every rank]
A rank that cannot offload must not leave the others waiting in a collective, so all ranks compare notes before one
raises. They do it where all of them come by: in `offload_schedule` itself and before its first step; in
`wrap_forward_step` when the process group exists already. Megatron-LM makes it later, and with several pipeline stages
the first forward steps of the ranks wait for each other: there the first step is trained without offloading on the rank
that cannot, and the notes are compared when that step's gradients are finalised (Megatron-LM always does that; in
a loop that does not, `wrap_forward_step` raises at once, on that rank).

Example:
    >>> pretrain(datasets, model, ModelType.encoder_or_decoder, wrap_forward_step(forward_step, get_args),
    ...          extra_args_provider=add_arguments)                       # Megatron-LM: --ssdtrain-dir /mnt/nvme
    >>> schedule = offload_schedule(get_forward_backward_func(), "/mnt/nvme/{local_rank}")  # megatron-core
    >>> losses = schedule(forward_step_func=forward_step, model=model, ...)
    >>> pretrain(config, forward_step, callbacks=[Offload("/mnt/nvme/{local_rank}")])        # Megatron-Bridge
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch

from ssdtrain.activations.offload import ActivationOffload
from ssdtrain.api.functions import Directories
from ssdtrain.api.ranks import path_fields, texts_of_ranks
from ssdtrain.api.section import Section
from ssdtrain.api.session import Offload as Session
from ssdtrain.integrations import TESTED_VERSIONS, check_version
from ssdtrain.integrations.arguments import add_arguments, asked_for
from ssdtrain.integrations.parts.callback import SessionCallback
from ssdtrain.io.files.paths import absolute_directories
from ssdtrain.policy import ActivationPolicy

__all__ = ["Offload", "add_arguments", "offload_schedule", "wrap_forward_step"]

_SCHEDULES = (
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_without_interleaving",
    "forward_backward_pipelining_with_interleaving",
)
_CONFLICTS = {
    "cpu_offloading": "it moves the same activations",
    "fine_grained_activation_offloading": "it moves the same activations",
    "overlap_moe_expert_parallel_comm": "its schedule runs layers outside the forward step, where no hook sees them",
    "hybrid_context_parallel": "its schedule was not tested",
    "cuda_graph_impl": "replayed graphs save activations where no hook sees them",
}
# Megatron's output-discarding checkpoint empties the storages of what this node made, and fills them again in backward.
_REFILLED = frozenset({"CheckpointWithoutOutputFunctionBackward"})

_F = TypeVar("_F", bound=Callable[..., Any])


# -- what both ways share ----------------------------------------------------------------------------------------------


class _Rank:
    """This rank's part: its session, or why there is none."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.error: Exception | None = None
        self.has_agreed = False  # an error from here on is raised at once
        self._refusal: Exception | None = None
        self._seen: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    @contextlib.contextmanager
    def noting_errors(self) -> Iterator[None]:
        """Keeps an error of the block for `agree`; see [Note: one error on every rank]."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if self.has_agreed:
                raise
            self.error = self.error or error

    def open(self, directories: Directories, policy: ActivationPolicy) -> None:
        """Opens engine and spill files, and keeps them open between micro-batches."""
        session = Session(Section(tuple(absolute_directories(directories, path_fields())), policy))
        session.begin((), is_agreed=False)  # `agree` does
        _leave_alone(session)
        self.session = session

    @property
    def offload(self) -> ActivationOffload | None:
        """What moves activations, where it is open."""
        return self.session.activations if self.session is not None else None

    def prepare(self, model: torch.nn.Module) -> None:
        """Checks a model chunk's configuration and marks its weights, the first time it comes along."""
        if self._refusal is not None:
            raise self._refusal
        if model in self._seen or self.offload is None:
            return
        self._seen.add(model)
        _check_config(_config_of(model))
        self.offload.mark_weights(_weights_of(model))

    def agree(self) -> None:
        """Raises on every rank when any rank has an error. Collective.

        Raises:
            RuntimeError: with all errors, by rank.
        """
        errors = texts_of_ranks(str(self.error or ""))
        texts = [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text]
        joined = "\n".join(["Expected ssdtrain to start on every rank, got:", *texts])
        self.decide(self.error if len(errors) == 1 else RuntimeError(joined) if texts else None)

    def decide(self, refusal: Exception | None) -> None:
        """Goes on, or raises `refusal` now and in every later step."""
        self._refusal = refusal
        self.has_agreed = True
        if self._refusal is not None:
            if self.session is not None:
                self.session.close()
            raise self._refusal

    def context(self) -> contextlib.AbstractContextManager[object]:
        """What a forward step runs in."""
        return self.session if self.session is not None and self.error is None else contextlib.nullcontext()

    def run(self, forward_step: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Runs a forward step, and later the loss function it returns, with hooks on."""
        with self.context():
            output, loss = forward_step(*args, **kwargs)
        return output, (self._hooked(loss) if loss is not None else None)

    def _hooked(self, function: _F) -> _F:
        @functools.wraps(function)
        def hooked(*args: Any, **kwargs: Any) -> Any:
            with self.context():
                return function(*args, **kwargs)

        return cast(_F, hooked)


def _leave_alone(session: Session) -> None:
    if session.activations is not None:
        session.activations.leave_alone(_REFILLED)


def _weights_of(model: torch.nn.Module) -> list[torch.Tensor]:
    buffers = torch.nn.Module.buffers(model)  # Megatron's DDP has a list of that name
    weights = [*model.parameters(), *buffers]
    return [*weights, *(w.main_grad for w in weights if hasattr(w, "main_grad"))]


def _config_of(model: torch.nn.Module) -> Any:
    return importlib.import_module("megatron.core.utils").get_model_config(model)


def _check_config(config: object) -> None:
    for name, why in _CONFLICTS.items():
        value = getattr(config, name, None)
        if value and value != "none":
            raise ValueError(f"Expected {name} off in the model's configuration, got {value!r}: {why}; use one of them")


def _require_megatron() -> None:
    """Megatron is there; a version the tests have not seen is said once."""
    try:
        version = importlib.import_module("megatron.core").__version__
    except ImportError as error:
        tested = TESTED_VERSIONS["megatron-core"][-1]
        raise ImportError(f"Expected megatron-core, got none; pip install megatron-core=={tested}") from error
    check_version("megatron-core", version)


# -- Megatron-LM -------------------------------------------------------------------------------------------------------


class _ForwardStep:
    """A forward step whose saved activations travel; `offload` has the statistics once it has run."""

    def __init__(self, forward_step_func: Callable[..., Any], args: object) -> None:
        functools.update_wrapper(self, forward_step_func)
        self._forward_step = forward_step_func
        self._args = args
        self._rank = _Rank()
        self._is_asked = self._has_started = False
        if not callable(args):
            self._open()
            self._rank.agree()

    @property
    def offload(self) -> ActivationOffload | None:
        """The offload of this rank; None before the first step, and when the arguments ask for none."""
        return self._rank.offload

    def __call__(self, data_iterator: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not torch.is_grad_enabled():  # evaluation saves nothing
            return self._forward_step(data_iterator, model, *args, **kwargs)  # type: ignore[no-any-return]
        if not self._has_started:
            self._has_started = True
            self._start(model)
        with self._rank.noting_errors():
            self._rank.prepare(model)
        return self._rank.run(self._forward_step, data_iterator, model, *args, **kwargs)

    def _open(self) -> None:
        self._is_asked = True
        with self._rank.noting_errors():
            asked = asked_for(self._args() if callable(self._args) else self._args)
            if asked is not None:
                self._rank.open(*asked)

    def _start(self, model: torch.nn.Module) -> None:
        """The first step: see [Note: one error on every rank]."""
        self._rank.has_agreed = False  # about the directories at most
        if not self._is_asked:
            self._open()
        with self._rank.noting_errors():
            self._rank.prepare(model)
        config = _config_of(model)
        state = importlib.import_module("megatron.core.parallel_state")
        if state.get_pipeline_model_parallel_world_size() == 1:
            self._rank.agree()
        elif config.finalize_model_grads_func is not None:
            _agree_when_finalised(config, self._rank)
        else:
            self._rank.decide(self._rank.error)


def _agree_when_finalised(config: Any, rank: _Rank) -> None:
    finalize = config.finalize_model_grads_func

    @functools.wraps(finalize)
    def finalize_and_agree(*args: Any, **kwargs: Any) -> Any:
        config.finalize_model_grads_func = finalize
        result = finalize(*args, **kwargs)
        rank.agree()
        return result

    config.finalize_model_grads_func = finalize_and_agree


def wrap_forward_step(forward_step_func: Callable[..., Any], args: object) -> _ForwardStep:
    """A forward step for Megatron-LM's `pretrain` whose saved activations go to the drive.

    Args:
        forward_step_func: yours, as Megatron-LM calls it.
        args: the parsed arguments, or a function that returns them (`get_args`: they do not exist before `pretrain`).
            Given the arguments, all ranks of an existing process group must call this together.

    Returns:
        The wrapped function; its `offload.stats` say what it did.

    Raises:
        RuntimeError: on every rank, when a rank cannot offload: a directory is missing, the configuration conflicts.
            With `get_args` it comes in the first step. On a single rank it is the error itself.
        ImportError: megatron-core is not installed.

    Example:
        >>> pretrain(datasets, model, ModelType.encoder_or_decoder, wrap_forward_step(forward_step, get_args),
        ...          extra_args_provider=add_arguments)
    """
    _require_megatron()
    return _ForwardStep(forward_step_func, args)


# -- megatron-core -----------------------------------------------------------------------------------------------------


class _Schedule:
    """A forward-backward schedule whose forward steps offload; `offload` has the statistics."""

    def __init__(self, schedule: Callable[..., Any], rank: _Rank) -> None:
        functools.update_wrapper(self, schedule)
        self._schedule = schedule
        self._rank = rank
        self._has_started = False

    @property
    def offload(self) -> ActivationOffload:
        """The offload of this rank."""
        assert self._rank.offload is not None
        return self._rank.offload

    def __call__(self, *, forward_step_func: Callable[..., Any], model: Any, **kwargs: Any) -> Any:
        if kwargs.get("forward_only"):
            return self._schedule(forward_step_func=forward_step_func, model=model, **kwargs)
        chunks = model if isinstance(model, list) else [model]
        if not self._has_started:
            self._rank.has_agreed = False  # about the directories only
            with self._rank.noting_errors():
                for chunk in chunks:
                    self._rank.prepare(chunk)
            self._rank.agree()
            self._has_started = True
        for chunk in chunks:
            self._rank.prepare(chunk)
        step = functools.wraps(forward_step_func)(functools.partial(self._rank.run, forward_step_func))
        return self._schedule(forward_step_func=step, model=model, **kwargs)


def offload_schedule(
    schedule: Callable[..., Any],
    directory: Directories,
    policy: ActivationPolicy | Mapping[str, Any] | None = None,
) -> _Schedule:
    """A schedule of megatron-core whose saved activations go to the drive; for loops of your own.

    All ranks must call this together, after `initialize_model_parallel`.

    Args:
        schedule: what `get_forward_backward_func()` returned.
        directory: as for `offload_activations`; `{rank}` and `{local_rank}` are replaced.
        policy: an `ActivationPolicy` or a mapping with its fields.

    Returns:
        A schedule that is called like the given one; its `offload.stats` say what it did.

    Raises:
        RuntimeError: on every rank, when a rank cannot offload; the first step too may raise it, when the model's
            configuration conflicts. On a single rank it is the error itself.
        ImportError: megatron-core is not installed.

    Example:
        >>> schedule = offload_schedule(get_forward_backward_func(), "/mnt/nvme", policy={"mode": "all"})
        >>> losses = schedule(forward_step_func=forward_step, data_iterator=data, model=model, num_microbatches=4, ...)
    """
    _require_megatron()
    rank = _Rank()
    with rank.noting_errors():
        _check_schedule(schedule)
        rank.open(directory, ActivationPolicy.of(policy))
    rank.agree()
    return _Schedule(schedule, rank)


def _check_schedule(schedule: Callable[..., Any]) -> None:
    schedules = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    name = getattr(schedule, "__name__", repr(schedule))
    if all(schedule is not getattr(schedules, known, None) for known in _SCHEDULES):
        raise ValueError(f"Expected one of megatron-core's schedules {', '.join(_SCHEDULES)}, got {name}")
    state = importlib.import_module("megatron.core.parallel_state")
    if not state.model_parallel_is_initialized():
        raise RuntimeError("Expected initialize_model_parallel to have been called, got none; call it first")
    fitting = schedules.get_forward_backward_func()
    if schedule is not fitting:
        size, virtual = (
            state.get_pipeline_model_parallel_world_size(),
            state.get_virtual_pipeline_model_parallel_world_size(),
        )
        raise ValueError(
            f"Expected {fitting.__name__}, which fits pipeline size {size} with {virtual or 'no'} virtual stages, "
            f"got {name}; pass get_forward_backward_func()"
        )


# -- Megatron-Bridge ---------------------------------------------------------------------------------------------------


class Offload(SessionCallback):
    """A callback of Megatron-Bridge's `pretrain`, which takes what `ssdtrain.Offload` takes; for activations alone."""

    on_train_step_start = SessionCallback.enter
    on_train_step_end = SessionCallback.leave
    on_train_end = SessionCallback.end

    def on_train_start(self, context: Any) -> None:
        """The model is built, and a checkpoint loaded."""
        _require_megatron()
        section = self.session.section
        if section.parameters is not None or section.optimizer is not None:
            raise ValueError(
                "Expected activations alone with Megatron, which offloads optimizer state itself, got more: use its "
                "optimizer_cpu_offload"
            )
        for chunk in context.model:
            _check_config(_config_of(chunk))
        self.session.begin(())  # the weights are marked below: `buffers` of Megatron's DDP is a list, which others call
        _leave_alone(self.session)
        if self.session.activations is not None:
            self.session.activations.mark_weights([w for chunk in context.model for w in _weights_of(chunk)])
