"""Sizes as users write them, and as they are shown."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated

from pydantic import BeforeValidator

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power, _letter: 1024**_power}

MAX_NBYTES = 1 << 63
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")
_MAX_DIGITS = 19  # of a number below `MAX_NBYTES`
_MAX_SHOWN = 80


def parse_nbytes(value: object) -> object:
    """Turns ``"16MiB"``, ``"1.5 GB"`` or a whole number into bytes; anything else goes on to pydantic.

    Raises:
        ValueError: a text that is not a size, or a size that no file or memory can have.
    """
    if isinstance(value, bool | bytes | bytearray):
        raise ValueError(f"Expected a size such as 1048576 or '16MiB', got {value!r}")
    if isinstance(value, str):
        value = _nbytes_of(value)
    if isinstance(value, int | float) and abs(value) >= MAX_NBYTES:
        got = f"{value:.3g} bytes" if isinstance(value, float) else f"a number of {value.bit_length()} bits"
        raise ValueError(f"Expected a size below 8EiB (2**63 bytes), got {got}")
    return value


def _nbytes_of(text: str) -> int:
    """Exactly, rounded down to whole bytes."""
    match = _SIZE.fullmatch(text)
    factor = _UNITS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        shown = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
        raise ValueError(f"Expected a size such as 1048576, '64KiB', '16MiB' or '1.5GB', got {shown!r}")
    whole, _, fraction = match[1].partition(".")
    if len(whole.lstrip("0")) > _MAX_DIGITS:
        raise ValueError(f"Expected a size below 8EiB (2**63 bytes), got one of {len(whole)} digits")
    return int(Decimal(f"{whole}.{fraction[:_MAX_DIGITS]}") * factor)


Nbytes = Annotated[int, BeforeValidator(parse_nbytes)]


Size = int | str
"""As users give it: bytes, or a text such as ``"16MiB"``."""


def size_text(nbytes: int) -> str:
    """The shortest text that is exactly this size: ``"900GiB"``."""
    power = next(power for power in (4, 3, 2, 1, 0) if nbytes % 1024**power == 0) if nbytes else 0
    return f"{nbytes // 1024**power}{'KMGT'[power - 1]}iB" if power else str(nbytes)
