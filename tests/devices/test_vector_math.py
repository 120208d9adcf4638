"""MKL's first calls, which may give one of two results; see [Note: the first call] in devices/vector_math."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from typing import Any

import torch
from conftest import MakeOffload
from doses import dose
from torch.utils._python_dispatch import TorchDispatchMode

FIRST_STEP = """
import sys, torch
from ssdtrain.devices.vector_math import settle_vector_math
settle_vector_math()
torch.set_num_threads(2)
x = torch.rand(256, 384) * 1e-6
torch.zeros(1 << 20).add_(1)  # OpenMP's threads have begun
first = [getattr(x, name)() for name in ("sqrt", "exp", "erf", "tanh", "log")]
second = [getattr(x, name)() for name in ("sqrt", "exp", "erf", "tanh", "log")]
sys.exit(0 if all(map(torch.equal, first, second)) else 3)
"""


class Called(TorchDispatchMode):
    """Counts operators by name and dtype, and keeps the largest size each was called on."""

    def __init__(self) -> None:
        super().__init__()
        self.most: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], torch.Tensor):
            key = (func.overloadpacket.__name__, args[0].dtype)
            self.most[key] = max(self.most[key], args[0].numel())
        return func(*args, **kwargs or {})


def test_vector_math_is_settled_before_a_context_is_used(make_offload: MakeOffload) -> None:
    """By one element each: more would be shared out to threads, whose first calls are what may meet."""
    with Called() as called:
        make_offload()
    for dtype in (torch.float32, torch.float64):
        for name in ("sqrt", "exp", "log", "erf", "tanh", "sin", "cos"):  # of Adam, softmax, losses, GELU, rotations
            assert called.most[name, dtype] == 1, (name, dtype)


def test_first_results_of_a_process_are_those_of_later_ones() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(dose(2, 40)):
        assert subprocess.run([sys.executable, "-c", FIRST_STEP], env=environment, check=False).returncode == 0
