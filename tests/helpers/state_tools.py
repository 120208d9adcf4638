"""Small models of every kind, whose parameters and optimizer state are offloaded; plain training; comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import ssdtrain
from ssdtrain.tools.demo.model import Block, GPTConfig

WIDTH = 48
EAGER_STATE = {"min_nbytes": 1024, "staging_nbytes": 64 * 1024}


class MLP(nn.Module):
    """Residual blocks of two layers."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(F.gelu(self.up(x)))

    def __init__(self, num_blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(self.Block() for _ in range(num_blocks)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x).square().mean()


class TokenModel(nn.Module):
    """A GPT that makes its tokens of floating point numbers."""

    def __init__(self, *, is_tied: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(64, WIDTH), nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList(Block(GPTConfig(3, WIDTH, 4, 16)) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64, bias=False)
        if is_tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = (x[:, :, 0].abs() * 50).long() % 64
        x = self.tokens(tokens) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), tokens.flatten())


class LoRA(nn.Module):
    """Frozen layers, each with two small trainable ones beside it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
            self.a, self.b = nn.Linear(WIDTH, 8, bias=False), nn.Linear(8, WIDTH, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.tanh(self.base(x) + self.b(self.a(x)))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Block() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


class MoE(nn.Module):
    """Blocks whose experts run or do not, with a loss on the side that is computed after the block's output."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(WIDTH, 4)
            self.experts = nn.ModuleList(MLP.Block() for _ in range(4))
            self.balance: torch.Tensor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.reshape(-1, WIDTH)
            weights = self.router(flat).softmax(-1)
            best = weights.argmax(-1)
            y = torch.zeros_like(flat)
            for i, expert in enumerate(self.experts):
                rows = (best == i).nonzero().flatten()
                if len(rows):
                    y = y.index_add(0, rows, expert(flat[rows]) * weights[rows, i : i + 1])
            self.balance = (self.router(flat).softmax(-1).mean(0) ** 2).sum()
            return x + y.view_as(x)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean() + 0.1 * torch.stack([layer.balance for layer in self.layers]).sum()


class EncoderDecoder(nn.Module):
    """Every block of the decoder looks at the encoder's result."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(WIDTH, 4, 2, 2, 2 * WIDTH, dropout=0.1, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x, x.flip(1)).square().mean()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": MLP,
    "gpt": lambda: TokenModel(is_tied=False),
    "tied": lambda: TokenModel(is_tied=True),
    "lora": LoRA,
    "moe": MoE,
    "encoder-decoder": EncoderDecoder,
}


def batch(step: int) -> torch.Tensor:
    """The same for everybody."""
    return torch.randn(3, 16, WIDTH, generator=torch.Generator().manual_seed(step), device="cpu")


def model_of(kind: str) -> nn.Module:
    """With the same values every time."""
    torch.manual_seed(0)
    return MODELS[kind]()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer gets."""
    return [p for p in model.parameters() if p.requires_grad]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    num_steps: int = 10,
    *,
    first: int = 0,
    activations: Path | None = None,
    between: Callable[[], object] = lambda: None,
) -> list[torch.Tensor]:
    """The losses of some steps."""
    losses = []
    context: Any = contextlib.nullcontext()
    if activations is not None:
        context = ssdtrain.offload_activations(activations, {"min_nbytes": 0, "mode": "all"})
    with context:
        for step in range(first, first + num_steps):
            torch.manual_seed(step)
            loss = model(batch(step).to(next(model.parameters()).device))
            loss.backward()
            between()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    if activations is not None:
        context.close()
    return losses


def grad_nbytes(model: nn.Module) -> int:
    """Bytes of the gradients that are in memory."""
    return sum(p.grad.nbytes for p in model.parameters() if type(p.grad) is torch.Tensor)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a model's state."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def check_same(actual: Any, expected: Any, where: str = "") -> None:
    """Equal to the bit, keys included."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), (where, list(actual), list(expected))
        for key, value in expected.items():
            check_same(actual[key], value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for i, value in enumerate(expected):
            check_same(actual[i], value, f"{where}[{i}]")
    else:
        assert actual == expected, (where, actual, expected)


def check_same_state(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """State dicts of optimizers, whatever the order of the keys of one parameter."""
    assert actual["param_groups"] == expected["param_groups"]
    assert actual["state"].keys() == expected["state"].keys()
    for i, state in expected["state"].items():
        if not isinstance(state, dict):
            assert actual["state"][i] == state
            continue
        check_same({key: actual["state"][i][key] for key in state}, state, f"state {i}")
        assert actual["state"][i].keys() == state.keys()


def adamw(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    """AdamW with a learning rate that moves things."""
    return torch.optim.AdamW(parameters, **({"lr": 1e-2} | options))
