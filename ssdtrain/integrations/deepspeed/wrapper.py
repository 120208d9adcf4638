"""What stands in the place of `deepspeed.initialize`, and how it comes there."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed

from ssdtrain.api.ranks import agree
from ssdtrain.api.session import Offload
from ssdtrain.integrations.accelerate_auto import keep_auto, restore_auto
from ssdtrain.integrations.deepspeed.engine import EngineOffload
from ssdtrain.integrations.deepspeed.section import begin, config_of, local_rank

_initialize: Callable[..., Any] = getattr(deepspeed.initialize, "_ssdtrain_original", deepspeed.initialize)


@functools.wraps(_initialize, assigned=(), updated=())
def initialize(*args: Any, **kwargs: Any) -> Any:
    """`deepspeed.initialize`, with the section "ssdtrain" of the configuration honoured; same arguments and results.

    The section is checked, and the directory opened, before DeepSpeed builds its engine. Every rank takes part, and
    when one of them cannot go on, all raise.

    Raises:
        ValueError: the section has an unknown key, contradicting keys, a bad value, or no directory.
        OSError: a directory is missing, not writable or full on this rank.
        RuntimeError: another rank could not go on; the message says which and why.
    """
    call = _bind(args, kwargs)
    _start_processes(call)
    session = agree(lambda: begin(config_of(call)), undo=_close)
    try:
        results = _initialize(*args, **kwargs)
    except BaseException:
        _close(session)
        raise
    if session is not None:
        results[0].ssdtrain = EngineOffload(results[0], session)
    return results


def _bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(_initialize).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _start_processes(call: Mapping[str, Any]) -> None:
    """What `deepspeed.initialize` begins with; it finds this done."""
    accelerator = deepspeed.get_accelerator()
    deepspeed.comm.init_distributed(
        dist_backend=accelerator.communication_backend_name(),
        distributed_port=call["distributed_port"],
        dist_init_required=call["dist_init_required"],
    )
    device_rank = getattr(call["args"], "device_rank", None)
    # DeepSpeed sets the device a little later; collectives of objects are sent through it.
    accelerator.set_device(local_rank() if device_rank is None or device_rank < 0 else device_rank)


def _close(session: Offload | None) -> None:
    if session is not None:
        session.close()


def install() -> None:
    """Makes `deepspeed.initialize` honour the section; done by the import, and nothing to do a second time."""
    if deepspeed.initialize is not initialize:
        deepspeed.initialize = initialize
        keep_auto("ssdtrain.")


def uninstall() -> None:
    """Undoes `install`. Engines made before keep what they have; `engine.ssdtrain.detach()` ends that."""
    if deepspeed.initialize is initialize:
        deepspeed.initialize = _initialize
        restore_auto()


initialize._ssdtrain_original = _initialize  # type: ignore[attr-defined]
