"""Writes the tables and pictures of README and docs from the data beside this file, so that the two cannot differ.

Fresh data: `ssdtrain demo --json | tail -1 > recipes/benchmarks/results/demo.json`, and
`python recipes/benchmarks/compare.py DIR | tail -1 > recipes/benchmarks/results/compare.json`, the same for `curve`,
`engine`, `memory_cap`, `resident`, `state_cap`, `state_compare`, `throttle` and `throttle_large`; what `gpu.py` left in
the results of `gpu.sh` (`host-*.json`, `drive-*.json`) goes to `results/gpu/`; then run this file.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from gpu_tables import gpu_section, gpu_summary, results_of
from picture import compare_picture, curve_picture
from state_figures import bandwidth_of, waiting_seconds

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
PAGE = HERE.parents[1] / "docs" / "explanation" / "benchmarks.md"
GPU_PAGE = PAGE.with_name("on-a-gpu.md")
GIB, MIB = 1 << 30, 1 << 20


def demo_table(result: dict[str, Any]) -> str:
    """The demo's comparison as Markdown."""
    plain, ours = result["plain"], result["ssdtrain"]

    def memory(key: str) -> str:
        before, after = plain[key], ours[key]
        return f"{before / GIB:.2f} GiB | {after / GIB:.2f} GiB | {after / before - 1:+.1%}"

    equal = "equal to the bit" if result["losses_equal"] and result["parameters_equal"] else "NOT EQUAL"
    rows = [
        "| | plain | ssdtrain | |",
        "|---|---|---|---|",
        f"| peak of saved tensors in memory | {memory('peak_saved_nbytes')} |",
        f"| peak memory of training (RSS) | {memory('peak_rss_nbytes')} |",
        f"| step time, median | {plain['step_seconds']:.2f} s | {ours['step_seconds']:.2f} s"
        f" | x {result['step_time_ratio']:.3f} |",
        f"| losses and parameters | | | {equal} |",
        f"| written, read | | {result['written_nbytes'] / GIB:.1f} GiB, {result['read_nbytes'] / GIB:.1f} GiB"
        f" | {result['stall_seconds']:.2f} s stalled |",
    ]
    return "\n".join(rows) + "\n"


def compare_table(result: dict[str, Any]) -> str:
    """The comparison with the alternatives as Markdown: one row per method, memory and time per model."""
    models, size = result["models"], result["size"]
    rows = [
        f"Beside the alternatives (`recipes/benchmarks/compare.py`; {size['layers']} layers, width {size['width']},"
        f" batches of {size['batch']} x {size['sequence']}, {size['threads']} thread(s) of a machine with"
        f" {result['machine']['cores']} cores; peak memory of training and step time, both against plain):",
        "",
        f"| | {' | '.join(models)} | equal to the bit |",
        "|---" * (len(models) + 2) + "|",
    ]
    for i, first in enumerate(next(iter(models.values()))):
        own = [entries[i] for entries in models.values()]
        if "unavailable" in first:
            rows.append(f"| {first['method']} |{' n/a |' * len(models)} {first['unavailable']} |")
            continue
        cells = [f"{entry['peak_ratio'] - 1:+.0%}, x {entry['step_ratio']:.2f}" for entry in own]
        unequal = [model for model, entry in zip(models, own, strict=True) if not entry["is_equal"]]
        verdict = f"NO: {', '.join(unequal)}" if unequal else "yes"
        remark = f"; {first['remark']}" if "remark" in first else ""
        rows.append(f"| {first['method']} | {' | '.join(cells)} | {verdict}{remark} |")
    rows += ["", "![peak memory and step time of every method](compare.svg)"]
    return "\n".join(rows) + "\n"


def curve_table(result: dict[str, Any]) -> str:
    """The curve from keep to recompute: how it was measured, and its picture."""
    size = result["size"]
    lines = [
        f"What a `memory_budget` costs (`recipes/benchmarks/curve.py`; {result['model']}, {size['layers']} layers,"
        f" width {size['width']}, batches of {size['batch']} x {size['sequence']}, {size['threads']} thread(s), both"
        ' against plain): `offload` is `recompute="never"`, `mix` is `"auto"`, `recompute` runs every block twice, as'
        " PyTorch's checkpoint with the inputs in memory and as ours without. Where the drive hides all, `mix` chooses"
        " what `offload` does.",
        "",
        "![step time over peak memory, keeping, offloading, recomputing](curve.svg)",
    ]
    return "\n".join(lines) + "\n"


def memory_cap_table(result: dict[str, Any]) -> str:
    """The largest batch under a memory cap, and time per token, as Markdown."""
    size, plain = result["size"], result["rows"][0]
    lines = [
        f"What trains in {result['cap_nbytes'] // MIB} MiB, PyTorch itself included"
        f" (`recipes/benchmarks/memory_cap.py`; {result['model']}, {size['layers']} layers, width {size['width']},"
        f" sequence {size['sequence']}, {size['threads']} thread(s); the kernel kills what needs more; one or two"
        f" steps are timed, so the times scatter):",
        "",
        f"| | largest batch | tokens | us a token there | us a token at batch {plain['batch']} | equal to the bit |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        times = f"{row['tokens'] / plain['tokens']:.1f}"
        lines.append(
            f"| {row['method']} | {row['batch']} | {row['tokens']:,} (x {times}) | {row['token_seconds'] * 1e6:.0f}"
            f" | {row['common_token_seconds'] * 1e6:.0f} | {'yes' if row['is_equal'] else 'NO'} |"
        )
    return "\n".join(lines) + "\n"


def state_cap_table(result: dict[str, Any]) -> str:
    """Training in a share of the memory, with parameters and optimizer state on the drive, as Markdown."""
    size, plain, capped = result["size"], result["plain"], result["capped"]
    update, moved, ceiling = bandwidth_of(result["paged"])
    _, moved_slowly, low_ceiling = bandwidth_of(result["throttled"])
    waits = waiting_seconds(capped) / size["steps"]
    lines = [
        f"A GPT of {plain['parameters'] / 1e6:.0f} M parameters with AdamW, {size['batch']} x {size['sequence']} tokens"
        f" a step (`recipes/benchmarks/state_cap.py`; the kernel kills what needs more than {size['share']:g} of the"
        " memory that plain training needs):",
        "",
        "| | peak memory | a step | waiting for the drive | equal to the bit |",
        "|---|---|---|---|---|",
        f"| plain | {plain['peak_nbytes'] / MIB:.0f} MiB | {statistics.median(plain['seconds'][1:]):.1f} s | | |",
        f"| ssdtrain under a cap of {result['cap_nbytes'] / MIB:.0f} MiB | {capped['group_peak_nbytes'] / MIB:.0f} MiB"
        f" | {statistics.median(capped['seconds'][1:]):.1f} s | {waits:.1f} s"
        f" | {'yes' if result['is_equal'] else 'NO'} |",
        "",
        f"With the state alone on the drive, `optimizer.step()` after backward takes {update:.2f} s and moves"
        f" {moved:.2f} GB/s in and out together, {moved / ceiling:.0%} of plain direct I/O; on the drive cut to"
        f" {size['throttle']:g} GB/s each way {moved_slowly:.2f} GB/s, {moved_slowly / low_ceiling:.0%}.",
    ]
    return "\n".join(lines) + "\n"


def state_compare_table(result: dict[str, Any]) -> str:
    """Parameters and optimizer state off memory, beside DeepSpeed, as Markdown."""
    size = result["size"]
    lines = [
        f"Steps taken in turn (`recipes/benchmarks/state_compare.py`; a GPT of {size['layers']} layers, width"
        f" {size['width']}, {size['batch']} x {size['sequence']} tokens, DeepSpeed {result['versions']['deepspeed']} as"
        " ZeRO-3 with its optimizer on NVMe and its own CPU Adam; memory includes the building of the model):",
        "",
        "| | peak memory | a step | against plain | equal to the bit |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['method']} | {row['peak_nbytes'] / MIB:,.0f} MiB | {row['step_seconds']:.2f} s"
            f" | x {row['ratio']:.2f} | {'yes' if row['is_equal'] else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def throttle_table(result: dict[str, Any]) -> str:
    """What plans predict and what happens, on a drive that the kernel slows down."""
    size, copies = result["size"], ""
    if "beside_copies" in result:
        copies = (
            f"; a plain step while another core does nothing but copy memory takes {_ratio(result['beside_copies'])}"
        )
    rows = [
        f"A drive too slow to take everything (`recipes/benchmarks/throttle.py`; a GPT of {size['layers']} layers,"
        f" width {size['width']}, {size['batch']} x {size['sequence']}; throttled to parts of what writing everything"
        f" during forward needs; plain against plain this comparison says {_ratio(result['plain_twice'])}{copies}):",
        "",
        "| bandwidth | peak of saved tensors predicted | measured | moved per step | forward's worth of the drive"
        " | stalled | step against plain, quartiles |",
        "|---" * 7 + "|",
    ]
    for row in result["rows"]:
        allowed = f"{row['allowed_nbytes'] / MIB:,.0f} MiB" if row["allowed_nbytes"] else ""
        rows.append(
            f"| {row['drive']} | {row['predicted_peak_nbytes'] / MIB:,.1f} MiB | {row['peak_nbytes'] / MIB:,.1f} MiB"
            f" | {row['moved_nbytes'] / MIB:,.0f} MiB | {allowed} | {row['stall_seconds'] * 1000:.0f} ms"
            f" | {_ratio(row)} |"
        )
    return "\n".join(rows) + "\n"


def resident_table(result: dict[str, Any]) -> str:
    """The largest resident size of whole processes over sizes, as Markdown."""
    size = result["arguments"]
    rows = [
        f"The whole process on the CPU, PyTorch and all code included (`recipes/benchmarks/resident.py`; GPTs of width"
        f" {size['width']}, sequence {size['sequence']}, {size['threads']} threads of a machine with"
        f" {result['machine']['cores']} cores, {size['steps']} steps; largest resident size; estimated: what the run"
        f" with ssdtrain says the process would have taken without it; a few steps in processes of their own, so times"
        f" and what the default keeps scatter):",
        "",
        '| saved | plain | ssdtrain | estimated without | step | `trim_memory="always"` | estimated without | step'
        " | equal to the bit |",
        "|---" * 9 + "|",
    ]
    for row in result["rows"]:
        plain, ours, trimmed = (row["methods"][name] for name in ("plain", "ssdtrain", "trimmed"))
        cells = [f"{ours['saved_nbytes'] / MIB:,.0f} MiB", f"{plain['resident_nbytes'] / MIB:,.0f}"]
        for method in (ours, trimmed):
            error = method["estimated_nbytes"] / plain["resident_nbytes"] - 1
            cells.append(f"{method['resident_nbytes'] / MIB:,.0f}")
            cells.append(f"{method['estimated_nbytes'] / MIB:,.0f} ({error:+.0%})")
            cells.append(f"x {method['step_seconds'] / plain['step_seconds']:.2f}")
        rows.append(f"| {' | '.join(cells)} | {'yes' if row['is_equal'] else 'NO'} |")
    return "\n".join(rows) + "\n"


def engine_table(result: dict[str, Any]) -> str:
    """The engines beside fio as Markdown."""
    machine = result["machine"]
    rows = [
        f"The engines beside {machine['fio']} (`recipes/benchmarks/engine.py`; the same file, request size and depth on"
        f" both sides, direct I/O, runs taken in turn, {machine['cores']} cores of {machine['processor']} that others"
        f" used too; the share is the median over the runs; seconds of processor time per GB):",
        "",
        "| | request, depth | engine | GB/s | of fio | processor |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        size = f"{row['request_mib']:g} MiB, {row['depth']}"
        cells = [row["direction"], size, row["engine"], f"{row['gb_per_second']:.2f}", f"{row['fraction_of_fio']:.0%}"]
        rows.append(f"| {' | '.join(cells)} | {row['cpu_seconds_per_gb']:.3f} |")
    return "\n".join(rows) + "\n"


def _ratio(row: dict[str, Any]) -> str:
    low, high = row["ratio_quartiles"]
    return f"x {row['ratio']:.2f}, {low:.2f} to {high:.2f}"


TABLES = {
    "state_compare": state_compare_table,
    "engine": engine_table,
    "demo": demo_table,
    "compare": compare_table,
    "curve": curve_table,
    "memory_cap": memory_cap_table,
    "state_cap": state_cap_table,
    "resident": resident_table,
    "throttle": throttle_table,
    "throttle_large": throttle_table,
}
PICTURES = {"compare": compare_picture, "curve": curve_picture}


def main() -> None:
    """Replaces what stands between the marks."""
    for name, table in TABLES.items():
        result = json.loads((HERE / "results" / f"{name}.json").read_text())
        (path,) = (path for path in (README, PAGE) if f"<!-- {name}: begin -->" in path.read_text())
        replace(path, name, table(result))
        if name in PICTURES:
            (PAGE.parent / f"{name}.svg").write_text(PICTURES[name](result))
    results = results_of(HERE / "results" / "gpu")
    replace(README, "gpu", gpu_summary(results))
    replace(GPU_PAGE, "gpu", gpu_section(results))


def replace(path: Path, name: str, new: str) -> None:
    """Puts `new` between the marks of that name."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    head, rest = path.read_text().split(begin)
    path.write_text(head + begin + new + rest[rest.index(end) :])


if __name__ == "__main__":
    main()
