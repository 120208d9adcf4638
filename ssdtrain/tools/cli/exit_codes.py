"""How commands end: one line on stderr and an exit code."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import typer
from pydantic import ValidationError


def one_line(error: ValueError | OSError) -> str:
    """The message without what surrounds it."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(map(_of_field, error.errors()))


def _of_field(item: Any) -> str:
    """Pydantic's own texts leave out what came."""
    text = item["msg"].removeprefix("Value error, ")
    return ": ".join([*map(str, item["loc"]), text if "got " in text else f"{text}, got {item['input']!r}"])


def end(command: str, code: int, message: str) -> NoReturn:
    """Says why and ends."""
    print(f"ssdtrain {command}: {message}", file=sys.stderr)
    raise typer.Exit(code)
