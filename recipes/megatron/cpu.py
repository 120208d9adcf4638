"""Lets megatron-core run on a machine without CUDA, for trying things out: slow, and equal to itself to the bit.

megatron-core asks `torch.cuda` for devices, streams and random states even where nothing else needs a GPU. `stand_in`
answers those calls with the CPU's own until it is left, and turns `device="cuda"` into the CPU. It is no part of
ssdtrain, and with a GPU it must not be used.

Example:
    >>> with stand_in():
    ...     train()
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe import moe_utils
from torch.overrides import TorchFunctionMode

__all__ = ["stand_in"]


class _CudaMeansCpu(TorchFunctionMode):
    """Turns a device named cuda into the CPU, in every call that makes or moves a tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and "cuda" in str(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs.get("pin_memory"):  # there is no device to pin for
            kwargs = {**kwargs, "pin_memory": False}
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):  # Megatron's optimizers ask for CUDA types by name
            return result.replace("torch.", "torch.cuda.")
        return result


class _Stream:
    """A stream of a machine that does one thing after the other."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()


class _Event:
    """Something that is over as soon as it is recorded."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


class _NoFP8:
    """What TransformerEngine says of itself when eight-bit floats are off."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def _nothing(*_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _set_rng_state(state: torch.Tensor, device: object = None) -> None:
    torch.set_rng_state(state)


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """Answers for `torch.cuda` while it is active.

    Raises:
        RuntimeError: the machine has a GPU.
    """
    if torch.cuda.is_available():
        raise RuntimeError("Expected a machine without CUDA, got one with; run without the stand-ins")
    stream = _Stream()
    answers = {
        "current_device": lambda: torch.device("cpu"),
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda device=None: None,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": _set_rng_state,
        "empty_cache": lambda: None,
        "Stream": _Stream,
        "Event": _Event,
        "FloatTensor": torch.FloatTensor,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch.cuda.random, "get_rng_state", answers["get_rng_state"]))
        stack.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda self, *args, **kwargs: self))
        # megatron-core 0.16.1 uses these names of TransformerEngine even where it is not installed
        for module, name, answer in (
            (moe_utils, "te_general_gemm", None),
            (random, "FP8GlobalStateManager", _NoFP8),
            (random, "activation_recompute_forward", _nothing),
            (random, "fp8_autocast", _nothing),
        ):
            if not hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, answer, create=True))
        stack.enter_context(_CudaMeansCpu())
        yield
