"""Results as pictures: peak memory and step time of every method, and the curve from keep to recompute, as SVG.

Written by hand so that the same data give the same bytes. Down and left is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PANEL_WIDTH, PANEL_HEIGHT, MARGIN, LEGEND_ROW, LEGEND_WIDTH = 230, 190, 46, 20, 180
CURVE_WIDTH, CURVE_HEIGHT = 560, 300
COLOURS = (
    "#7f7f7f", "#8c564b", "#9467bd", "#e377c2", "#1f77b4", "#2ca02c", "#d62728", "#ff7f0e", "#17becf", "#bcbd22",
)  # fmt: skip
BRANCHES = {"plain": "#7f7f7f", "offload": "#1f77b4", "mix": "#2ca02c", "recompute": "#d62728"}
STYLE = (
    "<style>text{font:11px sans-serif;fill:#222}.axis{stroke:#888}.grid{stroke:#8884;stroke-dasharray:2}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>"
)


@dataclass(frozen=True)
class Axis:
    """One direction of a panel."""

    label: str
    low: float
    high: float
    ticks: dict[float, str]
    """What is written where."""

    def share(self, value: float) -> float:
        """Where `value` is, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)


def memory_axis(rows: Sequence[dict[str, Any]]) -> Axis:
    """Peak memory against plain."""
    high = math.ceil(10 * max(1.1, *[row["peak_ratio"] for row in rows])) / 10
    return Axis("peak memory", 0.0, high, {0.0: "0%", 0.5: "50%", 1.0: "100%"})


def time_axis(rows: Sequence[dict[str, Any]]) -> Axis:
    """Step time against plain."""
    low = math.floor(10 * min(0.9, *[row["step_ratio"] for row in rows])) / 10
    high = math.ceil(10 * max(1.1, *[row["step_ratio"] for row in rows])) / 10
    return Axis("step time", low, high, {value: f"x {value:g}" for value in sorted({low, 1.0, high})})


@dataclass(frozen=True)
class Panel:
    """Where one diagram is and what its directions mean."""

    title: str
    across: Axis
    up: Axis
    left: float
    width: float
    height: float

    def spot(self, across: float, up: float) -> tuple[float, float]:
        """Where a point is drawn."""
        wide, high = self.width - MARGIN - 8, self.height - MARGIN - 20
        return self.left + MARGIN + wide * self.across.share(across), 20 + high * (1 - self.up.share(up))

    def frame(self) -> list[str]:
        """Title, grid and labels."""
        left, bottom = self.spot(self.across.low, self.up.low)
        right, top = self.spot(self.across.high, self.up.high)
        lines = [f'<text x="{left:g}" y="13" font-weight="bold">{self.title}</text>']
        for value, text in self.up.ticks.items():
            y = self.spot(self.across.low, value)[1]
            lines.append(f'<line class="grid" x1="{left:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
            lines.append(f'<text x="{left - 5:g}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        for value, text in self.across.ticks.items():
            x = self.spot(value, self.up.low)[0]
            lines.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top:g}" y2="{bottom:g}"/>')
            lines.append(f'<text x="{x:.1f}" y="{bottom + 14:g}" text-anchor="middle">{text}</text>')
        lines.append(
            f'<text x="{(left + right) / 2:g}" y="{bottom + 28:g}" text-anchor="middle">{self.across.label}</text>'
        )
        turned = f'transform="translate({self.left + 10:g} {(top + bottom) / 2:g}) rotate(-90)"'
        return [*lines, f'<text {turned} text-anchor="middle">{self.up.label}</text>']


def compare_picture(result: dict[str, Any]) -> str:
    """One SVG for all models of a comparison."""
    models = {name: _able(rows) for name, rows in result["models"].items()}
    colours = dict(zip([row["method"] for row in next(iter(models.values()))], COLOURS, strict=False))
    rows = [row for own in models.values() for row in own]
    across, up = time_axis(rows), memory_axis(rows)
    drawn = []
    for i, (name, own) in enumerate(models.items()):
        panel = Panel(name, across, up, i * (PANEL_WIDTH + 12), PANEL_WIDTH, PANEL_HEIGHT)
        points = [_point(panel.spot(row["step_ratio"], row["peak_ratio"]), row, colours[row["method"]]) for row in own]
        drawn += [*panel.frame(), *points]
    return _picture(len(models) * (PANEL_WIDTH + 12), PANEL_HEIGHT, drawn, colours)


def curve_picture(result: dict[str, Any]) -> str:
    """One SVG: a line per branch, from the least memory to the most; what a budget asks for ends where all stays."""
    rows = _able(result["points"])
    panel = Panel(result["model"], memory_axis(rows), time_axis(rows), 0, CURVE_WIDTH, CURVE_HEIGHT)
    drawn = panel.frame()
    for branch, colour in BRANCHES.items():
        on_it = (branch, "plain") if branch in ("offload", "mix") else (branch,)
        own = sorted((row for row in rows if row["branch"] in on_it), key=lambda row: row["peak_ratio"])
        spots = [panel.spot(row["peak_ratio"], row["step_ratio"]) for row in own]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        drawn += [_point(spot, row, BRANCHES[row["branch"]]) for spot, row in zip(spots, own, strict=True)]
    return _picture(CURVE_WIDTH, CURVE_HEIGHT, drawn, BRANCHES)


def _able(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "unavailable" not in row]


def _picture(width: int, height: int, drawn: list[str], colours: dict[str, str]) -> str:
    columns = max(1, (width - MARGIN) // LEGEND_WIDTH)
    legend = [_legend(divmod(i, columns), *item, height + 14) for i, item in enumerate(colours.items())]
    height += -(-len(colours) // columns) * LEGEND_ROW + 14
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return "\n".join([head, STYLE, *drawn, *legend, "</svg>"]) + "\n"


def _point(spot: tuple[float, float], row: dict[str, Any], colour: str) -> str:
    title = f"{row['method']}: peak {row['peak_ratio']:.0%}, step x {row['step_ratio']:.2f}"
    return f'<circle cx="{spot[0]:.1f}" cy="{spot[1]:.1f}" r="5" fill="{colour}"><title>{title}</title></circle>'


def _legend(place: tuple[int, int], name: str, colour: str, top: int) -> str:
    x, y = MARGIN + place[1] * LEGEND_WIDTH, top + place[0] * LEGEND_ROW
    return f'<circle cx="{x}" cy="{y - 4}" r="5" fill="{colour}"/><text x="{x + 10}" y="{y}">{name}</text>'
