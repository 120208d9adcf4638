"""The figures of the page, made with bokeh. Colours that depend on light or dark are set on the page itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bokeh.models import ColumnDataSource, HoverTool, NumeralTickFormatter, Range1d, Span
from bokeh.plotting import figure

from ssdtrain.report.timeline import LANES, RESIDENCIES, Bar, levelled

_MIB = 1 << 20
_IN_STEP = "time since the step began, ms"
COLOURS = {
    "with ssdtrain": "#2f7ed8",
    "without": "#e08a1e",
    "predicted": "#8a63d2",
    "left alone": "#9aa4b1",
    "in memory": "#2f7ed8",
    "leaving": "#e0b01e",
    "in host memory": "#8a63d2",
    "on the drive": "#3f9d6b",
    "coming back": "#d8608a",
    "forward": "#2f7ed8",
    "backward": "#5b6bd6",
    "copies": "#e0b01e",
    "writes": "#e08a1e",
    "reads": "#3f9d6b",
    "stalls": "#d8433b",
}
_MAX_MARKED = 60  # steps: of more, points would be a band
_TOOLS = "xpan,xbox_zoom,xwheel_zoom,reset,save"


def time_range(timeline: Mapping[str, Any]) -> Any:
    """The x axis that all figures of one step share, so that they are zoomed together."""
    end = max([*timeline["memory"]["at"], *[bar["end"] for bar in timeline["bars"]]], default=1) / 1e3
    return Range1d(-0.01 * end, 1.01 * end, bounds="auto")


def _figure(x_label: str, y_label: str, height: int = 300, **options: Any) -> Any:
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        tools=_TOOLS,
        active_drag=None,  # on a phone a drag scrolls the page
        x_axis_label=x_label,
        y_axis_label=y_label,
        toolbar_location="above",
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_alpha=0,
        **options,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    return plot


def _legend(plot: Any, names: Sequence[tuple[str, str]]) -> None:
    """Labels and colours; the page shows them below, where they wrap on a phone."""
    plot.tags = [list(pair) for pair in names]


def _hover(plot: Any, tips: list[tuple[str, str]], renderers: list[Any], mode: str = "mouse") -> None:
    plot.add_tools(HoverTool(tooltips=tips, renderers=renderers, mode=mode))


def memory_figure(timeline: Mapping[str, Any], x_range: Any) -> Any:
    """Saved tensors in memory over one step, with and without."""
    columns = timeline["memory"]
    source = ColumnDataSource(
        {
            "ms": [at / 1e3 for at in columns["at"]],
            "with": [value / _MIB for value in columns["with ssdtrain"]],
            "without": [value / _MIB for value in columns["without"]],
        }
    )
    plot = _figure(_IN_STEP, "saved tensors, MiB", x_range=x_range)
    plot.y_range.start = 0
    plot.varea_step(
        x="ms", y1=0, y2="with", source=source, color=COLOURS["with ssdtrain"], alpha=0.2, step_mode="after"
    )
    style = {"x": "ms", "source": source, "mode": "after", "line_width": 2}
    ours = plot.step(y="with", color=COLOURS["with ssdtrain"], **style)
    plot.step(y="without", color=COLOURS["without"], line_dash="dashed", **style)
    _legend(plot, [("with ssdtrain", COLOURS["with ssdtrain"]), ("if everything had stayed", COLOURS["without"])])
    _hover(plot, [("at", "@ms{0.0} ms"), ("with", "@with{0.0} MiB"), ("without", "@without{0.0} MiB")], [ours], "vline")
    return plot


def residency_figure(timeline: Mapping[str, Any], x_range: Any) -> Any:
    """Bytes of saved tensors by where they are, over one step."""
    columns = timeline["residency"]
    data: dict[str, list[float]] = {"ms": [at / 1e3 for at in columns["at"]]}
    below = [0.0] * len(columns["at"])
    used = [name for name in RESIDENCIES if any(columns[name])]
    for name in used:
        data[f"{name} from"] = below
        below = [under + value / _MIB for under, value in zip(below, columns[name], strict=True)]
        data[f"{name} to"] = below
        data[name] = [value / _MIB for value in columns[name]]
    source = ColumnDataSource(data)
    plot = _figure(_IN_STEP, "saved tensors, MiB", x_range=x_range)
    plot.y_range.start = 0
    for name in used:
        ends = {"y1": f"{name} from", "y2": f"{name} to"}
        plot.varea_step(x="ms", **ends, source=source, color=COLOURS[name], alpha=0.85, step_mode="after")
    top = plot.step(x="ms", y=f"{used[-1]} to", source=source, mode="after", alpha=0) if used else None
    _legend(plot, [(name, COLOURS[name]) for name in used])
    if top is not None:
        tips = [("at", "@ms{0.0} ms"), *[(name, f"@{{{name}}}{{0.0}} MiB") for name in reversed(used)]]
        _hover(plot, tips, [top], "vline")
    return plot


def timeline_figure(timeline: Mapping[str, Any], x_range: Any) -> Any:
    """Who was busy when, lane by lane."""
    placed = levelled([Bar(**bar) for bar in timeline["bars"]])
    depth = {lane: max([level + 1 for bar, level in placed if bar.lane == lane], default=1) for lane in LANES}
    plot = _figure(_IN_STEP, "", height=340, x_range=x_range, y_range=Range1d(len(LANES), 0))
    rows = []
    for bar, level in placed:
        height = 0.8 / depth[bar.lane]
        top = LANES.index(bar.lane) + 0.1 + level * height
        rows.append((bar, top, top + height))
    source = ColumnDataSource(
        {
            "left": [bar.begin / 1e3 for bar, _, _ in rows],
            "right": [bar.end / 1e3 for bar, _, _ in rows],
            "top": [top for _, top, _ in rows],
            "bottom": [bottom for _, _, bottom in rows],
            "colour": [COLOURS[bar.lane] for bar, _, _ in rows],
            "label": [bar.label for bar, _, _ in rows],
            "ms": [(bar.end - bar.begin) / 1e3 for bar, _, _ in rows],
            "mib": [bar.nbytes / _MIB for bar, _, _ in rows],
        }
    )
    bars = plot.quad(
        left="left", right="right", top="top", bottom="bottom", source=source, color="colour", line_width=0.5
    )
    plot.yaxis.ticker = [i + 0.5 for i in range(len(LANES))]
    plot.yaxis.major_label_overrides = {i + 0.5: lane for i, lane in enumerate(LANES)}
    plot.ygrid.grid_line_alpha = 0
    tips = [("", "@label"), ("from", "@left{0.00} ms"), ("took", "@ms{0.00} ms"), ("size", "@mib{0.0} MiB")]
    _hover(plot, tips, [bars])
    return plot


def _per_step(
    steps: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, float, str, str]], y_label: str
) -> Any:
    """Lines over the steps; `columns`: for each label a field, what to divide it by, a colour and a dash.

    `y_label` is the quantity and, after a comma, its unit.
    """
    unit = y_label.rpartition(", ")[2]
    columns = {label: column for label, column in columns.items() if _is_known(steps, column[0])}
    data: dict[str, list[float]] = {"step": [row["step"] for row in steps]}
    for label, (name, scale, _, _) in columns.items():
        data[label] = [row[name] / scale if row[name] or not _is_known_later(name) else math.nan for row in steps]
    source = ColumnDataSource(data)
    plot = _figure("step", y_label)
    plot.y_range.start = 0
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    lines = []
    for label, (_, _, colour, dash) in columns.items():
        lines.append(plot.line("step", label, source=source, color=colour, line_dash=dash, line_width=2))
        if len(steps) <= _MAX_MARKED:
            plot.scatter("step", label, source=source, color=colour, size=5)
    _legend(plot, [(label, column[2]) for label, column in columns.items()])
    tips = [("step", "@step"), *[(label, f"@{{{label}}}{{0.00}} {unit}") for label in columns]]
    _hover(plot, tips, [lines[0]], "vline")
    return plot


def _is_known_later(name: str) -> bool:
    """Whether the first steps do not have it."""
    return name.startswith("predicted")


def _is_known(steps: Sequence[Mapping[str, Any]], name: str) -> bool:
    return not _is_known_later(name) or any(row[name] for row in steps)


def peak_figure(steps: Sequence[Mapping[str, Any]]) -> Any:
    """Peak of saved tensors per step: measured, predicted, and what would have been."""
    return _per_step(
        steps,
        {
            "measured": ("peak_nbytes", _MIB, COLOURS["with ssdtrain"], "solid"),
            "predicted by the plan": ("predicted_peak_nbytes", _MIB, COLOURS["predicted"], "dotted"),
            "if everything had stayed": ("peak_if_kept_nbytes", _MIB, COLOURS["without"], "dashed"),
        },
        "peak of saved tensors, MiB",
    )


def seconds_figure(steps: Sequence[Mapping[str, Any]]) -> Any:
    """Step time: measured, predicted, and the waiting in it."""
    return _per_step(
        steps,
        {
            "measured": ("seconds", 1e-3, COLOURS["with ssdtrain"], "solid"),
            "predicted by the plan": ("predicted_seconds", 1e-3, COLOURS["predicted"], "dotted"),
            "waiting": ("stall_seconds", 1e-3, COLOURS["stalls"], "solid"),
        },
        "step time, ms",
    )


def bandwidth_figure(steps: Sequence[Mapping[str, Any]], bandwidth: Mapping[str, float]) -> Any:
    """Bandwidth used per step, and what the drive gave while it was busy."""
    plot = _per_step(
        steps,
        {
            "writes": ("write_gbs", 1.0, COLOURS["writes"], "solid"),
            "reads": ("read_gbs", 1.0, COLOURS["reads"], "solid"),
        },
        "bandwidth, GB/s",
    )
    for direction in ("write", "read"):
        ceiling = bandwidth[f"{direction}_ceiling_gbs"]
        if ceiling:
            plot.add_layout(
                Span(
                    location=ceiling,
                    dimension="width",
                    line_color=COLOURS[f"{direction}s"],
                    line_dash="dashed",
                    line_width=1.5,
                )
            )
    highest = max([*bandwidth.values(), *[row[f"{d}_gbs"] for row in steps for d in ("write", "read")]])
    plot.y_range.end = 1.1 * highest if highest else 1
    return plot
