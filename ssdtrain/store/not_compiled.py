"""Calls into which the compiler does not look.

Importing this loads the compiler, which takes a second: it is for those who have seen that it is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def aside(call: Callable[..., Result], *args: object) -> Result:
    """Calls it; in a graph that is being traced, the graph ends before."""
    return call(*args)
