"""The section "ssdtrain" of DeepSpeed's configuration, and what it asks for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import deepspeed

from ssdtrain.api.section import Section
from ssdtrain.api.session import Offload


def local_rank() -> int:
    """That of this process, as launchers say it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def config_of(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration, wherever DeepSpeed would find it; what is wrong with it is left to DeepSpeed."""
    of_args = [getattr(call["args"], name, None) for name in ("deepspeed_config", "deepscale_config")]
    found = [config for config in (call["config"], call["config_params"], *of_args) if config is not None]
    if not found:
        return {}
    loaded: Mapping[str, Any] = deepspeed.load_ds_config(found[0])
    return loaded


def begin(config: Mapping[str, Any]) -> Offload | None:
    """The session the section asks for, None without a section."""
    if "ssdtrain" not in config:
        return None
    section = Section.of(config["ssdtrain"], {"local_rank": local_rank(), "rank": deepspeed.comm.get_rank()})
    check_features(section)
    session = Offload(Section(section.directories, section.policy))  # whose policy is disabled where the section is
    session.begin((), is_agreed=False)  # the caller does
    for text in _shared_drives(section.directories, config):
        session.note(text)
    return session


def check_features(section: Section) -> None:
    """Raises where it asks for more than activations.

    Raises:
        ValueError: with what DeepSpeed has for that.
    """
    if section.parameters is not None or section.optimizer is not None:
        raise ValueError(
            "In the section 'ssdtrain': expected 'activations' alone under DeepSpeed, which offloads parameters and "
            "optimizer state itself; use its offload_param and offload_optimizer"
        )


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
