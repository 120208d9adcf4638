"""What was done and what it cost: running totals, and the snapshot that users print. Knows numbers only."""

from ssdtrain.stats.counters import Counters, EngineTotals
from ssdtrain.stats.snapshot import Skipped, Stats
from ssdtrain.stats.units import nbytes_text, rate_text

__all__ = ["Counters", "EngineTotals", "Skipped", "Stats", "nbytes_text", "rate_text"]
