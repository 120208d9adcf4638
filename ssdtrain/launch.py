"""Runs a training that cannot be edited, with ssdtrain in whichever trainer it imports.

    python -m ssdtrain.launch --dir /mnt/nvme --optimizer train.py --lr 1e-4
    torchrun --nproc-per-node 8 -m ssdtrain.launch --dir /mnt/nvme -m llamafactory.cli train x.yaml
    deepspeed --module ssdtrain.launch train.py --deepspeed_config ds.json

`-m package.module` in the place of the script runs a module, which sees the arguments it would have seen; the
`--local_rank=N` that DeepSpeed's launcher puts first is handed on. Options before it say what `SSDTRAIN_...` variables
say otherwise, see `ssdtrain.Section.from_environment`:

    --dir DIR            where spill files go; again for another drive
    --config FILE        a section in JSON or YAML, instead of all others
    --activations SPEC, --parameters SPEC, --optimizer SPEC
                         true, false, or the JSON of a policy; `--optimizer` and `--parameters` alone mean true

Every Trainer of transformers gets the callback, those of Lightning do by its entry points, and DeepSpeed honours its
section, from the moment the script imports them; what it does not import is not imported here either.

[Note: processes of a script's own]
A command line that trains on several GPUs may start torchrun itself, as LLaMA-Factory's does. Those processes would
train without ssdtrain, so starting them is refused: torchrun comes first, and this module in it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import MappingProxyType, ModuleType
from typing import Any

_USAGE = (
    "usage: python -m ssdtrain.launch [--dir DIR] [--config FILE] [--activations SPEC] [--parameters [SPEC]]"
    " [--optimizer [SPEC]] [-m] SCRIPT_OR_MODULE [ARGUMENT ...]"
)
_VARIABLES = MappingProxyType(
    {
        "--dir": "SSDTRAIN_DIR",
        "--config": "SSDTRAIN_CONFIG",
        "--activations": "SSDTRAIN_ACTIVATIONS",
        "--parameters": "SSDTRAIN_PARAMETERS",
        "--optimizer": "SSDTRAIN_OPTIMIZER",
    }
)
_INSTALLED_WITH = MappingProxyType(
    {"transformers.trainer": "ssdtrain.integrations.transformers", "deepspeed": "ssdtrain.integrations.deepspeed"}
)
"""By module of a trainer: what is installed when it is imported."""
_STARTERS = frozenset(
    "torchrun torch.distributed.run torch.distributed.launch accelerate accelerate.commands.launch deepspeed".split()
)
"""Commands and modules that start processes which train."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ssdtrain.launch``."""
    settings, rest = options(sys.argv[1:] if arguments is None else arguments)
    script, is_module, rest = parse(rest)
    os.environ.update(settings)
    if any(name.startswith("SSDTRAIN_") for name in os.environ):
        _check_environment()
    try:
        _check_command(["python", "-m", script] if is_module else [script])
    except RuntimeError as error:
        raise SystemExit(f"ssdtrain.launch: {error}") from None
    sys.addaudithook(_watch_processes)
    sys.meta_path.insert(0, _Finder())
    sys.argv = [script, *rest]
    if is_module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
        runpy.run_path(script, run_name="__main__")


def options(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The variables that options before the script stand for, and what follows.

    Raises:
        SystemExit: an option lacks its value.
    """
    rest, found = list(arguments), dict[str, str]()
    of_launcher = []
    while rest and rest[0].partition("=")[0] in (*_VARIABLES, "--local_rank"):
        name, has_value, value = rest.pop(0).partition("=")
        if name == "--local_rank":
            of_launcher.append(f"{name}={value}" if has_value else name)
            continue
        if not has_value:
            is_next = bool(rest) and (name in ("--dir", "--config", "--activations") or _is_spec(rest[0]))
            value = rest.pop(0) if is_next else "true"
            if not is_next and name in ("--dir", "--config", "--activations"):
                raise SystemExit(f"Expected a value after {name}, got nothing\n{_USAGE}")
        variable = _VARIABLES[name]
        found[variable] = os.pathsep.join([found[variable], value]) if variable in found else value
    return found, [*of_launcher, *rest]


def _is_spec(text: str) -> bool:
    return text.startswith("{") or text in ("true", "false")


def parse(arguments: Sequence[str]) -> tuple[str, bool, list[str]]:
    """The script or module, whether it is a module, and the arguments it gets.

    Raises:
        SystemExit: there is nothing to run, or an option nobody knows.
    """
    rest = list(arguments)
    of_launcher = []
    while rest and rest[0].startswith("--local_rank"):
        of_launcher.append(rest.pop(0))
    is_module = rest[:1] == ["-m"]
    if is_module:
        rest.pop(0)
    if not rest or rest[0].startswith("-"):
        raise SystemExit(f"Expected a script to run, got {rest[0] if rest else 'nothing'}\n{_USAGE}")
    return rest[0], is_module, [*of_launcher, *rest[1:]]


def _check_environment() -> None:
    """A typing error ends the run before anything is imported that takes long."""
    section: Any = importlib.import_module("ssdtrain.api.section")
    try:
        section.Section.from_environment()
    except (OSError, ValueError) as error:
        raise SystemExit(f"ssdtrain.launch: {error}") from None


def _watch_processes(event: str, details: tuple[Any, ...]) -> None:
    """See [Note: processes of a script's own]."""
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn") and isinstance(details[1], list | tuple):
        _check_command([os.fsdecode(word) for word in details[1]])


def _check_command(words: Sequence[str]) -> None:
    """Raises where a command starts processes that this module does not reach.

    Raises:
        RuntimeError: with the command to use instead.
    """
    module = words.index("-m") + 1 if "-m" in words[1:3] else 0
    started = os.path.basename(words[module]) if module < len(words) else ""
    if started in _STARTERS and "ssdtrain.launch" not in words:
        raise RuntimeError(
            f"Expected a script that trains in its own process, got one that starts {started}, whose processes would "
            "train without ssdtrain: run that first, as in torchrun --nproc-per-node 8 -m ssdtrain.launch --dir DIR -m "
            "llamafactory.launcher x.yaml"
        )


class _Finder(importlib.abc.MetaPathFinder):
    """Installs an integration when the module it is about has been imported."""

    def __init__(self) -> None:
        self._waiting = dict(_INSTALLED_WITH)

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's own, whose loader runs ours afterwards."""
        integration = self._waiting.pop(fullname, None)
        spec = importlib.util.find_spec(fullname) if integration is not None else None
        if integration is not None and spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, integration)
        return spec


class _Loader(importlib.abc.Loader):
    """A module's own loader, and an integration after it."""

    def __init__(self, own: Any, integration: str) -> None:
        self._own, self._integration = own, integration

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As it does."""
        found: ModuleType | None = self._own.create_module(spec)
        return found

    def exec_module(self, module: ModuleType) -> None:
        """As it does; then the integration, which may import the module."""
        self._own.exec_module(module)
        integration = importlib.import_module(self._integration)
        install_everywhere = getattr(integration, "install_everywhere", None)
        if install_everywhere is not None and os.environ.get("SSDTRAIN_DIR", os.environ.get("SSDTRAIN_CONFIG")):
            install_everywhere()


if __name__ == "__main__":
    main()
