"""`offload_activations`: what users call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ssdtrain.activations import ActivationOffload
from ssdtrain.policy import ActivationPolicy


def offload_activations(
    directory: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None,
    policy: ActivationPolicy | Mapping[str, Any] | None = None,
    model: torch.nn.Module | None = None,
    *,
    record: str | os.PathLike[str] | None = None,
) -> ActivationOffload:
    """Keeps saved activations on the drive, or in pinned host memory, between forward and backward.

    Lowers peak memory by what autograd would hold between forward and backward; results are equal to the bit. It may
    wrap one forward, one step or the whole loop (best: the engine stays open), be entered again, and be left before
    backward, which may run in another thread. The hooks act in the thread that entered.

    Args:
        directory: where the spill files go, on a fast local drive. Several are striped. The files are unlinked at once:
            nothing is ever left behind. None: tensors of an accelerator go to pinned host memory only.
        policy: an `ActivationPolicy` or a mapping with its fields.
        model: names modules in messages, marks its parameters and buffers as weights, and has the blocks that
            ``recompute`` is about. Never needed for correctness.
        record: the file for a record of the run, which ``ssdtrain report`` shows; the same as the policy's field.

    Returns:
        A context manager with `stats` and `close()`. Everything is freed by `close()`, when the object is gone, and,
        unless tensors of an accelerator travelled, when the context is left and the last graph is gone.

    Raises:
        OSError: a directory is missing, not writable or full.
        ValueError: the policy has an unknown key or a bad value, or no directory is given.
        RuntimeError: the engine asked for by name is not available.

    Example:
        >>> with offload_activations("/mnt/nvme") as offload:
        ...     for batch in loader:
        ...         model(batch).backward()
        ...         optimizer.step(); optimizer.zero_grad()
        >>> print(offload.stats)
    """
    several = [directory] if isinstance(directory, str | os.PathLike) else directory
    paths = None if several is None else [os.fspath(path) for path in several]
    chosen = ActivationPolicy.of(policy)
    if record is not None:
        chosen = chosen.model_copy(update={"record": os.fspath(record)})
    return ActivationOffload(paths, chosen, model)
