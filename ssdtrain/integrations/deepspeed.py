"""DeepSpeed: a section in its JSON turns ssdtrain on.

    "ssdtrain": {"enabled": true, "activations": {"directory": "/local_nvme", "mode": "auto"}}

The keys of "activations" are "directory" and the fields of `ActivationPolicy`; `{local_rank}` in a directory is filled
in. One import is all a script needs:

    import ssdtrain.integrations.deepspeed  # from here on `deepspeed.initialize` honours the section

The import puts a wrapper in the place of `deepspeed.initialize`, once; `uninstall()` takes it away again. A script that
cannot be edited is started by `python -m ssdtrain.launch train.py ...`. A script that said `from deepspeed import
initialize` before the import has the original: it calls `ssdtrain.integrations.deepspeed.initialize` instead, which
takes the same arguments. `engine.ssdtrain.stats` says what happened, and so does a line in DeepSpeed's log every
`steps_per_print` steps. The same section works in the DeepSpeed configurations of Accelerate, of Hugging Face's Trainer
and of Lightning.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

from ssdtrain.api.ranks import agree
from ssdtrain.api.section import Section
from ssdtrain.api.session import Offload
from ssdtrain.integrations import check_version, require
from ssdtrain.integrations.accelerate_auto import keep_auto, restore_auto

deepspeed: Any = require("deepspeed", "DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.8")

from ssdtrain.integrations.deepspeed_engine import EngineOffload  # noqa: E402  it needs deepspeed

__all__ = ["EngineOffload", "initialize", "install", "uninstall"]

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
    session = agree(lambda: _begin(_config_of(call)), undo=_close)
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
    # DeepSpeed sets the device a little later; collectives of objects travel through it.
    accelerator.set_device(_local_rank() if device_rank is None or device_rank < 0 else device_rank)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _config_of(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration, wherever DeepSpeed would find it; what is wrong with it is left to DeepSpeed."""
    of_args = [getattr(call["args"], name, None) for name in ("deepspeed_config", "deepscale_config")]
    found = [config for config in (call["config"], call["config_params"], *of_args) if config is not None]
    if not found:
        return {}
    loaded: Mapping[str, Any] = deepspeed.load_ds_config(found[0])
    return loaded


def _begin(config: Mapping[str, Any]) -> Offload | None:
    """The session the section asks for, None without a section."""
    if "ssdtrain" not in config:
        return None
    section = Section.of(config["ssdtrain"], {"local_rank": _local_rank(), "rank": deepspeed.comm.get_rank()})
    _check_features(section)
    session = Offload(Section(section.directories, section.policy))  # whose policy is disabled where the section is
    session.begin((), is_agreed=False)  # the caller does
    for text in _shared_drives(section.directories, config):
        session.note(text)
    return session


def _check_features(section: Section) -> None:
    if section.parameters is not None or section.optimizer is not None:
        raise ValueError(
            "In the section 'ssdtrain': expected 'activations' alone under DeepSpeed, which offloads parameters and "
            "optimizer state itself; use its offload_param and offload_optimizer"
        )


def _close(session: Offload | None) -> None:
    if session is not None:
        session.close()


def _shared_drives(directories: tuple[str, ...], config: Mapping[str, Any]) -> list[str]:
    """Remarks about drives that ZeRO-Infinity uses too."""
    zero = config.get("zero_optimization", {})
    offloads = [zero.get(name) or {} for name in ("offload_param", "offload_optimizer")]
    theirs = {entry["nvme_path"] for entry in offloads if entry.get("device") == "nvme" and "nvme_path" in entry}
    drives = {os.stat(path).st_dev: path for path in sorted(theirs) if os.path.isdir(path)}
    return [
        f"{directory} and ZeRO-Infinity's nvme_path {drives[os.stat(directory).st_dev]} are on one drive and share its"
        " bandwidth; ssdtrain keeps tensors in memory while the drive is behind (mode 'auto'). Another drive is better"
        for directory in directories
        if os.stat(directory).st_dev in drives
    ]


# -- installing ----------------------------------------------------------------------------------------------------


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
check_version("deepspeed", deepspeed.__version__)
install()
