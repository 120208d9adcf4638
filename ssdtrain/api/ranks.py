"""All ranks of a job go on, or none: an error on one is an error on all, and nobody waits in a collective."""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

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
    texts = _texts_of_ranks(f"{type(error).__name__} on {socket.gethostname()}: {error}" if error is not None else "")
    return [f"on rank {rank} {text}" for rank, text in enumerate(texts) if text and len(texts) > 1]


def _texts_of_ranks(own: str) -> list[str]:
    """What each rank of the default process group says, the same list on all; all ranks call this."""
    texts = [own]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        texts *= dist.get_world_size()
        dist.all_gather_object(texts, own)
    return texts


class LateAgreement:
    """As `agree` where ranks do not come by together at once: what went wrong is kept until they do.

    Args:
        undo: is called where ranks agreed not to go on.
    """

    def __init__(self, undo: Callable[[], None]) -> None:
        """Keeps errors from now on."""
        self.error: Exception | None = None  # of this rank
        self._undo = undo
        self._refusal: Exception | None = None
        self._is_over = False

    def begin(self) -> None:
        """Keeps errors again, where there was an agreement about something else."""
        self._is_over = False

    @contextlib.contextmanager
    def noting_errors(self) -> Iterator[None]:
        """Keeps an error of the block for `agree`; what comes after an agreement is raised at once."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if self._is_over:
                raise
            self.error = self.error or error

    def agree(self) -> None:
        """Raises on every rank when any rank has an error, now and in every later `check`. Collective.

        Raises:
            RuntimeError: with all errors, by rank; on a single rank it is the error itself.
        """
        errors = _texts_of_ranks(str(self.error or ""))
        texts = [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text]
        joined = "\n".join(["Expected ssdtrain to start on every rank, got:", *texts])
        self._decide(self.error if len(errors) == 1 else RuntimeError(joined) if texts else None)

    def agree_after(self, function: Callable[..., Any], restore: Callable[[Any], None]) -> Callable[..., Any]:
        """A function that all ranks call next in the place of the given one, which it gives to `restore`."""

        @functools.wraps(function)
        def call_and_agree(*args: Any, **kwargs: Any) -> Any:
            restore(function)
            result = function(*args, **kwargs)
            self.agree()
            return result

        return call_and_agree

    def agree_alone(self) -> None:
        """Raises this rank's error, where nobody knows when the others come by."""
        self._decide(self.error)

    def check(self) -> None:
        """Raises what ranks agreed on."""
        if self._refusal is not None:
            raise self._refusal

    def _decide(self, refusal: Exception | None) -> None:
        self._refusal, self._is_over = refusal, True
        if refusal is not None:
            self._undo()
            raise refusal


def path_fields() -> dict[str, str | None]:
    """What a directory may name, in this process of a job."""
    is_distributed = dist.is_available() and dist.is_initialized()
    return path_fields_of_process(dist.get_rank() if is_distributed else None)
