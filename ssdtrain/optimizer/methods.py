"""Methods of an optimizer beside `step()`, such as `eval()` of a schedule-free one: they find state where they look.

Knows the optimizer that does the arithmetic and what updates, not what its methods do.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from ssdtrain.optimizer.step import Updates


def paged(
    optimizer: torch.optim.Optimizer, name: str, found: Any, updates: Updates, when_called: Callable[[], None]
) -> Any:
    """An attribute of the optimizer; where it is a method, one that reads and writes state through.

    `when_called`: called before the method; it raises when nothing may be changed.
    """
    if name.startswith("_") or not inspect.ismethod(found) or found.__self__ is not optimizer:
        return found

    @functools.wraps(found)
    def call(*args: Any, **options: Any) -> Any:
        when_called()
        with updates.everything():
            return found(*args, **options)

    return call
