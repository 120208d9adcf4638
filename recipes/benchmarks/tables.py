"""Writes the README's table of results from the data beside this file, so that the two cannot differ.

Fresh data: `ssdtrain demo --json | tail -1 > recipes/benchmarks/results/demo.json`, then run this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- demo: begin -->\n", "<!-- demo: end -->"
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


def main() -> None:
    """Replaces what stands between the marks."""
    text = README.read_text()
    head, rest = text.split(BEGIN)
    tail = rest[rest.index(END) :]
    result = json.loads((HERE / "results" / "demo.json").read_text())
    README.write_text(head + BEGIN + demo_table(result) + tail)


if __name__ == "__main__":
    main()
