"""Lets "auto" in our section through Accelerate, which also reads DeepSpeed's configuration.

Accelerate (and Hugging Face's Trainer with it) takes every "auto" in a DeepSpeed configuration for a value that it has
to fill in, and refuses those it does not know. Ours mean something else and are left alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from typing import Any


def keep_auto(prefix: str) -> None:
    """Makes Accelerate, where it is installed, pass over keys that begin with `prefix`; `restore_auto` undoes it."""
    plugin = _plugin()
    if plugin is None or hasattr(plugin.fill_match, "_ssdtrain_original"):
        return
    original = plugin.fill_match

    @functools.wraps(original)
    def fill_match(self: Any, ds_key_long: str, *args: Any, **kwargs: Any) -> Any:
        return None if ds_key_long.startswith(prefix) else original(self, ds_key_long, *args, **kwargs)

    fill_match._ssdtrain_original = original  # type: ignore[attr-defined]
    plugin.fill_match = fill_match


def restore_auto() -> None:
    """Undoes `keep_auto`."""
    plugin = _plugin()
    if plugin is not None:
        plugin.fill_match = getattr(plugin.fill_match, "_ssdtrain_original", plugin.fill_match)


def _plugin() -> Any:
    """Accelerate's plugin for DeepSpeed; None where it is not installed, or a version without."""
    if importlib.util.find_spec("accelerate") is not None:
        with contextlib.suppress(ImportError, AttributeError):
            return importlib.import_module("accelerate.utils.dataclasses").DeepSpeedPlugin
    return None
