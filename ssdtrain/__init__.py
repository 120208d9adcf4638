"""Keeps what training holds in memory only to use it later on NVMe drives, and has it back in time.

Example:
    >>> with ssdtrain.offload_activations("/mnt/nvme") as offload:
    ...     for batch in loader:
    ...         model(batch).backward()
    ...         optimizer.step(); optimizer.zero_grad()
    >>> print(offload.stats)
"""

from ssdtrain.activations import ActivationOffload
from ssdtrain.offloading import offload_activations
from ssdtrain.policy import ActivationPolicy
from ssdtrain.saving import keep_resident
from ssdtrain.stats import Skipped, Stats

__version__ = "0.1.0"

__all__ = [
    "ActivationOffload",
    "ActivationPolicy",
    "Skipped",
    "Stats",
    "keep_resident",
    "offload_activations",
]
