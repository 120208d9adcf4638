"""The page: one HTML file with its figures, styles and scripts inside; nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ssdtrain.report.page_parts import SCRIPT, STYLE
from ssdtrain.report.tables import as_tree, table
from ssdtrain.report.words import daily_text, seconds_text, share_text
from ssdtrain.stats import nbytes_text

_WHY = {"first": "one of the first", "sample": "a typical one", "worst": "the slowest"}


def render(described: Mapping[str, Any]) -> str:
    """The page for what `describe` returned.

    Raises:
        ImportError: bokeh, which draws the figures, is not installed.
    """
    try:
        from bokeh.embed import components
        from bokeh.resources import Resources

        from ssdtrain.report import figures
    except ImportError as error:
        raise ImportError(
            f'Expected bokeh for a report page, got: {error}. pip install "ssdtrain[report]", or use --json'
        ) from error
    steps = described["steps"]
    plots = {
        "peak": figures.peak_figure(steps),
        "seconds": figures.seconds_figure(steps),
        "bandwidth": figures.bandwidth_figure(steps, described["bandwidth"]),
    }
    for i, timeline in enumerate(described["timelines"]):
        shared = figures.time_range(timeline)
        plots |= {
            f"memory{i}": figures.memory_figure(timeline, shared),
            f"residency{i}": figures.residency_figure(timeline, shared),
            f"timeline{i}": figures.timeline_figure(timeline, shared),
        }
    script, drawings = components(plots)
    divs = {name: drawing + _legend(plots[name].tags) for name, drawing in drawings.items()}
    library = Resources(mode="inline", components=["bokeh"]).render_js()
    return _document(described, divs, library + script)


def _document(described: Mapping[str, Any], divs: Mapping[str, str], scripts: str) -> str:
    body = "\n".join(
        [
            _top(described),
            *[
                _step_section(timeline, {name: divs[f"{name}{i}"] for name in ("memory", "timeline", "residency")}, i)
                for i, timeline in enumerate(described["timelines"])
            ],
            _run_section(described, divs),
            _bandwidth_section(described["bandwidth"], divs),
            _modules_section(described["modules"]),
            _memory_section(described["memory"]),
            _kept_section(described),
            _wear_section(described["wear"]),
            _environment_section(described),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>ssdtrain report</title><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main>\n"
        f"{scripts}\n<script>{SCRIPT}</script></body></html>\n"
    )


def _top(described: Mapping[str, Any]) -> str:
    summary = described["summary"]
    gain, *rest = described["headline"]
    cards = [
        (f"peak of the run, in step {summary['peak_step']}", nbytes_text(summary["peak_nbytes"])),
        ("the same without ssdtrain", nbytes_text(summary["without_nbytes"])),
        ("of that peak saved", share_text(max(0.0, summary["saved_share"]))),
        ("peak of a typical step", nbytes_text(summary["typical_peak_nbytes"])),
        ("time spent waiting", share_text(summary["stall_share"])),
        ("typical step", seconds_text(summary["typical_seconds"])),
        ("slowest step", seconds_text(summary["worst_seconds"])),
    ]
    shown = "".join(f"<div class=card><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in cards)
    notes = "".join(f"<p class=note>{escape(text)}</p>" for text in _record_notes(described))
    return (
        f"<header><p class=brand>ssdtrain report</p><h1>{escape(gain)}</h1>"
        + "".join(f"<p class=lead>{escape(text)}</p>" for text in rest)
        + f"<div class=cards>{shown}</div>{notes}"
        "<p class=caption>Saved tensors are what autograd keeps from forward for backward. Their peak is measured,"
        " staging memory included; what it would have been follows from when each was saved and released. How long a"
        " step takes without ssdtrain cannot be told from one run: compare with a run without it.</p></header>"
    )


def _record_notes(described: Mapping[str, Any]) -> Iterable[str]:
    record = described["record"]
    if not record["is_complete"]:
        yield "The run did not close its record: it was ended early or is still going on. Its last step may be missing."
    if record["num_lost_nbytes"] or record["num_damaged_blocks"]:
        yield (
            f"{record['num_lost_nbytes']} bytes at the end and {record['num_damaged_blocks']} damaged blocks of the"
            " record could not be read."
        )


def _legend(pairs: Sequence[Sequence[str]]) -> str:
    keys = "".join(f'<span><i style="background:{colour}"></i>{escape(label)}</span>' for label, colour in pairs)
    return f"<div class=legend>{keys}</div>" if pairs else ""


def _figure(div: str, title: str, caption: str) -> str:
    return f"<figure><h3>{escape(title)}</h3>{div}<figcaption>{escape(caption)}</figcaption></figure>"


def _step_section(timeline: Mapping[str, Any], divs: Mapping[str, str], index: int) -> str:
    left_out = timeline["num_omitted_records"]
    notes = f" The {left_out:,} smallest records are left out." if left_out else ""
    if not timeline["is_wall_time"]:
        notes += " With an accelerator, saves and uses are drawn when the host queued them, not when they ran."
    which = _WHY[timeline["why"]]
    took = seconds_text(timeline["seconds"])
    return (
        f"<section><h2>Inside step {timeline['step']}: {which}, {took}</h2>"
        + _figure(
            divs["memory"],
            "Memory over the step",
            "Bytes of saved tensors in memory with ssdtrain (filled) and what they would have been had everything"
            " stayed (dashed). Staging memory, which holds bytes on their way and counts in the peak above, is not"
            f" drawn.{notes}",
        )
        + _figure(
            divs["timeline"],
            "Who was busy when",
            "Copies go to and from staging memory, writes and reads to and from the drive; a stall, in red, is when"
            " training had to wait for them. Without one, moving the bytes cost no time. Point at a bar for its tensor;"
            " tools to zoom appear above.",
        )
        + _figure(
            divs["residency"],
            "Where the bytes were",
            "All bytes saved for backward, by place. Green is what the drive held so that memory need not; yellow is on"
            " its way out and pink on its way back, both still or again in memory; grey is what is too small, or was"
            " left alone for the reasons below.",
        )
        + "</section>"
    )


def _run_section(described: Mapping[str, Any], divs: Mapping[str, str]) -> str:
    plan = described["plan"]
    said = f" At the end it says: {plan}." if plan else " None was in force at the end."
    return (
        "<section><h2>Over the whole run</h2>"
        + _figure(
            divs["peak"],
            "Peak of saved tensors, step by step",
            "Measured, and what would have been without ssdtrain (dashed). The first steps send away what the drive can"
            " take; then, where steps look the same, a plan decides what leaves, and predicts the peak (dotted)."
            f"{said}",
        )
        + _figure(
            divs["seconds"],
            "Step time",
            "Measured from the beginning of one step to that of the next, and what the plan predicted (dotted); the red"
            " line is the part spent waiting for the drive: at zero, it waited for nothing.",
        )
        + "</section>"
    )


def _bandwidth_section(bandwidth: Mapping[str, float], divs: Mapping[str, str]) -> str:
    rows = [
        (
            direction,
            f"{bandwidth[f'{name}_used_gbs']:.2f} GB/s",
            f"{bandwidth[f'{name}_ceiling_gbs']:.2f} GB/s",
            share_text(bandwidth[f"{name}_busy_share"]),
        )
        for direction, name in (("writes", "write"), ("reads", "read"))
    ]
    return (
        "<section><h2>The drive</h2>"
        + _figure(
            divs["bandwidth"],
            "Bandwidth used, against the ceiling",
            "Lines are bytes moved divided by the time of the whole step; dashed lines are what the drive gave while it"
            " was busy. A line far below its ceiling means that the drive had time left; a line close to it, that a"
            " faster drive would let more leave.",
        )
        + table("Bandwidth of the drive", ("", "averaged over the run", "while busy", "share of time busy"), rows)
        + "</section>"
    )


def _modules_section(modules: Sequence[Mapping[str, Any]]) -> str:
    tree = as_tree(modules)
    rows = [
        (
            row["module"],
            f"{row['num_records']:.0f}",
            nbytes_text(row["nbytes"]),
            row["tier"],
            nbytes_text(row["disk_nbytes"]),
            nbytes_text(row["kept_nbytes"]),
            seconds_text(row["stall_seconds"]),
        )
        for _, row in tree
    ]
    hint = " Pass model=... to offload_activations to see modules by name." if len(rows) == 1 else ""
    head = ("module", "tensors", "size", "tier", "to the drive", "kept in memory", "waited")
    return (
        f"<section><h2>By module</h2><p class=caption>What each module saved in a step, where it went, and how"
        f" long backward waited for it: averages over the run. A row that ends in .* is the total of all inside.{hint}"
        "</p>" + table("Saved tensors by module", head, rows, [depth for depth, _ in tree]) + "</section>"
    )


def _memory_section(memory: Mapping[str, int]) -> str:
    rows = [
        ("saved tensors and our buffers", nbytes_text(memory["peak_memory_nbytes"])),
        ("the process, resident", nbytes_text(memory["peak_process_nbytes"])),
    ]
    if memory["peak_reserved_nbytes"]:
        rows += [
            ("the device's allocator, in use", nbytes_text(memory["peak_allocated_nbytes"])),
            ("the device's allocator, reserved", nbytes_text(memory["peak_reserved_nbytes"])),
        ]
    return (
        "<section><h2>Memory in all</h2><p class=caption>Peaks over the run, weights and optimizer state included"
        " where the system or PyTorch reports them. Zero where a record was made before they were.</p>"
        + table("Peaks of memory", None, rows)
        + "</section>"
    )


def _kept_section(described: Mapping[str, Any]) -> str:
    rows = [(row["reason"], f"{row['count']:.1f}", nbytes_text(row["nbytes"])) for row in described["kept"]]
    fallbacks = "".join(f"<li>{escape(text)}</li>" for text in described["fallbacks"])
    return (
        "<section><h2>What stayed, and why</h2><p class=caption>Saved tensors that stayed in memory, per step, by"
        " reason. Weights are in memory anyway and cost nothing.</p>"
        + table("What stayed in memory", ("reason", "tensors", "size"), rows)
        + "<h3>Fallbacks</h3><p class=caption>Where something was done the second-best way, and why.</p>"
        + (f"<ul>{fallbacks}</ul>" if fallbacks else "<p>None: everything went the best way this machine has.</p>")
        + "</section>"
    )


def _wear_section(wear: Mapping[str, Any]) -> str:
    life = f"{wear['life_years']:.1f} years" if wear["life_years"] is not None else "endurance_tbw was not given"
    rows = [
        ("written in this run", nbytes_text(wear["written_nbytes"])),
        ("written per step", nbytes_text(wear["written_nbytes_per_step"])),
        ("written per day of such steps", daily_text(wear["written_nbytes_per_day"])),
        ("the drive would last", life),
    ]
    return (
        "<section><h2>Drive wear</h2><p class=caption>What training day and night at the pace of the later half of"
        " this run takes of a drive's rated endurance.</p>" + table("Drive wear", None, rows) + "</section>"
    )


def _environment_section(described: Mapping[str, Any]) -> str:
    environment, engine = described["environment"], described["engine"]
    names = (("began", "began"), ("host", "host"), ("command", "command"), ("commit", "commit"))
    rows = [
        *[(words, environment[name]) for name, words in names if environment.get(name)],
        ("engine", f"{engine['name']}: {engine['reason']}"),
        ("system", environment["system"]),
        ("processor", f"{environment['processor']}, {environment['num_cpus']} CPUs"),
        ("memory", nbytes_text(environment["memory_nbytes"])),
        ("accelerators", ", ".join(environment["accelerators"]) or "none in use"),
        ("python", environment["python"]),
        *environment["packages"].items(),
        ("rank", f"{environment['rank']} of {environment['world_size']}"),
        *[("directory", f"{each['path']} ({nbytes_text(each['nbytes'])})") for each in environment["directories"]],
    ]
    policy = [(name, str(value)) for name, value in described["policy"].items()]
    return (
        "<section><h2>Environment</h2><p class=caption>On what, and with which settings, this was measured.</p>"
        + table("Environment", None, rows)
        + "<details><summary>Policy</summary>"
        + table("Policy", None, policy)
        + "</details></section>"
    )
