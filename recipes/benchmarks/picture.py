"""The comparison as a picture: peak memory and step time of every method against plain, one panel per model, as SVG.

Written by hand so that the same data give the same bytes. Down and left is better.
"""

from __future__ import annotations

import math
from typing import Any

PANEL_WIDTH, PANEL_HEIGHT, MARGIN, LEGEND_ROW, LEGEND_WIDTH = 230, 190, 46, 20, 180
COLOURS = ("#7f7f7f", "#8c564b", "#9467bd", "#1f77b4", "#2ca02c", "#d62728", "#ff7f0e", "#17becf", "#bcbd22")
STYLE = (
    "<style>text{font:11px sans-serif;fill:#222}.axis{stroke:#888}.grid{stroke:#8884;stroke-dasharray:2}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>"
)


def compare_picture(result: dict[str, Any]) -> str:
    """One SVG for all models of a comparison."""
    models = result["models"]
    methods = [row["method"] for row in next(iter(models.values())) if "unavailable" not in row]
    colours = dict(zip(methods, COLOURS, strict=False))
    points = [row for rows in models.values() for row in rows if "unavailable" not in row]
    right = math.ceil(10 * max(1.1, *[row["step_ratio"] for row in points])) / 10
    left = math.floor(10 * min(0.9, *[row["step_ratio"] for row in points])) / 10
    top = math.ceil(10 * max(1.1, *[row["peak_ratio"] for row in points])) / 10
    bounds = (left, right, top)
    panels = [_panel(name, models[name], colours, bounds, i * (PANEL_WIDTH + 12)) for i, name in enumerate(models)]
    width = len(models) * (PANEL_WIDTH + 12)
    columns = max(1, (width - MARGIN) // LEGEND_WIDTH)
    rows = -(-len(methods) // columns)
    legend = [_legend(divmod(i, columns), method, colours[method]) for i, method in enumerate(methods)]
    height = PANEL_HEIGHT + rows * LEGEND_ROW + 14
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return "\n".join([head, STYLE, *panels, *legend, "</svg>"]) + "\n"


def _panel(
    name: str, rows: list[dict[str, Any]], colours: dict[str, str], bounds: tuple[float, float, float], x: int
) -> str:
    left, right, top = bounds
    wide, high = PANEL_WIDTH - MARGIN - 8, PANEL_HEIGHT - MARGIN - 20

    def place(step_ratio: float, peak_ratio: float) -> tuple[float, float]:
        return x + MARGIN + wide * (step_ratio - left) / (right - left), 20 + high * (1 - peak_ratio / top)

    lines = [f'<text x="{x + MARGIN}" y="13" font-weight="bold">{name}</text>']
    for peak in (0.0, 0.5, 1.0):
        y = place(left, peak)[1]
        lines.append(f'<line class="grid" x1="{x + MARGIN}" x2="{x + MARGIN + wide}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{x + MARGIN - 5}" y="{y + 4:.1f}" text-anchor="end">{peak:.0%}</text>')
    for step in sorted({left, 1.0, right}):
        spot = place(step, 0)[0]
        lines.append(f'<line class="grid" x1="{spot:.1f}" x2="{spot:.1f}" y1="20" y2="{20 + high}"/>')
        lines.append(f'<text x="{spot:.1f}" y="{34 + high}" text-anchor="middle">x {step:g}</text>')
    lines.append(f'<text x="{x + MARGIN + wide / 2}" y="{48 + high}" text-anchor="middle">step time</text>')
    turned = f'transform="translate({x + 10} {20 + high / 2}) rotate(-90)"'
    lines.append(f'<text {turned} text-anchor="middle">peak memory</text>')
    for row in rows:
        if "unavailable" not in row:
            cx, cy = place(row["step_ratio"], row["peak_ratio"])
            title = f"{row['method']}: peak {row['peak_ratio']:.0%}, step x {row['step_ratio']:.2f}"
            mark = f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="5" fill="{colours[row["method"]]}">'
            lines.append(f"{mark}<title>{title}</title></circle>")
    return "\n".join(lines)


def _legend(place: tuple[int, int], method: str, colour: str) -> str:
    x, y = MARGIN + place[1] * LEGEND_WIDTH, PANEL_HEIGHT + 14 + place[0] * LEGEND_ROW
    return f'<circle cx="{x}" cy="{y - 4}" r="5" fill="{colour}"/><text x="{x + 10}" y="{y}">{method}</text>'
