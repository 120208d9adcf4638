"""The report in words: what it did, what it cost, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssdtrain.stats import nbytes_text

_LEAST_SHARE = 0.005


def seconds_text(seconds: float) -> str:
    """``"12.3 ms"`` or ``"1.25 s"``."""
    if seconds == 0:
        return "0 s"
    if abs(seconds) < 0.0995:
        return f"{seconds * 1e3:.2f} ms" if abs(seconds) < 0.00995 else f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s" if abs(seconds) < 100 else f"{seconds:,.0f} s"


def share_text(share: float) -> str:
    """``"12 %"``; with a digit more where that would be nothing."""
    percent = 100 * share
    if percent and abs(percent) < 0.05:
        return "less than 0.1 %"
    return f"{percent:.1f} %" if abs(percent) < 9.95 else f"{percent:.0f} %"


def daily_text(nbytes: float) -> str:
    """Bytes per day as drives are rated, in TB."""
    return f"{nbytes / 1e12:.2f} TB" if nbytes >= 1e10 else f"{nbytes / 1e9:.2f} GB"


def headline(described: Mapping[str, Any]) -> list[str]:
    """What it did for the user, and what it cost: one sentence each."""
    return [_gain(described["summary"], described["plan"]), _cost(described["summary"]), _wear(described["wear"])]


def _gain(summary: Mapping[str, Any], plan: str) -> str:
    peak, without, typical = summary["peak_nbytes"], summary["without_nbytes"], summary["typical_peak_nbytes"]
    says = f"Saved tensors and our buffers peaked at {nbytes_text(peak)}, in step {summary['peak_step']}"
    if summary["saved_share"] < _LEAST_SHARE:
        why = f" The plan says: {plan}." if plan else ""
        is_more = peak > without * (1 + _LEAST_SHARE)
        return f"{says}, {'more than' if is_more else 'as'} they would have without ssdtrain.{why}"
    limit = plan.partition("; ")[2]  # what keeps the peak from falling further
    return (
        f"{says}, instead of {nbytes_text(without)}: {share_text(summary['saved_share'])} less; a typical step's peak"
        f" is {nbytes_text(typical)}." + (f" {limit[0].upper()}{limit[1:]}." if limit else "")
    )


def _cost(summary: Mapping[str, Any]) -> str:
    steps = f"{summary['num_steps']:,} steps of {seconds_text(summary['typical_seconds'])}"
    if not summary["stall_seconds"]:
        return f"Training never waited for it, in {steps}."
    return (
        f"Training waited {seconds_text(summary['stall_seconds'])} for it, {share_text(summary['stall_share'])} of the"
        f" time, in {steps}."
    )


def _wear(wear: Mapping[str, Any]) -> str:
    if not wear["written_nbytes"]:
        return "Nothing was written to the drive."
    text = (
        f"The drive took {nbytes_text(wear['written_nbytes'])}; training day and night would write"
        f" {daily_text(wear['written_nbytes_per_day'])} a day"
    )
    if wear["life_years"] is not None:
        return f"{text}, which uses its {wear['endurance_tbw']:g} TBW up in {wear['life_years']:.1f} years."
    return f"{text}."
