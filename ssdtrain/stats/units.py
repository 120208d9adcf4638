"""Sizes and rates for a human."""

from __future__ import annotations


def nbytes_text(nbytes: float) -> str:
    """``"1.5 GiB"`` for a human."""
    for unit in ("B", "KiB", "MiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def rate_text(nbytes: int, seconds: float) -> str:
    """``"1.5 GiB at 2.10 GB/s"``."""
    rate = f" at {nbytes / seconds / 1e9:.2f} GB/s" if seconds > 0 else ""
    return nbytes_text(nbytes) + rate
