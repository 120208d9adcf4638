"""What the functions of `ssdtrain` return and raise, for annotations, ``isinstance`` and ``except``.

Each is also a name of `ssdtrain` itself, which only does not list it.
"""

from __future__ import annotations

from ssdtrain.activations.offload import ActivationOffload
from ssdtrain.api.section import Section
from ssdtrain.optimizer.optimizer import OffloadedOptimizer
from ssdtrain.parameters.offload import ParameterOffload
from ssdtrain.state_stats import StateStats
from ssdtrain.stats import Skipped, Stats
from ssdtrain.store.state_store import StateLostError

__all__ = [
    "ActivationOffload",
    "OffloadedOptimizer",
    "ParameterOffload",
    "Section",
    "Skipped",
    "StateLostError",
    "StateStats",
    "Stats",
]
