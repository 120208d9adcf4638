"""Every number of a report, as plain values: what `--json` prints and what the page shows."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from ssdtrain.report.timeline import bars, memory, residency
from ssdtrain.report.words import headline
from ssdtrain.run_log import Detail, Run

_MAX_ROWS = 1000  # of steps: more share a row
_MAX_MODULES = 200
_PEAKS = ("peak_memory_nbytes", "peak_process_nbytes", "peak_allocated_nbytes", "peak_reserved_nbytes")
_SECONDS_PER_DAY = 86400
_DAYS_PER_YEAR = 365.25


def describe(run: Run) -> dict[str, Any]:
    """All there is to say of a run."""
    steps = _steps(run)
    summary = _summary(run, steps)
    described = {
        "summary": summary,
        "steps": steps,
        "bandwidth": _bandwidth(run),
        "timelines": [_timeline(run, detail) for detail in _shown(run.details)],
        "modules": _modules(run),
        "memory": {name: _nbytes(run.stats.get(name)) for name in _PEAKS},
        "wear": _wear(run),
        "kept": _kept(run),
        "fallbacks": list(run.stats.get("fallbacks", ())),
        "plan": run.stats.get("plan", ""),
        "engine": {"name": run.stats.get("engine", ""), "reason": run.stats.get("engine_reason", "")},
        "environment": run.environment,
        "policy": run.policy,
        "record": {
            "is_complete": run.is_complete,
            "num_lost_nbytes": run.num_lost_nbytes,
            "num_damaged_blocks": run.num_damaged,
            "totals_after_step": run.stats_step,
        },
    }
    return {"headline": headline(described), **described}


def _steps(run: Run) -> list[dict[str, Any]]:
    """One row per step, or per few: differences of the running totals, and what was predicted."""
    rows, before = [], dict.fromkeys(run.steps[0]["counters"], 0.0)
    for group in _grouped(run.steps):
        last, totals = group[-1], group[-1]["counters"]
        num = sum([row["num_steps"] for row in group])
        seconds = sum([row["seconds"] for row in group])
        rows.append(
            {
                "step": last["step"],
                "num_steps": num,
                "seconds": seconds / num,
                "worst_seconds": max([row["worst_seconds"] for row in group]),
                "predicted_seconds": sum([row["predicted_seconds"] for row in group]) / num,
                "stall_seconds": sum([row["stall_seconds"] for row in group]) / num,
                "peak_nbytes": max([row["peak_nbytes"] for row in group]),
                "peak_if_kept_nbytes": max([row["peak_if_kept_nbytes"] for row in group]),
                "predicted_peak_nbytes": max([row["predicted_peak_nbytes"] for row in group]),
                **{
                    f"{name}_nbytes": (totals[f"{name}_nbytes"] - before[f"{name}_nbytes"]) / num
                    for name in ("offloaded", "kept", "forwarded", "written", "read", "hosted")
                },
                "write_gbs": _rate(totals["written_nbytes"] - before["written_nbytes"], seconds),
                "read_gbs": _rate(totals["read_nbytes"] - before["read_nbytes"], seconds),
            }
        )
        before = totals
    return rows


def _grouped(rows: Sequence[dict[str, Any]]) -> list[Sequence[dict[str, Any]]]:
    size = -(-len(rows) // _MAX_ROWS)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _rate(nbytes: float, seconds: float) -> float:
    return nbytes / seconds / 1e9 if seconds > 0 else 0.0


def _summary(run: Run, steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The peak of the run first. A typical step's is the median of the second half, when plans have settled."""
    settled = steps[len(steps) // 2 :]
    totals = run.steps[-1]["counters"]

    def typical(name: str) -> float:
        return float(median([row[name] for row in settled]))

    highest, stats = max(steps, key=lambda row: row["peak_nbytes"]), run.stats
    peak, peak_step = highest["peak_nbytes"], highest["step"]
    if stats.get("peak_memory_nbytes", 0) >= peak:  # with staging that is not in use just then
        peak, peak_step = stats["peak_memory_nbytes"], stats["peak_memory_step"] or peak_step
    without = max([stats.get("without_nbytes", 0), *[row["peak_if_kept_nbytes"] for row in steps]])
    seconds = sum([row["seconds"] for row in run.steps])
    return {
        "num_steps": run.num_steps,
        "total_seconds": seconds,
        "peak_nbytes": peak,
        "peak_step": peak_step,
        "without_nbytes": without,
        "saved_share": 1 - peak / without if without else 0.0,
        "typical_peak_nbytes": typical("peak_nbytes"),
        "typical_peak_if_kept_nbytes": typical("peak_if_kept_nbytes"),
        "highest_peak_nbytes": highest["peak_nbytes"],
        "typical_seconds": typical("seconds"),
        "worst_seconds": max([row["worst_seconds"] for row in steps]),
        "typical_stall_seconds": typical("stall_seconds"),
        "stall_seconds": totals["stalled_seconds"],
        "stall_share": totals["stalled_seconds"] / seconds if seconds else 0.0,
        "stalls": dict(run.stats.get("stalls", {})),
        "ahead_seconds": totals["ahead_seconds"],
        "totals": dict(totals),
    }


def _bandwidth(run: Run) -> dict[str, Any]:
    """What was used of the drive, and what it gave while it was busy."""
    totals = run.steps[-1]["counters"]
    seconds = sum([row["seconds"] for row in run.steps])
    return {
        f"{direction}_{name}": value
        for direction, nbytes, busy in (
            ("write", totals["written_nbytes"], totals["write_busy_seconds"]),
            ("read", totals["read_nbytes"], totals["read_busy_seconds"]),
        )
        for name, value in (
            ("used_gbs", _rate(nbytes, seconds)),
            ("ceiling_gbs", _rate(nbytes, busy)),
            ("busy_share", min(1.0, busy / seconds) if seconds else 0.0),
        )
    }


def _shown(details: Sequence[Detail]) -> list[Detail]:
    """The latest ordinary step, and the worst one after it has settled."""
    ordinary = [detail for detail in details if detail.why != "worst"]
    shown = ordinary[-1:]
    worst = [detail for detail in details if detail.why == "worst"]
    return shown + worst[-1:]


def _timeline(run: Run, detail: Detail) -> dict[str, Any]:
    row = next((row for row in run.steps if row["step"] == detail.step and row["num_steps"] == 1), None)
    return {
        "step": detail.step,
        "why": detail.why,
        "seconds": detail.seconds,
        "is_wall_time": detail.is_wall_time,
        "num_records": len(detail.records["nbytes"]),
        "num_omitted_records": detail.num_omitted,
        "peak_nbytes": row["peak_nbytes"] if row else None,
        "peak_if_kept_nbytes": row["peak_if_kept_nbytes"] if row else None,
        "memory": memory(detail),
        "residency": residency(detail),
        "bars": [bar.as_dict() for bar in bars(detail)],
    }


def _modules(run: Run) -> list[dict[str, Any]]:
    """By module, the most bytes first; what is beyond the first few hundred is one row."""
    num_steps = max(1, run.stats_step)
    rows: list[dict[str, Any]] = [
        {
            "module": name or "(no module's)",
            "num_records": num / num_steps,
            "nbytes": (kept + host + disk) / num_steps,
            "kept_nbytes": kept / num_steps,
            "host_nbytes": host / num_steps,
            "disk_nbytes": disk / num_steps,
            "tier": _tier(kept, host, disk),
            "stall_seconds": stalled / num_steps,
        }
        for name, (num, kept, host, disk, stalled) in run.modules.items()
    ]
    rows.sort(key=lambda row: -row["nbytes"])
    rest = rows[_MAX_MODULES:]
    if rest:
        names = [name for name, value in rest[0].items() if not isinstance(value, str)]
        rows[_MAX_MODULES:] = [
            {"module": f"({len(rest)} more)", "tier": "", **{name: sum([row[name] for row in rest]) for name in names}}
        ]
    return rows


def _nbytes(value: object) -> int:
    """Of the totals, which a record need not have."""
    return value if isinstance(value, int) and 0 <= value <= 1 << 60 else 0


def _tier(kept: float, host: float, disk: float) -> str:
    largest = max(kept, host, disk)
    name = "drive" if largest == disk else "host memory" if largest == host else "memory"
    return name if largest == kept + host + disk else f"mostly {name}"


def _wear(run: Run) -> dict[str, Any]:
    """What was written, and the pace of the later half: the first steps, without a plan, may write much more."""
    half = len(run.steps) // 2
    written = _written(run.steps[-1])
    before = _written(run.steps[half - 1]) if half else 0
    seconds = sum([row["seconds"] for row in run.steps[half:]])
    daily = (written - before) / seconds * _SECONDS_PER_DAY if seconds else 0.0
    tbw = run.policy.get("endurance_tbw")
    return {
        "written_nbytes": written,
        "written_nbytes_per_step": written / run.num_steps,
        "written_nbytes_per_day": daily,
        "endurance_tbw": tbw,
        "life_years": tbw * 1e12 / daily / _DAYS_PER_YEAR if tbw and daily else None,
    }


def _written(row: dict[str, Any]) -> int:
    """Until the end of a step, for parameters and optimizer state on the same drive too."""
    counters = row["counters"]
    return int(counters["written_nbytes"] + counters.get("shared_written_nbytes", 0))


def _kept(run: Run) -> list[dict[str, Any]]:
    """Saved tensors that stayed in memory, by reason, the most bytes first; per step."""
    num_steps = max(1, run.stats_step)
    rows = [
        {"reason": reason, "count": entry["count"] / num_steps, "nbytes": entry["nbytes"] / num_steps}
        for reason, entry in run.stats.get("skipped", {}).items()
    ]
    return sorted(rows, key=lambda row: -row["nbytes"])
