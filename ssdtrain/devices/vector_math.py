"""Vector functions of the processor, brought to one result whatever thread calls them first.

[Note: the first call] PyTorch's x86 builds hand `sqrt`, `exp` and their like to MKL, a piece of the tensor from each
thread. MKL up to 2024.2 chooses its code at the first call of each function; where the first calls of two threads meet,
one of them may get code of 11 bits of precision for its whole piece, once in a process, without an error
(pytorch/pytorch#188792). An Adam step is then another one than in the process beside it. One call on one element, from
one thread, has the choice made before.
"""

from __future__ import annotations

import torch

_FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "expm1", "log", "log10", "log1p", "log2"),
    *("sin", "sinh", "sqrt", "tan", "tanh", "trunc"),
)


def settle_vector_math() -> None:
    """Calls each of them once; see [Note: the first call]. May be called again.

    The first time in a process takes 20 ms, later ones a tenth of a millisecond.

    A context of ssdtrain calls it when it is made. A program that compares its results with those of another process,
    or computes before the context is made, calls it first.
    """
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            one = torch.full((1,), 0.5, dtype=dtype, device="cpu")
            for name in _FUNCTIONS:
                getattr(one, name)()
