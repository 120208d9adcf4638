"""How commands end: one line on stderr and an exit code."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer
from pydantic import ValidationError


def one_line(error: ValueError | OSError) -> str:
    """The message without what surrounds it."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(
        ": ".join([*map(str, item["loc"]), item["msg"].removeprefix("Value error, ")]) for item in error.errors()
    )


def end(command: str, code: int, message: str) -> NoReturn:
    """Says why and ends."""
    print(f"ssdtrain {command}: {message}", file=sys.stderr)
    raise typer.Exit(code)
