"""`offload_activations`, `offload_parameters`, `offload_optimizer`: what users call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import torch

from ssdtrain.activations.offload import ActivationOffload
from ssdtrain.api.ranks import path_fields
from ssdtrain.io.files.directories import check_directories
from ssdtrain.io.files.paths import absolute_directories, absolute_path
from ssdtrain.optimizer.gradients.reached import Loop
from ssdtrain.optimizer.optimizer import OffloadedOptimizer
from ssdtrain.parameters.offload import ParameterOffload
from ssdtrain.policy import ActivationPolicy, OptimizerPolicy, ParameterPolicy, StatePolicy
from ssdtrain.store.state_store import StateStore

Module = TypeVar("Module", bound=torch.nn.Module)
Directories = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def offload_activations(
    directory: Directories | ParameterOffload | OffloadedOptimizer | None,
    policy: ActivationPolicy | Mapping[str, Any] | None = None,
    model: torch.nn.Module | None = None,
    *,
    record: str | os.PathLike[str] | None = None,
    **options: Any,
) -> ActivationOffload:
    """Keeps saved activations on the drive, or in pinned host memory, between forward and backward.

    Lowers peak memory by what autograd would hold between forward and backward; results are equal to the bit. It may
    wrap one forward, one step or the whole loop (best: the engine stays open), be entered again, and be left before
    backward, which may run in another thread. The hooks act in the thread that entered, and that one leaves it. Where
    nothing is offloaded, one warning says why.

    Args:
        directory: where the spill files go, on a fast local drive. Several, in a list or a text with ``:`` between
            them, are striped. ``~``, ``{rank}`` and ``{local_rank}`` are filled in. The files are unlinked at once:
            nothing is ever left behind. Or what is offloaded already, `parameter_offload(module)` or an offloaded
            optimizer: both then share its engine, staging memory and host tier, what somebody waits for is read first,
            and the endurance budget counts what is written for both; `disk_nbytes` bounds activations alone. None:
            tensors of an accelerator go to pinned host memory only.
        policy: an `ActivationPolicy` or a mapping with its fields.
        model: names modules in messages, marks its parameters and buffers as weights, and has the blocks that
            ``recompute`` is about. Never needed for correctness.
        record: the file for a record of the run, which ``ssdtrain report`` shows; the same as the policy's field.
        options: fields of the policy, such as ``min_nbytes="4MiB"``; they go before those of `policy`.

    Returns:
        A context manager, or decorator of a function, with `stats` and `close()`. Everything is freed by `close()`,
        when the object is gone, and, unless tensors of an accelerator were offloaded or the drive is shared, when the
        context is left and the last graph is gone.

    Raises:
        OSError: a directory is missing, not writable or full.
        ValueError: the policy has an unknown key or a bad value, or wants checksums of a shared drive that has none; or
            no directory is given.
        RuntimeError: the engine asked for by name is not available, or what is to be shared is shared or closed.

    Example:
        >>> with offload_activations("/mnt/nvme") as offload:
        ...     for batch in loader:
        ...         model(batch).backward()
        ...         optimizer.step(); optimizer.zero_grad()
        >>> print(offload.stats)

        >>> @offload_activations("/mnt/nvme", min_nbytes="4MiB")
        ... def loss_of(batch):
        ...     return model(batch)
    """
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"Expected model to be a torch.nn.Module, got {type(model).__name__}: pass one, or leave it out"
        )
    chosen = _chosen(policy, options, record)
    if isinstance(directory, ParameterOffload | OffloadedOptimizer):
        return _attach(directory.store, chosen, model)
    return ActivationOffload(
        None if directory is None else absolute_directories(directory, path_fields()), chosen, model
    )


def _chosen(
    policy: ActivationPolicy | Mapping[str, Any] | None,
    options: Mapping[str, Any],
    record: str | os.PathLike[str] | None,
) -> ActivationPolicy:
    """The policy with what was said beside it."""
    chosen = ActivationPolicy.of(policy)
    if options:
        chosen = ActivationPolicy.of({**chosen.model_dump(exclude_unset=True), **options})
    if record is not None:
        chosen = chosen.model_copy(update={"record": absolute_path(record, "a file for the record")})
    return chosen


def _attach(store: StateStore, policy: ActivationPolicy, model: torch.nn.Module | None) -> ActivationOffload:
    """On the drive of parameters or optimizer state."""
    drive = store.drive
    if policy.checksum and not drive.has_checksum:
        text = "Expected checksum=True where the shared drive was opened, got False there: pass it there, or not here"
        raise ValueError(text)
    simulated = store.cpu if store.cpu.driver is not None else None
    offload = ActivationOffload(store.directories or None, policy, model, simulated, drive.attach, store.known_devices)
    if policy.engine not in ("auto", drive.kind):
        offload.note(f"engine={policy.engine!r} is not used: the drive is shared, its engine is {drive.kind}")
    return offload


def offload_parameters(
    module: Module,
    directory: Directories | ParameterOffload | OffloadedOptimizer | None,
    policy: ParameterPolicy | Mapping[str, Any] | None = None,
    blocks: Sequence[str] | None = None,
) -> Module:
    """Keeps the parameters of a module's blocks on the drive; a block is in memory only while it is used.

    A block's parameters are read before its forward and before its backward, the next blocks' meanwhile, and given up
    after; they are written only when they have changed. Memory falls to the blocks in use, `prefetch_nbytes` and
    `staging_nbytes`, and what is outside the blocks. Results are equal to the bit. Names and parameter objects stay;
    between uses a parameter shows NaN: read or change it inside ``parameter_offload(module).gathered()``.

    Args:
        module: on one device. Wrap it in DistributedDataParallel first. Blocks on the meta device get their values
            from `load_state_dict` or `load_safetensors`, one after the other: so a model may be larger than memory.
        directory: where the spill files go, on a fast local drive; several are striped. They are unlinked at once. Or
            what is offloaded already, `parameter_offload(module)` or an offloaded optimizer: both then share its engine
            and staging memory, and its policy's bounds. None: pinned host memory only, for what is on an accelerator.
        policy: a `ParameterPolicy` or a mapping with its fields.
        blocks: names of modules, or patterns such as ``"encoder.layers.*"``; by default the repeated layers, or what
            a ``Sequential`` without any runs in turn.

    Returns:
        The same module.

    Raises:
        ValueError: a block does not exist, parameters are on several devices or of a kind that cannot be offloaded.
        OSError: a directory is missing, not writable or too small for the parameters.
        RuntimeError: the engine asked for by name is not available.

    Example:
        >>> model = ssdtrain.offload_parameters(model, "/mnt/nvme")
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> optimizer = ssdtrain.offload_optimizer(optimizer, ssdtrain.parameter_offload(model))
        >>> print(ssdtrain.parameter_offload(model).stats)
    """
    chosen = ParameterPolicy.of(policy)
    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            f"Expected a torch.nn.Module, got {type(module).__name__}: pass it first, then the directory, as in "
            "offload_parameters(model, directory)"
        )
    if chosen.enabled:
        ParameterOffload(module, partial(_store_for, directory, chosen), chosen, blocks)
    return module


def parameter_offload(module: torch.nn.Module) -> ParameterOffload:
    """What `offload_parameters` did to a module: its `stats`, `gathered()`, `flush()` and `close()`.

    Raises:
        ValueError: the module is not offloaded.
    """
    return ParameterOffload.of(module)


def offload_optimizer(
    optimizer: torch.optim.Optimizer,
    directory: Directories | ParameterOffload | OffloadedOptimizer | None,
    policy: OptimizerPolicy | Mapping[str, Any] | None = None,
) -> OffloadedOptimizer:
    """Keeps an optimizer's state on the drive; a step has it in memory for a few parameters at a time.

    Memory falls by the state but for about three chunks of `chunk_nbytes` and `staging_nbytes`. The optimizer itself
    does the arithmetic, on the parameters' device or, with ``update_on="cpu"``, for them on the CPU, so results are
    equal to the bit to its own there; groups, schedulers, hooks, `state_dict` and `load_state_dict` are as before, and
    state dicts are interchangeable with those of the plain optimizer.

    Args:
        optimizer: any of `torch.optim` but LBFGS, or one that keeps its state by parameter. It must not be used any
            more but through what is returned. On the CPU, ``fused=True`` is the fastest.
        directory: where the spill files go, on a fast local drive; several are striped. They are unlinked at once. Or
            what is offloaded already, `parameter_offload(module)` or an offloaded optimizer: both then share its engine
            and staging memory, and its policy's bounds. None: host memory only, for what is on an accelerator.
        policy: an `OptimizerPolicy` or a mapping with its fields.

    Returns:
        An optimizer with `stats`, `flush()`, `accumulate()`, `clip_grad_norm_()` and `close()`, which brings the state
        back to `optimizer`. With ``enabled=False`` it is `optimizer` itself, which has none of them.

    Raises:
        TypeError: it is no `torch.optim.Optimizer`.
        ValueError: its step needs a closure, it is offloaded already, or a trial on small throw-away tensors says that
            its state cannot be offloaded, or only when all of it is one chunk; nothing has changed then.
        OSError: a directory is missing, not writable or too small for the state.
        RuntimeError: the engine asked for by name is not available.

    Example:
        >>> optimizer = ssdtrain.offload_optimizer(torch.optim.AdamW(model.parameters()), "/mnt/nvme")
        >>> model(batch).backward(); optimizer.step(); optimizer.zero_grad()
        >>> print(optimizer.stats)
    """
    chosen = OptimizerPolicy.of(policy)
    if not chosen.enabled:
        return cast(OffloadedOptimizer, optimizer)
    return page_optimizer(optimizer, directory, chosen, Loop())


def page_optimizer(
    optimizer: torch.optim.Optimizer,
    directory: Directories | ParameterOffload | OffloadedOptimizer | None,
    policy: OptimizerPolicy,
    loop: Loop,
) -> OffloadedOptimizer:
    """As `offload_optimizer`, for who knows something of the loop."""
    return OffloadedOptimizer(optimizer, partial(_store_for, directory, policy), policy, loop)


def _store_for(
    directory: Directories | ParameterOffload | OffloadedOptimizer | None, policy: StatePolicy
) -> StateStore:
    """A new one on a drive, or that of another offload."""
    if isinstance(directory, ParameterOffload | OffloadedOptimizer):
        return directory.store.share()
    paths = absolute_directories(directory, path_fields()) if directory is not None else []
    unwise = check_directories(paths, policy.io_timeout_seconds) if paths else []
    store = StateStore(paths, policy)
    for text in unwise:
        store.note(text)
    return store
