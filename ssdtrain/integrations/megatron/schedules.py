"""Which of megatron-core's schedules goes with how models are parallel."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

_SCHEDULES = (
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_without_interleaving",
    "forward_backward_pipelining_with_interleaving",
)


def check_schedule(schedule: Callable[..., Any]) -> None:
    """Raises where it is not the one that fits.

    Raises:
        ValueError: with the one that does.
        RuntimeError: nobody has said yet how models are parallel.
    """
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
