"""A recorded run for people: one page, the same numbers as JSON, and a trace for Perfetto.

Knows run records and no tensors. `describe` has every number; `page` and `command` only show them.
"""

from ssdtrain.report.data import describe
from ssdtrain.report.perfetto import chrome_trace

__all__ = ["chrome_trace", "describe"]
