"""What one training asks of ssdtrain, all features together: from keywords, a mapping, JSON, YAML or the environment.

Knows neither trainers nor engines. As a mapping it has the switch, the directory and one entry per feature, which is
true, false or a mapping of the fields of its policy:

    {"enabled": true, "directory": "/nvme{local_rank}", "activations": {"mode": "auto"}, "optimizer": true}

Activations are offloaded unless it says otherwise, parameters and optimizer state only if it says so. The directory may
stand in "activations" as well. "parameters" may have "blocks", the names of modules.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from ssdtrain.api.ranks import path_fields
from ssdtrain.io.files.paths import absolute_directories, absolute_path
from ssdtrain.policy import ActivationPolicy, OptimizerPolicy, ParameterPolicy

FEATURES = ("activations", "parameters", "optimizer")
KEYS = ("enabled", "directory", *FEATURES)
ACTIVATION_KEYS = ("directory", *ActivationPolicy.model_fields)
PARAMETER_KEYS = ("blocks", *ParameterPolicy.model_fields)

_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_OF_OTHERS = ("SSDTRAIN_NO_CPP", "SSDTRAIN_BUILD_JOBS", "SSDTRAIN_CHROMIUM", "SSDTRAIN_TEST_")  # no settings of a run

_T = TypeVar("_T", ActivationPolicy, ParameterPolicy, OptimizerPolicy)


@dataclass(frozen=True)
class Section:
    """A checked section. A feature that is None stays as it is."""

    directories: tuple[str, ...] = ()
    """Where spill files go, in this process: placeholders are filled in. Empty when nothing is offloaded, and when
    pinned host memory is all there is."""
    activations: ActivationPolicy | None = None
    """How activations are offloaded."""
    parameters: ParameterPolicy | None = None
    """How parameters do."""
    optimizer: OptimizerPolicy | None = None
    """How optimizer state does."""
    blocks: tuple[str, ...] | None = None
    """The modules whose parameters are offloaded; None: the repeated layers, see `offload_parameters`."""

    @property
    def is_enabled(self) -> bool:
        """Whether anything is to be offloaded."""
        return any(policy is not None for policy in (self.activations, self.parameters, self.optimizer))

    @property
    def policy(self) -> ActivationPolicy:
        """How activations are offloaded; one that is disabled where they are not."""
        return self.activations or ActivationPolicy(enabled=False)

    @classmethod
    def of(cls, section: object, named: Mapping[str, int] | None = None) -> Section:
        """Reads a mapping.

        Args:
            section: the mapping.
            named: what a directory may name, such as ``local_rank``; by default the ranks of this process.

        Raises:
            ValueError: an unknown key, a bad value, contradicting switches, or no directory.
        """
        if not isinstance(section, Mapping):
            raise _wrong("a mapping such as {'directory': '/mnt/nvme', 'optimizer': true}", repr(section))
        _check_keys("", section, KEYS)
        features = {name: _feature(name, section) for name in FEATURES}
        is_enabled = _switch(section, features)
        policies = {name: fields for name, fields in features.items() if fields is not None and is_enabled}
        if not any(fields.get("enabled", True) for fields in policies.values()):
            policies = {}
        elif _directory(section, features) is None:
            where = "'activations'" if "activations" in policies else f"'{next(iter(policies))}'"
            raise _wrong(f"{where} to have a 'directory', a folder on a fast local drive", repr(dict(section)))
        return cls._of_policies(_directory(section, features) if policies else (), policies, named)

    @classmethod
    def given(
        cls, directory: object, *, activations: object = True, parameters: object = False, optimizer: object = False
    ) -> Section:
        """Reads keywords; without a directory tensors of an accelerator go to pinned host memory only.

        Raises:
            TypeError: the directory is no path.
            ValueError: as for `of`.
        """
        section = {"activations": activations, "parameters": parameters, "optimizer": optimizer}
        features = {name: _feature(name, section) for name in FEATURES}
        policies = {name: fields for name, fields in features.items() if fields is not None}
        return cls._of_policies(() if directory is None else directory, policies, None)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Section:
        """Reads a JSON or YAML file: the section itself, or a configuration that has it under ``ssdtrain``.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is neither, or what it says is wrong as for `of`.
        """
        name = absolute_path(path, "a JSON or YAML file")
        with open(name, encoding="utf-8") as file:
            text = file.read()
        found = _parsed(name, text)
        is_whole = isinstance(found, Mapping) and "ssdtrain" in found
        return cls.of(found["ssdtrain"] if is_whole else found)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Section | None:
        """Reads ``SSDTRAIN_DIR`` and its companions; None without any.

        ``SSDTRAIN_DIR`` is a directory or several with ``:`` between them; ``SSDTRAIN_CONFIG`` a file for `load`
        instead of all others. ``SSDTRAIN_ACTIVATIONS``, ``SSDTRAIN_PARAMETERS`` and ``SSDTRAIN_OPTIMIZER`` are words
        such as ``true`` or the JSON of a policy; ``SSDTRAIN_PARAMETERS_MIN_NBYTES`` and the like are fields of one,
        ``SSDTRAIN_MODE`` and the like of that of activations.

        Raises:
            ValueError: a variable ``SSDTRAIN_...`` that means nothing, or has a bad value.
        """
        found = {
            name: value
            for name, value in environment.items()
            if name.startswith("SSDTRAIN_") and not name.startswith(_OF_OTHERS)
        }
        known = _variables()
        for name in found:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f". Did you mean {near[0]}?" if near else f". There are {', '.join(known)}"
                raise ValueError(f"Expected environment variables that mean something to ssdtrain, got {name}{hint}")
        if "SSDTRAIN_CONFIG" in found:
            others = sorted(found.keys() - {"SSDTRAIN_CONFIG"})
            if others:
                raise ValueError(f"Expected SSDTRAIN_CONFIG alone, got {', '.join(others)} too: say it in the file")
            return cls.load(found["SSDTRAIN_CONFIG"])
        if not found or found.get("SSDTRAIN_DIR") == "":
            return None
        return cls.of(_from_variables(found, known))

    @classmethod
    def _of_policies(
        cls, directory: object, policies: Mapping[str, Mapping[str, Any]], named: Mapping[str, int] | None
    ) -> Section:
        known = path_fields() if named is None else {name: str(value) for name, value in named.items()}
        parameters = dict(policies.get("parameters") or {})
        blocks = parameters.pop("blocks", None)
        if isinstance(blocks, str) or not isinstance(blocks, Sequence | None):
            raise _wrong("'parameters.blocks' to be a list of names", repr(blocks))
        activations = {key: value for key, value in (policies.get("activations") or {}).items() if key != "directory"}
        chosen = (
            _policy("activations", ActivationPolicy, activations if "activations" in policies else None),
            _policy("parameters", ParameterPolicy, parameters if "parameters" in policies else None),
            _policy("optimizer", OptimizerPolicy, policies.get("optimizer")),
        )
        if not any(chosen) or directory == ():
            return cls((), *chosen, tuple(blocks) if blocks else None)
        try:
            found = tuple(absolute_directories(directory, known))
        except (TypeError, ValueError) as error:
            raise type(error)(f"In the section 'ssdtrain': {error}") from None
        return cls(found, *chosen, tuple(blocks) if blocks else None)


def _feature(name: str, section: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of a feature's policy; None where it is switched off."""
    value = section.get(name, name == "activations")
    if isinstance(value, bool) or value is None:
        return {} if value else None
    if isinstance(value, ActivationPolicy | ParameterPolicy | OptimizerPolicy):
        return value.model_dump(exclude_unset=True)
    if not isinstance(value, Mapping):
        raise _wrong(f"{name!r} to be true, false or a mapping such as {{'min_nbytes': '1MiB'}}", repr(value))
    accepted = {"activations": ACTIVATION_KEYS, "parameters": PARAMETER_KEYS}.get(name)
    _check_keys(f"{name}.", value, accepted or tuple(OptimizerPolicy.model_fields))
    return dict(value)


def _switch(section: Mapping[str, Any], features: Mapping[str, Mapping[str, Any] | None]) -> bool:
    is_enabled = section.get("enabled", True)
    if not isinstance(is_enabled, bool):
        raise _wrong("'enabled' to be true or false", repr(is_enabled))
    for name, fields in features.items():
        if not is_enabled and fields is not None and fields.get("enabled") is True:
            raise _wrong(f"'enabled' and '{name}.enabled' to agree", "false and true; remove one of them")
    return is_enabled


def _directory(section: Mapping[str, Any], features: Mapping[str, Mapping[str, Any] | None]) -> Any:
    inner = (features["activations"] or {}).get("directory")
    outer = section.get("directory")
    if inner is not None and outer is not None and inner != outer:
        raise _wrong("one 'directory'", f"{outer!r} and in 'activations' {inner!r}; remove one of them")
    directory = outer if inner is None else inner
    several = [directory] if isinstance(directory, str | os.PathLike) else directory
    if directory is not None and not (
        isinstance(several, Sequence) and several and all(isinstance(path, str | os.PathLike) for path in several)
    ):
        where = "'directory'" if inner is None else "'activations.directory'"
        raise _wrong(f"{where} to be a path or a list of paths", repr(directory))
    return directory


def _policy(name: str, kind: type[_T], fields: Mapping[str, Any] | None) -> _T | None:
    """None where the fields switch it off."""
    if fields is None:
        return None
    try:
        policy = kind.of(fields)
    except ValidationError as error:
        texts = [f"{'.'.join(map(str, item['loc'])) or name}: {item['msg']}" for item in error.errors()]
        article = "a" if kind is ParameterPolicy else "an"
        raise _wrong(f"fields of {article} {kind.__name__} in {name!r}", "; ".join(texts)) from error
    return policy if policy.enabled else None


def _parsed(path: str, text: str) -> Any:
    if not path.endswith((".yaml", ".yml")):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"Expected JSON in {path}, or a name that ends in .yaml, got {error}") from error
    try:
        yaml: Any = importlib.import_module("yaml")
    except ImportError as error:
        raise ValueError(f"Expected PyYAML to read {path}, got none: pip install pyyaml, or write JSON") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"Expected YAML in {path}, got {error}") from error


# -- environment -------------------------------------------------------------------------------------------------------


def _variables() -> dict[str, tuple[str, str]]:
    """By variable: the feature it is about and the field; without a feature, a key of the section."""
    found = {"SSDTRAIN_DIR": ("", "directory"), "SSDTRAIN_CONFIG": ("", "")}
    found |= {f"SSDTRAIN_{name.upper()}": ("", name) for name in ("enabled", *FEATURES)}
    fields = {"activations": ActivationPolicy.model_fields, "parameters": ParameterPolicy.model_fields}
    for feature, own in {**fields, "optimizer": OptimizerPolicy.model_fields}.items():
        for field in own:
            found.setdefault(f"SSDTRAIN_{feature.upper()}_{field.upper()}", (feature, field))
    for field in ActivationPolicy.model_fields:
        found.setdefault(f"SSDTRAIN_{field.upper()}", ("activations", field))
    found["SSDTRAIN_PARAMETERS_BLOCKS"] = ("parameters", "blocks")
    return found


def _from_variables(found: Mapping[str, str], known: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    section: dict[str, Any] = {}
    fields: dict[str, dict[str, Any]] = {}
    for name, text in found.items():
        feature, field = known[name]
        if feature:
            fields.setdefault(feature, {})[field] = text.split(",") if field == "blocks" else text
        elif field == "directory":
            section[field] = text
        else:
            section[field] = _word_or_json(name, text)
    for feature, own in fields.items():
        value = section.get(feature, True)
        if value is False:
            raise ValueError(f"Expected SSDTRAIN_{feature.upper()} to be on beside fields of it, got it off")
        section[feature] = {**(value if isinstance(value, dict) else {}), **own}
    return section


def _word_or_json(name: str, text: str) -> Any:
    if text.strip().lower() in _WORDS:
        return _WORDS[text.strip().lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"Expected {name} to be true, false or the JSON of a policy, got {text!r}") from error


def _check_keys(where: str, mapping: Mapping[str, Any], accepted: Sequence[str]) -> None:
    for key in mapping:
        if key not in accepted:
            near = difflib.get_close_matches(str(key), accepted, n=1)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            raise _wrong(f"keys among {', '.join(accepted)}", repr(f"{where}{key}") + hint)


def _wrong(expected: str, got: str) -> ValueError:
    return ValueError(f"In the section 'ssdtrain': expected {expected}; got {got}")
