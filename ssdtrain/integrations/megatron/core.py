"""megatron-core: a schedule, for loops of your own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from ssdtrain.activations.offload import ActivationOffload
from ssdtrain.api.functions import Directories
from ssdtrain.integrations.megatron.models import require_megatron
from ssdtrain.integrations.megatron.rank import Rank
from ssdtrain.integrations.megatron.schedules import check_schedule
from ssdtrain.policy import ActivationPolicy


class _Schedule:
    """A forward-backward schedule whose forward steps offload; `offload` has the statistics."""

    def __init__(self, schedule: Callable[..., Any], rank: Rank) -> None:
        functools.update_wrapper(self, schedule)
        self._schedule, self._rank = schedule, rank
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
            agreement = self._rank.agreement
            agreement.begin()  # it was about the directories only
            with agreement.noting_errors():
                for chunk in chunks:
                    self._rank.prepare(chunk)
            agreement.agree()
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
    require_megatron()
    rank = Rank()
    with rank.agreement.noting_errors():
        check_schedule(schedule)
        rank.open(directory, ActivationPolicy.of(policy))
    rank.agreement.agree()
    return _Schedule(schedule, rank)
