"""Writes the README's tables and picture of results from the data beside this file, so that the two cannot differ.

Fresh data: `ssdtrain demo --json | tail -1 > recipes/benchmarks/results/demo.json`, and
`python recipes/benchmarks/compare.py DIR | tail -1 > recipes/benchmarks/results/compare.json`; then run this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from picture import compare_picture

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
GIB = 1 << 30


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
        verdict = "yes" if all(entry["is_equal"] for entry in own) else "NO"
        remark = f"; {first['remark']}" if "remark" in first else ""
        rows.append(f"| {first['method']} | {' | '.join(cells)} | {verdict}{remark} |")
    rows += ["", "![peak memory and step time of every method](recipes/benchmarks/results/compare.svg)"]
    return "\n".join(rows) + "\n"


TABLES = {"demo": demo_table, "compare": compare_table}


def main() -> None:
    """Replaces what stands between the marks."""
    text = README.read_text()
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        head, rest = text.split(begin)
        result = json.loads((HERE / "results" / f"{name}.json").read_text())
        text = head + begin + table(result) + rest[rest.index(end) :]
        if name == "compare":
            (HERE / "results" / "compare.svg").write_text(compare_picture(result))
    README.write_text(text)


if __name__ == "__main__":
    main()
