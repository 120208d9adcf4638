"""All ranks of a job go on, or none: an error on one is an error on all, and nobody waits in a collective."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from ssdtrain.io.files.paths import path_fields_of_process

_T = TypeVar("_T")


def agree(prepare: Callable[[], _T], undo: Callable[[_T], None]) -> _T:
    """Runs `prepare` on every rank of the default process group; all ranks call this.

    Args:
        prepare: what may fail on some ranks only, such as opening a directory. No collectives in it.
        undo: is given the result where `prepare` worked and another rank failed.

    Raises:
        Exception: what `prepare` raised on this rank.
        RuntimeError: it failed on other ranks; the message says on which and why.
    """
    try:
        result = prepare()
    except Exception as error:  # whatever it is, the others must hear of it
        _failed_ranks(error)
        raise
    failed = _failed_ranks(None)
    if failed:
        undo(result)
        raise RuntimeError("Expected ssdtrain to start on every rank, got an error " + "; ".join(failed))
    return result


def _failed_ranks(error: Exception | None) -> list[str]:
    """What went wrong on which rank, the same list on all."""
    texts = texts_of_ranks(f"{type(error).__name__} on {socket.gethostname()}: {error}" if error is not None else "")
    return [f"on rank {rank} {text}" for rank, text in enumerate(texts) if text and len(texts) > 1]


def texts_of_ranks(own: str) -> list[str]:
    """What each rank of the default process group says, the same list on all, which all call this; without one, `own`.

    For who cannot use `agree`, because the ranks do not come by together.
    """
    texts = [own]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        texts *= dist.get_world_size()
        dist.all_gather_object(texts, own)
    return texts


def path_fields() -> dict[str, str | None]:
    """What a directory may name, in this process of a job."""
    is_distributed = dist.is_available() and dist.is_initialized()
    return path_fields_of_process(dist.get_rank() if is_distributed else None)
