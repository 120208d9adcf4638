"""The "ssdtrain" section of another framework's configuration: what it may say, checked when it is read.

Knows neither frameworks nor engines. The section is a mapping with the switch and one mapping per feature:

    {"enabled": true, "activations": {"directory": "/nvme{local_rank}", "mode": "auto"}}
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ssdtrain.policy import ActivationPolicy

KEYS = ("enabled", "activations")
ACTIVATION_KEYS = ("directory", *ActivationPolicy.model_fields)


@dataclass(frozen=True)
class Section:
    """A checked section."""

    directories: tuple[str, ...]
    """Where spill files go, in this process: placeholders are filled in. Empty when nothing is offloaded."""
    policy: ActivationPolicy
    """How activations travel; its `enabled` is the whole section's switch."""

    @classmethod
    def of(cls, section: object, places: Mapping[str, int]) -> Section:
        """Reads a section; `places` are the placeholders that `directory` may have, such as ``local_rank``.

        Raises:
            ValueError: an unknown key, a bad value, contradicting switches, or no directory.
        """
        if not isinstance(section, Mapping):
            raise _wrong("a mapping such as {'activations': {'directory': '/mnt/nvme'}}", repr(section))
        _check_keys("", section, KEYS)
        activations = section.get("activations", {})
        if not isinstance(activations, Mapping):
            raise _wrong("'activations' to be a mapping such as {'directory': '/mnt/nvme'}", repr(activations))
        _check_keys("activations.", activations, ACTIVATION_KEYS)
        policy = _policy(activations, is_enabled=_switch(section, activations))
        directory = activations.get("directory")
        if directory is None and policy.enabled:
            raise _wrong("'activations' to have a 'directory', a folder on a fast local drive", repr(dict(activations)))
        return cls(_directories(directory, places) if policy.enabled else (), policy)


def _switch(section: Mapping[str, Any], activations: Mapping[str, Any]) -> bool:
    is_enabled = section.get("enabled", True)
    if not isinstance(is_enabled, bool):
        raise _wrong("'enabled' to be true or false", repr(is_enabled))
    if not is_enabled and activations.get("enabled") is True:
        raise _wrong("'enabled' and 'activations.enabled' to agree", "false and true; remove one of them")
    return is_enabled


def _policy(activations: Mapping[str, Any], *, is_enabled: bool) -> ActivationPolicy:
    fields = {key: value for key, value in activations.items() if key != "directory"}
    if not is_enabled:
        fields["enabled"] = False
    try:
        return ActivationPolicy.of(fields)
    except ValidationError as error:
        texts = [f"{'.'.join(map(str, item['loc'])) or 'activations'}: {item['msg']}" for item in error.errors()]
        raise _wrong("fields of an ActivationPolicy in 'activations'", "; ".join(texts)) from error


def _directories(directory: object, places: Mapping[str, int]) -> tuple[str, ...]:
    several = [directory] if isinstance(directory, str) else directory
    if not isinstance(several, Sequence) or not several or not all(isinstance(path, str) for path in several):
        raise _wrong("'activations.directory' to be a path or a list of paths", repr(directory))
    return tuple(_fill(path, places) for path in several)


def _fill(path: str, places: Mapping[str, int]) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in places:
            accepted = ", ".join(f"{{{name}}}" for name in places)
            raise _wrong(f"placeholders among {accepted} in 'activations.directory'", repr(path))
        return str(places[match[1]])

    return re.sub(r"\{(\w*)\}", value, path)


def _check_keys(where: str, mapping: Mapping[str, Any], accepted: Sequence[str]) -> None:
    for key in mapping:
        if key not in accepted:
            near = difflib.get_close_matches(str(key), accepted, n=1)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            raise _wrong(f"keys among {', '.join(accepted)}", repr(f"{where}{key}") + hint)


def _wrong(expected: str, got: str) -> ValueError:
    return ValueError(f"In the section 'ssdtrain': expected {expected}; got {got}")
