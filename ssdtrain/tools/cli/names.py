"""Names of options: former ones are still understood, and errors speak of options instead of fields."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import typer
from typer.core import TyperCommand

from ssdtrain.policy import parse_nbytes
from ssdtrain.stats import nbytes_text

_FORMER = MappingProxyType(
    {
        "plan": {"--hidden": "--width", "--seq": "--sequence", "--trace": "--record"},
    }
)


class Command(TyperCommand):
    """Also takes the names that options had in earlier versions, which `--help` does not show."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Replaces former names."""
        return super().parse_args(ctx, [_now(argument, _FORMER.get(self.name or "", {})) for argument in args])


def _now(argument: str, former: Mapping[str, str]) -> str:
    name, equals, value = argument.partition("=")
    return former.get(name, name) + equals + value


def given(ctx: typer.Context, names: Sequence[str]) -> list[str]:
    """Those options among parameters `names` that the user has set, as written: ``--drive-gbs``."""
    sources = [(name, ctx.get_parameter_source(name)) for name in names]
    return [f"--{name.replace('_', '-')}" for name, source in sources if source and source.name != "DEFAULT"]


def only_with(ctx: typer.Context, needed: str, names: Sequence[str]) -> None:
    """Refuses options that mean nothing without another one.

    Raises:
        ValueError: one is given although `needed` is not.
    """
    alone = given(ctx, names)
    if alone and not given(ctx, [needed]):
        raise ValueError(f"Expected --{needed.replace('_', '-')} with {alone[0]}, which means nothing without it")


def not_with(ctx: typer.Context, other: str, names: Sequence[str]) -> None:
    """Refuses options that another one makes meaningless.

    Raises:
        ValueError: one is given beside `other`.
    """
    both = given(ctx, names)
    if both and given(ctx, [other]):
        raise ValueError(f"Expected --{other.replace('_', '-')} or {both[0]}, got both: the first one decides it")


def nbytes_of(option: str, text: str, at_least: int = 1) -> int:
    """The size that an option was given.

    Raises:
        ValueError: it is none, or less.
    """
    try:
        nbytes = parse_nbytes(text)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
    if not isinstance(nbytes, int) or nbytes < at_least:
        raise ValueError(
            f"Expected a size of at least {nbytes_text(at_least)} for {option}, got {text!r}; with no unit it is bytes"
        )
    return nbytes


def in_options(message: str, options: Mapping[str, str]) -> str:
    """A message with options in the place of fields: `options` has the option of each field."""
    if not options:
        return message
    return re.sub(rf"(?<![\w-])({'|'.join(map(re.escape, options))})(?!\w)", lambda found: options[found[1]], message)
