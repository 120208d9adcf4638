"""Tables of the page, for eyes, thumbs and screen readers; and modules as a tree with totals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_SUMMED = ("num_records", "nbytes", "kept_nbytes", "host_nbytes", "disk_nbytes", "stall_seconds")


def table(
    label: str, head: Sequence[str] | None, rows: Sequence[Sequence[str]], depths: Sequence[int] | None = None
) -> str:
    """One that scrolls by itself, by finger or keys, and whose cells are read with their row and column.

    Args:
        label: what it is called by those who do not see it.
        head: the columns; None for pairs of a name and a value.
        rows: texts, the name of the row first.
        depths: of each row, where they are a tree.
    """
    top = "".join(f"<th scope=col>{escape(text)}</th>" for text in head) if head else ""
    top = f"<thead><tr>{top}</tr></thead>" if top else ""
    lines = ""
    for i, (name, *values) in enumerate(rows):
        inset = f' style="padding-left:{depths[i]}em"' if depths and depths[i] else ""
        level = f" aria-level={depths[i] + 1}" if depths else ""
        cells = "".join(f"<td>{escape(text)}</td>" for text in values)
        shown = escape(name).replace(".", ".<wbr>") if depths else escape(name)
        lines += f"<tr{level}><th scope=row{inset}>{shown}</th>{cells}</tr>"
    kind = ("" if head else " class=pairs") + (" role=treegrid" if depths else "")
    named = f'aria-label="{escape(label)}"'
    body = f"<table{kind} {named}>{top}<tbody>{lines}</tbody></table>"
    return f"<div class=scroll role=region tabindex=0 {named}>{body}</div>"


def as_tree(modules: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    """Rows with their depth: the total of a module with several inside (``h.0.*``) stands before these.

    The largest come first on each level.
    """
    inside: dict[str, list[Mapping[str, Any]]] = {}
    for row in modules:
        parts = row["module"].split(".")
        for i in range(1, len(parts) + 1):
            inside.setdefault(".".join(parts[:i]), []).append(row)
    return _below("", inside, list(modules), 0)


def _below(
    prefix: str, inside: Mapping[str, list[Mapping[str, Any]]], rows: list[Mapping[str, Any]], depth: int
) -> list[tuple[int, Mapping[str, Any]]]:
    """The rows of one module: itself, and what is inside."""
    start, found = len(prefix), [(depth, row) for row in rows if row["module"] == prefix[:-1]]
    names = {prefix + row["module"][start:].partition(".")[0] for row in rows if row["module"].startswith(prefix)}
    for name in sorted(names, key=lambda name: -sum([row["nbytes"] for row in inside[name]])):
        own = inside[name]
        if len(own) == 1:
            found.append((depth, own[0]))
            continue
        total = {"module": f"{name}.*", "tier": "", **{each: sum([row[each] for row in own]) for each in _SUMMED}}
        found += [(depth, total), *_below(f"{name}.", inside, own, depth + 1)]
    return found
