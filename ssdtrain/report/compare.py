"""Two runs side by side: what was measured, and in what they differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from ssdtrain.report.page_parts import STYLE
from ssdtrain.report.tables import table
from ssdtrain.report.words import seconds_text, share_text
from ssdtrain.stats import nbytes_text

HEAD = ("", "first", "second", "change")
_MEASURED: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("peak of the run", "summary", "peak_nbytes", nbytes_text),
    ("the same without ssdtrain", "summary", "without_nbytes", nbytes_text),
    ("peak of a typical step", "summary", "typical_peak_nbytes", nbytes_text),
    ("typical step", "summary", "typical_seconds", seconds_text),
    ("slowest step", "summary", "worst_seconds", seconds_text),
    ("time spent waiting", "summary", "stall_share", share_text),
    ("written per step", "wear", "written_nbytes_per_step", nbytes_text),
    ("peak of the process", "memory", "peak_process_nbytes", nbytes_text),
    ("peak of the device's allocator", "memory", "peak_allocated_nbytes", nbytes_text),
)


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of what `describe` returned for each: measurements first, then settings and versions that differ."""
    rows = []
    for name, part, field, text in _MEASURED:
        before, after = first[part][field], second[part][field]
        if before or after:
            rows.append((name, text(before), text(after), f"{100 * (after / before - 1):+.1f} %" if before else ""))
    one, other = _settings(first), _settings(second)
    differ = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    return rows + [(name, one.get(name, ""), other.get(name, ""), "") for name in differ]


def _settings(described: Mapping[str, Any]) -> dict[str, str]:
    environment = described["environment"]
    told = {name: str(environment[name]) for name in ("began", "host", "command", "commit") if environment.get(name)}
    told |= {"engine": described["engine"]["name"]}
    told |= {f"version of {name}": version for name, version in environment.get("packages", {}).items()}
    return told | {name: str(value) for name, value in described["policy"].items() if name != "record"}


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Columns for a terminal or a file."""
    lines = [HEAD, *rows]
    widths = [max([len(line[i]) for line in lines]) for i in range(len(HEAD))]
    padded = ["  ".join([cell.ljust(width) for cell, width in zip(line, widths, strict=True)]) for line in lines]
    return "\n".join([line.rstrip() for line in padded])


def page(rows: Sequence[Sequence[str]], names: Sequence[str]) -> str:
    """The same as one HTML file."""
    head = ("", *names, "change")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>ssdtrain: two runs</title><style>{STYLE}</style></head>\n<body><main>\n"
        f"<header><p class=brand>ssdtrain report</p><h1>{escape(' beside '.join(names))}</h1></header>"
        f"<div class=beside>{table('Two runs side by side', head, rows)}</div>\n</main></body></html>\n"
    )
