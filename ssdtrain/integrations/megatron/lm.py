"""Megatron-LM: a forward step for its `pretrain`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from ssdtrain.activations.offload import ActivationOffload
from ssdtrain.integrations.arguments import asked_for
from ssdtrain.integrations.megatron.models import config_of, require_megatron
from ssdtrain.integrations.megatron.rank import Rank


class _ForwardStep:
    """A forward step whose saved activations are offloaded; `offload` has the statistics once it has run."""

    def __init__(self, forward_step_func: Callable[..., Any], args: object) -> None:
        functools.update_wrapper(self, forward_step_func)
        self._forward_step, self._args = forward_step_func, args
        self._rank = Rank()
        self._is_asked = self._has_started = False
        if not callable(args):
            self._open()
            self._rank.agreement.agree()

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
        with self._rank.agreement.noting_errors():
            self._rank.prepare(model)
        return self._rank.run(self._forward_step, data_iterator, model, *args, **kwargs)

    def _open(self) -> None:
        self._is_asked = True
        with self._rank.agreement.noting_errors():
            asked = asked_for(self._args() if callable(self._args) else self._args)
            if asked is not None:
                self._rank.open(*asked)

    def _start(self, model: torch.nn.Module) -> None:
        """The first step: see [Note: one error on every rank]."""
        agreement = self._rank.agreement
        agreement.begin()  # it was about the directories at most
        if not self._is_asked:
            self._open()
        with agreement.noting_errors():
            self._rank.prepare(model)
        config = config_of(model)
        state = importlib.import_module("megatron.core.parallel_state")
        if state.get_pipeline_model_parallel_world_size() == 1:
            agreement.agree()
        elif config.finalize_model_grads_func is not None:
            config.finalize_model_grads_func = agreement.agree_after(
                config.finalize_model_grads_func, functools.partial(setattr, config, "finalize_model_grads_func")
            )
        else:
            agreement.agree_alone()


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
    require_megatron()
    return _ForwardStep(forward_step_func, args)
