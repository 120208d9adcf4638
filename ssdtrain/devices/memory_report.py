"""What the system and PyTorch report of the memory of this process and of its device.

Knows counters; neither records nor what moves them.
"""

from __future__ import annotations

import resource

import torch

from ssdtrain.stats import Counters


def note_reported(counters: Counters) -> None:
    """Fills in the high-water marks, which cost nothing: the system and the allocator keep them anyway."""
    counters.peak_process_nbytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        counters.peak_allocated_nbytes = torch.cuda.max_memory_allocated()
        counters.peak_reserved_nbytes = torch.cuda.max_memory_reserved()
