"""What tests of `torch.compile` compile."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """A norm and two layers beside a skip connection."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))
