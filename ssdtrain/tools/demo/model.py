"""A GPT small enough to train on two cores and plain enough to read: the model of the demo and of the recipe.

It knows nothing of ssdtrain. Nothing in it is arranged for offloading: the saved activations are those of any
pre-norm transformer written with PyTorch's own modules.

Example:
    >>> model = GPT(GPTConfig(layers=2, width=64, heads=2, sequence=32))
    >>> loss = model(tokens, targets)   # both of shape (batch, sequence), integers
    >>> loss.backward()
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention

__all__ = ["GPT", "GPTConfig"]


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT."""

    layers: int = 14
    """Number of transformer blocks."""
    width: int = 384
    """Size of the residual stream; a multiple of `heads`."""
    heads: int = 6
    """Attention heads per block."""
    sequence: int = 512
    """Longest sequence the position embedding knows."""
    vocabulary: int = 256
    """Number of tokens; 256 reads text byte by byte."""


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes each position of `x` (batch, sequence, width) with those before it."""
        batch, sequence, width = x.shape
        qkv = self.qkv(x).view(batch, sequence, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed: Tensor = self.out(y.transpose(1, 2).reshape(batch, sequence, width))
        return mixed


class Block(nn.Module):
    """One pre-norm block: attention, then a two-layer perceptron, each added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x` (batch, sequence, width) with what this block adds to it."""
        x = x + self.attention(self.norm1(x))
        thought: Tensor = self.mlp(self.norm2(x))
        return x + thought


class GPT(nn.Module):
    """A decoder-only transformer with learned positions and an output layer tied to the token embedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.sequence, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.apply(_initialise)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean cross-entropy of predicting `targets` from `tokens`, both (batch, sequence)."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = linear(self.norm(x), self.tokens.weight)
        return cross_entropy(logits.flatten(0, 1), targets.flatten())


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
