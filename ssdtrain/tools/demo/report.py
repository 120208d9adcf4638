"""Shows a `Comparison`: progress on stderr, one table and, on request, one line of JSON on stdout."""

from __future__ import annotations

import json
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ssdtrain.stats import nbytes_text
from ssdtrain.tools.demo.compare import Comparison, RunResult
from ssdtrain.tools.demo.live_view import LiveView


class ProgressLines:
    """Writes one line for each thing that happens and, on a terminal, shows both runs while they train."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._view = LiveView(self._console)
        self.show = self._view.show

    def __enter__(self) -> ProgressLines:
        self._view.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._view.__exit__(kind, error, trace)

    def __call__(self, line: str) -> None:
        """Writes one line."""
        self._console.print(line, markup=False, soft_wrap=True)


def print_table(comparison: Comparison) -> None:
    """Prints what both runs cost, side by side."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in ("plain", "ssdtrain"):
        table.add_column(name, justify="right")
    table.add_column("", no_wrap=True)
    for row in _rows(comparison):
        table.add_row(*row)
    console = Console(highlight=False)
    for part in (_title(comparison), table, _remarks(comparison)):
        console.print(part, markup=False, soft_wrap=part is not table)


def print_json(comparison: Comparison) -> None:
    """Prints the comparison as one line of JSON."""
    print(json.dumps(to_dict(comparison)), flush=True)


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """Returns the comparison as JSON can carry it; what was not reached is None."""
    stats = comparison.ssdtrain.get("stats") or {}
    return {
        "step_time_ratio": comparison.step_time_ratio,
        "losses_equal": comparison.losses_equal,
        "parameters_equal": comparison.parameters_equal,
        "stall_seconds": stats.get("stall_seconds"),
        "written_nbytes": stats.get("written_nbytes"),
        "read_nbytes": stats.get("read_nbytes"),
        "engine": stats.get("engine"),
        "memory_limit_nbytes": comparison.memory_limit_nbytes,
        "settings": comparison.settings.to_dict(),
        "plain": _run_dict(comparison.plain),
        "ssdtrain": _run_dict(comparison.ssdtrain),
        "stats": stats,
    }


def _run_dict(run: RunResult) -> dict[str, Any]:
    losses = [float.fromhex(loss) for loss in run.losses]
    return {
        "outcome": run.outcome,
        "peak_rss_nbytes": run.get("peak_rss_nbytes"),
        "peak_saved_nbytes": run.get("peak_saved_nbytes"),
        "step_seconds": run.median_step_seconds,
        "all_step_seconds": run.step_seconds,
        "warm_up_loss": losses[0] if losses else None,
        "losses": losses[1:],
    }


def _title(comparison: Comparison) -> str:
    num_parameters = comparison.ssdtrain.get("num_parameters")
    size = f" ({num_parameters / 1e6:.1f} M parameters)" if num_parameters else ""
    return f"\n{comparison.settings.describe()}{size}"


def _rows(comparison: Comparison) -> list[tuple[str, ...]]:
    runs = (comparison.plain, comparison.ssdtrain)
    rows: list[tuple[str, ...]] = [
        ("outcome", *(run.outcome for run in runs), ""),
        _size_row("peak training memory", "peak_rss_nbytes", runs),
        _size_row("peak saved tensors", "peak_saved_nbytes", runs),
        ("step time, median", *(_seconds(run) for run in runs), _ratio(comparison)),
        ("step time, range", *(_range(run) for run in runs), ""),
        ("last loss", *(_last_loss(run) for run in runs), _equality(comparison.losses_equal)),
        ("parameters, sha256", *(_short_hash(run) for run in runs), _equality(comparison.parameters_equal)),
    ]
    return rows + _drive_rows(comparison.ssdtrain.get("stats") or {})


def _drive_rows(stats: dict[str, Any]) -> list[tuple[str, ...]]:
    if not stats:
        return []
    written = _rate(stats["written_nbytes"], stats["write_busy_seconds"])
    read = _rate(stats["read_nbytes"], stats["read_busy_seconds"])
    return [
        ("written to drive", "", nbytes_text(stats["written_nbytes"]), written),
        ("read from drive", "", nbytes_text(stats["read_nbytes"]), read),
        ("stalled", "", f"{stats['stall_seconds']:.3f} s", ""),
    ]


def _size_row(name: str, field: str, runs: tuple[RunResult, RunResult]) -> tuple[str, ...]:
    plain, ours = (run.get(field) for run in runs)
    texts = ["" if nbytes is None else nbytes_text(nbytes) for nbytes in (plain, ours)]
    is_comparable = plain and ours and not any(run.failure for run in runs)
    return name, texts[0], texts[1], f"{100 * (ours / plain - 1):+.1f} %" if is_comparable else ""


def _seconds(run: RunResult) -> str:
    return "" if run.median_step_seconds is None else f"{run.median_step_seconds:.3f} s"


def _range(run: RunResult) -> str:
    """How far the steps differ: how much else the machine did, and how far to trust the median."""
    return f"{min(run.step_seconds):.2f} - {max(run.step_seconds):.2f} s" if run.step_seconds else ""


def _ratio(comparison: Comparison) -> str:
    return "" if comparison.step_time_ratio is None else f"x {comparison.step_time_ratio:.3f}"


def _last_loss(run: RunResult) -> str:
    return f"{float.fromhex(run.losses[-1]):.9g}" if run.losses else ""  # 9 digits tell float32 apart


def _short_hash(run: RunResult) -> str:
    return (run.get("parameters_sha256") or "")[:12]


def _equality(is_equal: bool | None) -> str:
    return {None: "", True: "equal to the bit", False: "DIFFERENT"}[is_equal]


def _rate(nbytes: int, seconds: float) -> str:
    return f"{nbytes / seconds / 1e9:.2f} GB/s" if seconds else ""


def verdict(comparison: Comparison) -> list[str]:
    """Whether it was worth it, in one sentence; none where a run did not come to its end."""
    runs = (comparison.plain, comparison.ssdtrain)
    plain, ours = (run.get("peak_rss_nbytes") for run in runs)
    before, after = (run.get("peak_saved_nbytes") for run in runs)
    ratio, stats = comparison.step_time_ratio, comparison.ssdtrain.get("stats") or {}
    if not (plain and before and ours and after and ratio):
        return []
    fall, step = plain - ours, f" (step {stats['peak_memory_step']})" if stats.get("peak_memory_step") else ""
    is_same = comparison.losses_equal and comparison.parameters_equal
    return [
        f"verdict    training took {nbytes_text(abs(fall))} {'less' if fall >= 0 else 'MORE'} memory at its peak"
        f" ({100 * (ours / plain - 1):+.0f} %; saved tensors {100 * (after / before - 1):+.0f} %{step}) and"
        f" x {ratio:.2f} the time a step; results are {'the same to the bit' if is_same else 'DIFFERENT'}."
        + (" Nothing was moved: see plan." if not stats.get("num_offloaded") else ""),
        *([f"plan       {stats['plan']}"] if stats.get("plan") else []),
        "",
    ]


def _remarks(comparison: Comparison) -> str:
    stats = comparison.ssdtrain.get("stats") or {}
    policy = ", ".join(f"{name}={value}" for name, value in comparison.settings.policy.items())
    lines = [
        "Training memory: resident memory above the level before the first step.",
        "Saved tensors: what autograd keeps for backward, while it is in memory, with ssdtrain's own buffers.",
        "",
        *verdict(comparison),
        f"directory  {comparison.settings.directory}",
        f"policy     {policy or 'the default'}",
    ]
    if stats:
        lines.append(f"engine     {stats['engine']} ({stats['engine_reason']})")
    lines += [f"fallback   {text}" for text in stats.get("fallbacks", ())]
    if comparison.memory_limit_nbytes is not None:
        limit = nbytes_text(comparison.memory_limit_nbytes)
        lines.append(f"limit      {limit} of private memory for training, each")
    return "\n".join(lines)
