"""What README and docs say of a GPU: tables of what `gpu.sh` left in `results/gpu/`, or that there is none yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GIB = 1 << 30
NONE = "**No part of this has run on a real GPU yet**; figures will stand here when it has.\n"


def results_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Results of `gpu.py` by their names."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def gpu_summary(results: dict[str, dict[str, Any]]) -> str:
    """Ours beside plain, of every run, as Markdown."""
    if not results:
        return NONE
    lines = [_machine(results), "", "| | step time | activations | of what the way allows | equal to the bit |"]
    lines.append("|---|---|---|---|---|")
    for result in results.values():
        for row in result["rows"]:
            if row["variant"].startswith("ssdtrain") and "step_seconds" in row:
                cells = (f"x {row['step_time_ratio']:.3f}", _activations(row), _bound(row), _verdict(row))
                lines.append(f"| {row['variant']}, width {result['sizes']['hidden']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def gpu_section(results: dict[str, dict[str, Any]]) -> str:
    """Everything that was measured, as Markdown."""
    if not results:
        return NONE
    lines = [_machine(results)]
    for name, result in results.items():
        lines += ["", _what(name, result), ""]
        lines.append("| | step | against plain | activations | peak | of what the way allows | equal to the bit |")
        lines.append("|---|---|---|---|---|---|---|")
        lines += [_line(row) for row in result["rows"]]
    return "\n".join(lines) + "\n"


def _machine(results: dict[str, dict[str, Any]]) -> str:
    machine = next(iter(results.values()))["machine"]
    return (
        f"Measured by `recipes/benchmarks/gpu.sh` on one {machine['device']}, {machine['cores']} cores, Linux"
        f" {machine['kernel']}; torch {machine['torch']}, CUDA {machine['cuda']}, Python {machine['python']}, ssdtrain"
        f" {machine['ssdtrain']}. Activations are peaks without weights and gradients, against plain:"
    )


def _what(name: str, result: dict[str, Any]) -> str:
    sizes, bounds = result["sizes"], result["bounds"]
    rates = [
        f"{what} {way['out']:.1f} GB/s out, {way['in']:.1f} in"
        for what, way in (("link", result["link_gbs"]), ("drive", result["drive_gbs"]))
        if way
    ]
    allowed = ""
    if bounds:
        allowed = (
            f"; hiding all needs {bounds['needed_gbs']:.1f} GB/s, the way allows to hide"
            f" {bounds['hidden_fraction']:.0%}"
        )
    part = "" if result["is_complete"] else "; ended early"
    return (
        f"`{name}`: {sizes['layers']} blocks, width {sizes['hidden']}, {sizes['batch']} x {sizes['sequence']} tokens,"
        f" {result['saved_nbytes'] / GIB:.1f} GiB saved; {', '.join(rates) or 'no link'}{allowed}{part}:"
    )


def _line(row: dict[str, Any]) -> str:
    if "step_seconds" not in row:
        return f"| {row['variant']} | left out: {row['left_out']} | | | | | |"
    cells = (
        f"{row['step_seconds']:.3f} s",
        f"x {row['step_time_ratio']:.3f}",
        _activations(row),
        f"{row['peak_nbytes'] / GIB:.1f} GiB",
        _bound(row),
        _verdict(row),
    )
    return f"| {row['variant']} | {' | '.join(cells)} |"


def _activations(row: dict[str, Any]) -> str:
    share = row["activations_against_plain"]
    return "not measured" if share is None else f"{row['activation_nbytes'] / GIB:.2f} GiB, {share - 1:+.0%}"


def _bound(row: dict[str, Any]) -> str:
    return f"{row['fraction_of_bound']:.0%}" if "fraction_of_bound" in row else ""


def _verdict(row: dict[str, Any]) -> str:
    return {True: "yes", False: "NO", None: "not compared"}[row["is_equal"]]
