"""Command-line options made from `ActivationPolicy`, and what parsed ones ask for. Knows argparse, and no framework.

Example:
    >>> args = add_arguments(argparse.ArgumentParser()).parse_args(["--ssdtrain-dir", "/mnt/nvme/{local_rank}"])
    >>> directories, policy = asked_for(args)
"""

from __future__ import annotations

import argparse
import functools
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import TypeAdapter, ValidationError

from ssdtrain.policy import ActivationPolicy

__all__ = ["add_arguments", "asked_for"]

_PREFIX = "ssdtrain_"


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds `--ssdtrain-dir` and one option per field of `ActivationPolicy`; for Megatron-LM's `extra_args_provider`.

    Without `--ssdtrain-dir` nothing is offloaded. Options not given keep the policy's defaults.

    Returns:
        The same parser.

    Example:
        >>> args = add_arguments(argparse.ArgumentParser()).parse_args(["--ssdtrain-dir", "/mnt/nvme"])
    """
    group = parser.add_argument_group("ssdtrain", "saved activations on NVMe drives")
    group.add_argument(
        "--ssdtrain-dir",
        nargs="+",
        metavar="DIR",
        help="where spill files go, on a fast local drive; several, or one text with : between them, are striped; "
        "{rank} and {local_rank} are replaced",
    )
    for name, field in ActivationPolicy.model_fields.items():
        option = f"--ssdtrain-{name.replace('_', '-')}"
        text = " ".join((field.description or "").replace("``", "").replace("%", "%%").split())
        if field.annotation is bool:
            group.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            accepted = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is Literal else None
            kind = _checked(name, TypeAdapter(_annotated(field.annotation, field.metadata)))
            group.add_argument(option, type=kind, choices=accepted, default=None, help=text)
    return parser


def _annotated(kind: Any, metadata: Sequence[Any]) -> Any:
    """What the policy's field was declared as."""
    return functools.reduce(lambda inner, extra: Annotated[inner, extra], metadata, kind)


def _checked(name: str, adapter: TypeAdapter[Any]) -> Callable[[str], Any]:
    """What argparse calls for one option: the policy's own check of that field."""

    def check(text: str) -> Any:
        try:
            return adapter.validate_python(text)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(f"{name}: {error.errors()[0]['msg']}, got {text!r}") from error

    return check


def asked_for(args: object) -> tuple[Sequence[str], ActivationPolicy] | None:
    """The directories and the policy that parsed arguments ask for; None when they ask for nothing."""
    if not hasattr(args, _PREFIX + "dir"):
        raise ValueError("Expected args with the --ssdtrain options, got none; parse them with add_arguments")
    names = [name for name in ActivationPolicy.model_fields if getattr(args, _PREFIX + name, None) is not None]
    directories = getattr(args, _PREFIX + "dir")
    policy = ActivationPolicy.of({name: getattr(args, _PREFIX + name) for name in names})
    if directories is None and any(name != "enabled" for name in names):
        given = ", ".join(f"--ssdtrain-{name.replace('_', '-')}" for name in names)
        raise ValueError(f"Expected --ssdtrain-dir beside {given}, got none; say where the spill files go")
    if directories is None or not policy.enabled:
        return None
    return ([directories] if isinstance(directories, str) else directories), policy
