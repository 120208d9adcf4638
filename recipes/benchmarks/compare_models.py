"""The models of the comparison: four kinds of transformer, small enough for a CPU, each with its loss and its batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssdtrain.tools.demo.model import GPT, GPTConfig

VOCABULARY = 256


@dataclass(frozen=True)
class Size:
    """How large."""

    layers: int
    width: int
    heads: int
    sequence: int
    batch: int


class LlamaBlock(nn.Module):
    """RMSNorm, rotary positions, grouped keys and values, SwiGLU."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads, self.kv_heads = size.heads, max(1, size.heads // 2)
        self.head_width = size.width // size.heads
        kv, wide = self.kv_heads * self.head_width, 8 * size.width // 3
        self.norm1, self.norm2 = nn.RMSNorm(size.width), nn.RMSNorm(size.width)
        self.qkv = nn.Linear(size.width, size.width + 2 * kv, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)
        self.gate, self.up = (nn.Linear(size.width, wide, bias=False) for _ in range(2))
        self.down = nn.Linear(wide, size.width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Next hidden states; `rotation`: cosine and signed sine of the positions."""
        b, s, w = x.shape
        kv = self.kv_heads * self.head_width
        q, k, v = self.qkv(self.norm1(x)).split([w, kv, kv], dim=-1)
        q, k, v = (t.view(b, s, -1, self.head_width).transpose(1, 2) for t in (q, k, v))
        q, k = (t * rotation[0] + torch.cat(t.chunk(2, -1)[::-1], -1) * rotation[1] for t in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, s, w))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """Blocks over bytes."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, size.width)
        self.blocks = nn.ModuleList([LlamaBlock(size) for _ in range(size.layers)])
        self.norm = nn.RMSNorm(size.width)
        angles = torch.outer(
            torch.arange(size.sequence), 10000.0 ** -torch.linspace(0, 1, size.width // size.heads // 2)
        )
        self.register_buffer("cosine", torch.cat([angles.cos()] * 2, -1))
        self.register_buffer("sine", torch.cat([-angles.sin(), angles.sin()], -1))

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss."""
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x, (self.cosine, self.sine))
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class T5(nn.Module):
    """An encoder and a decoder with cross-attention, of half the layers each."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, size.width)
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        shape = size.width, size.heads, 4 * size.width
        half = max(1, size.layers // 2)
        self.encoder = nn.ModuleList([nn.TransformerEncoderLayer(*shape, **options) for _ in range(half)])
        self.decoder = nn.ModuleList([nn.TransformerDecoderLayer(*shape, **options) for _ in range(half)])
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(size.sequence))

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss."""
        memory = x = self.tokens(tokens)
        for block in self.encoder:
            memory = block(memory)
        for block in self.decoder:
            x = block(x, memory, tgt_mask=self.mask)
        logits = F.linear(x, self.tokens.weight)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class ViT(nn.Module):
    """Patches of an image; `sequence` of them."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.patch = nn.Linear(48, size.width)
        self.positions = nn.Parameter(torch.zeros(size.sequence, size.width))
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        shape = size.width, size.heads, 4 * size.width
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(*shape, **options) for _ in range(size.layers)])
        self.head = nn.Linear(size.width, 10)

    def forward(self, patches: Tensor) -> Tensor:
        """The loss."""
        x = self.patch(patches) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1)).square().mean()


class Gpt(nn.Module):
    """The demo's model."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.model = GPT(GPTConfig(size.layers, size.width, size.heads, size.sequence, VOCABULARY))

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss."""
        return self.model(tokens, tokens)


MODELS = {"gpt": Gpt, "llama": Llama, "t5": T5, "vit": ViT}


def batch_of(name: str, size: Size, number: int, device: torch.device) -> Tensor:
    """The batch of step `number`, the same for every method."""
    generator = torch.Generator().manual_seed(number)
    if name == "vit":
        return torch.randn(size.batch, size.sequence, 48, generator=generator).to(device)
    return torch.randint(0, VOCABULARY, (size.batch, size.sequence), generator=generator).to(device)
