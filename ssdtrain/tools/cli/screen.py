"""What commands print: fitted to a terminal, and one line per line where somebody else reads it."""

from __future__ import annotations

import sys

from rich.console import Console, RenderableType

_UNWRAPPED = 10_000


def show(*parts: RenderableType) -> None:
    """Prints to stdout. Into a pipe or a file nothing is wrapped, and no line ends in spaces."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _UNWRAPPED)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    for line in captured.get().splitlines():
        print(line.rstrip())
