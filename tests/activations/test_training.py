"""Whole training steps, in the ways loops are written: losses and parameters equal to the bit after some of them."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import EAGER, MakeOffload, Send, assert_same, same_bits, send
from torch import nn
from torch.nn import functional as F

import ssdtrain

Offload = ssdtrain.ActivationOffload
WIDTH = 32


class FusedAttention(nn.Module):
    """One projection, three views of its result: all saved by the attention, one storage."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gate and value are halves of one product."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * value)


class TiedLanguageModel(nn.Module):
    """Embedding and head share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(50, WIDTH), SwiGLU()
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = (x.abs() * 100).long() % 50
        return self.head(self.body(self.embedding(tokens[..., 0])))


class Lora(nn.Module):
    """A frozen body with a trained correction."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.body(x) + self.up(F.dropout(self.down(x), 0.1)))


class First(nn.Module):
    """The first of what a layer returns."""

    def __init__(self, layer: nn.Module, *, repeat: int = 1) -> None:
        super().__init__()
        self.layer, self.repeat = layer, repeat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(*[x] * self.repeat)[0]


class InPlace(nn.Module):
    """In-place activations as torchvision writes them, and residuals added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.one(x), inplace=True)
        y = F.dropout(self.two(y), 0.1, inplace=True)
        y += x
        return F.elu_(y)


# cuDNN draws it from a state of its own, which goes on from run to run: no seed resets that.
BETWEEN_LAYERS = 0.0 if torch.cuda.is_available() and torch.backends.cudnn.enabled else 0.1

MODELS: dict[str, Callable[[], nn.Module]] = {
    "multi-head attention": lambda: First(nn.MultiheadAttention(WIDTH, 4, dropout=0.1, batch_first=True), repeat=3),
    "transformer layer": lambda: nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True),
    "fused attention": lambda: nn.Sequential(nn.LayerNorm(WIDTH), FusedAttention(), FusedAttention()),
    "swiglu": lambda: nn.Sequential(nn.RMSNorm(WIDTH), SwiGLU(), SwiGLU()),
    "tied weights": TiedLanguageModel,
    "lora": lambda: nn.Sequential(Lora(), Lora(), Lora()),
    "lstm": lambda: First(nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=BETWEEN_LAYERS, batch_first=True)),
    "gru": lambda: First(nn.GRU(WIDTH, WIDTH, bidirectional=True, batch_first=True)),
    "convolutions": lambda: nn.Sequential(
        nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.MaxPool1d(2), nn.GroupNorm(2, 16)
    ),
    "dropout": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.AlphaDropout(0.2), nn.RReLU()),
    "in place": lambda: nn.Sequential(InPlace(), InPlace()),
}


def make(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = MODELS[name]()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def batch() -> torch.Tensor:
    return torch.randn(4, 16, WIDTH)


@pytest.mark.parametrize("engine", ["io_uring", "threads", "python"])
@pytest.mark.parametrize("name", MODELS)
def test_models(make_offload: MakeOffload, name: str, engine: str) -> None:
    """Three AdamW steps, everything on the drive between forward and backward."""

    def run(send: Send) -> Any:
        model, optimizer = make(name)
        losses = []
        for _ in range(3):
            loss = model(batch()).square().mean()
            send()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return [*losses, *model.state_dict().values()]

    offload = make_offload(engine=engine)
    assert_same(run, offload)
    assert offload.stats.num_live_records == 0 and offload.stats.engine == engine


# -- ways to write the loop ------------------------------------------------------------------------------------------

Context = Callable[[], Any]


def whole_loop(model: nn.Module, offload: Offload, send: Send) -> None:
    with offload:
        for _ in range(3):
            loss = model(batch()).square().mean()
            send()
            loss.backward()


def each_forward(model: nn.Module, offload: Offload, send: Send) -> None:
    """Entered for every forward and left before backward, which then runs without the hooks."""
    for _ in range(3):
        with offload:
            loss = model(batch()).square().mean()
            send()
        loss.backward()


def backward_long_after(model: nn.Module, offload: Offload, send: Send) -> None:
    """The engine must stay while a graph needs it, however long the context is left."""
    with offload:
        losses = [model(batch()).square().mean() for _ in range(3)]
        send()
    gc.collect()
    model(batch()).square().mean().backward()
    for loss in losses:
        loss.backward()


def accumulated(model: nn.Module, offload: Offload, send: Send) -> None:
    with offload:
        for _ in range(6):
            (model(batch()).square().mean() / 6).backward()
            send()


def summed_losses(model: nn.Module, offload: Offload, send: Send) -> None:
    """Several forwards, one backward."""
    with offload:
        loss = sum(model(batch()).square().mean() for _ in range(4))
        send()
    loss.backward()


def one_forward_one_backward(model: nn.Module, offload: Offload, send: Send) -> None:
    """A pipeline stage: F1 F2 B1 F3 B2 F4 B3 B4. Going by "the latest" prefetches the wrong one."""
    waiting: deque[torch.Tensor] = deque()
    with offload:
        for _ in range(4):
            waiting.append(model(batch()).square().mean())
            send()
            if len(waiting) == 2:
                waiting.popleft().backward()
        while waiting:
            waiting.popleft().backward()


def last_in_first_out(model: nn.Module, offload: Offload, send: Send) -> None:
    with offload:
        losses = [model(batch()).square().mean() for _ in range(3)]
        send()
        while losses:
            losses.pop().backward()


def nested_contexts(model: nn.Module, offload: Offload, send: Send) -> None:
    """The same object entered twice: a trainer's and the user's own."""
    with offload:
        for _ in range(2):
            with offload:
                loss = model(batch()).square().mean()
                send()
            loss.backward()


def some_kept(model: nn.Module, offload: Offload, send: Send) -> None:
    with offload:
        for _ in range(2):
            hidden = model(batch())
            with ssdtrain.keep_resident():
                loss = model(hidden).square().mean()
            del hidden
            send()
            loss.backward()


LOOPS = [
    *(whole_loop, each_forward, backward_long_after, accumulated, summed_losses),
    *(one_forward_one_backward, last_in_first_out, nested_contexts, some_kept),
]


@pytest.mark.parametrize("prefetch_nbytes", [0, 4096, 1 << 20])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_loops(make_offload: MakeOffload, loop: Callable[..., None], prefetch_nbytes: int) -> None:
    """Every order of forwards and backwards, with no prefetch, too little for a large tensor, and enough."""

    def grads(offload: Any, send: Send) -> list[torch.Tensor | None]:
        model, _ = make("fused attention")
        loop(model, offload, send)
        return [p.grad for p in model.parameters()]

    expected = grads(ssdtrain.offload_activations(".", policy={"enabled": False}), lambda: None)
    offload = make_offload(prefetch_nbytes=prefetch_nbytes)
    assert same_bits(grads(offload, send), expected)
    stats = offload.stats
    assert stats.read_nbytes > 0 and stats.num_live_records == 0
    assert (stats.num_prefetched > 0) == (prefetch_nbytes > 0)


@pytest.mark.parametrize("shared", [True, False], ids=["one object", "two objects"])
def test_two_models_interleaved(make_offload: MakeOffload, shared: bool) -> None:
    """A teacher and a student, or a GAN: two graphs grow and shrink in turns."""

    def grads(contexts: list[Any], send: Send) -> list[Any]:
        models = [make("swiglu")[0], make("fused attention")[0]]
        for _ in range(2):
            losses = []
            for model, context in zip(models, contexts, strict=True):
                with context:
                    losses.append(model(batch()).square().mean())
                    send()
            with contexts[0]:
                hidden = models[1](models[0](batch()))
                send()
            hidden.sum().backward()
            for loss in losses:
                loss.backward()
        return [p.grad for model in models for p in model.parameters()]

    disabled = ssdtrain.offload_activations(".", policy={"enabled": False})
    expected = grads([disabled, disabled], lambda: None)
    first = make_offload()
    contexts = [first, first if shared else make_offload()]
    assert same_bits(grads(contexts, send), expected)
    assert all(context.stats.read_nbytes > 0 for context in contexts)


def test_keep_resident_saves_nothing_away(offload: Offload) -> None:
    """Inside, our hooks see nothing, and in-place changes are still caught."""
    with offload:
        x = torch.randn(64, requires_grad=True)
        with ssdtrain.keep_resident():
            hidden = x * 1
            y = hidden.sin().sum()
            hidden.mul_(2)
        assert offload.stats.num_saved == 0
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_disabled_is_a_null_context(tmp_path: Any) -> None:
    """No hooks, no file, no engine: not even a directory is needed."""
    offload = ssdtrain.offload_activations(tmp_path / "missing", policy=EAGER | {"enabled": False})
    with offload as entered:
        assert entered is offload
        x = torch.randn(64, requires_grad=True)
        y = x.exp()
        assert y.grad_fn._raw_saved_result is not None
        y.sum().backward()
    stats = offload.stats
    assert stats.num_saved == stats.num_offloaded == 0 and stats.engine == ""
    assert torch.equal(x.grad, x.exp())
