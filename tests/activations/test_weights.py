"""Weights are never offloaded: they stay in memory whatever autograd saves of them, so moving them frees nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import MakeOffload, gauges, send, without_cudnn, without_onednn
from torch import nn
from torch.nn import functional as F

WIDTH = 64
LIMIT = 4096  # every activation here is smaller, every weight larger
RECURRENT_LIMIT = 30 * 1024  # the library's workspace is smaller


class Lora(nn.Module):
    """A frozen weight and a trained low-rank correction."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.up(self.down(x))


class Functional(nn.Module):
    """One weight, used in a way given by a function."""

    def __init__(self, use: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.randn(WIDTH, WIDTH)), use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(x, self.weight)


def qkv(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Chunks of one weight, as fused projections are split for tensor parallelism."""
    return torch.cat([F.linear(x, part) for part in weight.chunk(2)], -1)


def tied(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(F.embedding(torch.arange(3), weight) + x[:3], weight)


class Image(nn.Module):
    """A layer that wants images of few pixels and many channels."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.reshape(1, WIDTH, -1)[..., :4].contiguous())


class Recurrent(nn.Module):
    """A layer that returns more than its output, fed with one time step."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x[:1])[0]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "linear without bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "two linears": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)),
    "frozen linear": lambda: nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    ),
    "lora": lambda: nn.Sequential(Lora(), nn.Tanh(), Lora()),
    "bilinear": lambda: Functional(lambda x, w: F.bilinear(x, x, w.expand(2, WIDTH, WIDTH))),
    "convolution": lambda: Image(nn.Conv1d(WIDTH, WIDTH, 3)),
    "transposed convolution": lambda: Image(nn.ConvTranspose1d(WIDTH, WIDTH, 2)),
    "attention": lambda: nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, dropout=0.0, batch_first=True),
    "lstm": lambda: Recurrent(nn.LSTM(WIDTH, WIDTH)),
    "transposed by hand": lambda: Functional(lambda x, w: x @ w.t()),
    "viewed by hand": lambda: Functional(
        lambda x, w: x @ w.view(2, 32, WIDTH).unflatten(2, (8, 8)).flatten(2).flatten(0, 1)
    ),
    "squeezed and expanded": lambda: Functional(lambda x, w: x * w.unsqueeze(0).expand(1, -1, -1).squeeze(0)[:4]),
    "in chunks": lambda: Functional(qkv),
    "tied": lambda: Functional(tied),
    "cast by hand": lambda: Functional(lambda x, w: (x.bfloat16() @ w.to(torch.bfloat16).t()).float()),
    "detached": lambda: Functional(lambda x, w: x @ w.detach() + x @ w),
}


def step(model: nn.Module, precision: str, between: Callable[[], object] = send) -> list[torch.Tensor | None]:
    torch.manual_seed(2)
    x = torch.randn(4, WIDTH, requires_grad=True)
    # oneDNN has no LSTM in bfloat16 for processors without AVX-512.
    own_kernels = without_onednn() if precision == "autocast" else contextlib.nullcontext()
    with (
        own_kernels,
        without_cudnn(),
        torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=precision == "autocast"),
    ):
        loss = model(x.reshape(1, 4, WIDTH) if isinstance(model, nn.TransformerEncoderLayer) else x).float().sum()
    between()  # what the last operator saved starts only when another one follows
    loss.backward()
    return [x.grad, *(p.grad for p in model.parameters())]


COPIED_BY_HAND = ("cast by hand",)  # outside autocast nobody keeps these, see test_memory
WITH_COPIES = ("frozen linear", "lora", "detached")  # under autocast, see test_uncached_copies_are_offloaded


@pytest.mark.parametrize(
    "name, precision",
    [(name, "float32") for name in MODELS if name not in COPIED_BY_HAND]
    + [(name, "autocast") for name in MODELS if name not in WITH_COPIES],
)
def test_weights_are_never_offloaded(make_offload: MakeOffload, name: str, precision: str) -> None:
    """Eager `Linear` saves `weight.t()`, autocast saves a low-precision copy: neither is the parameter itself."""
    torch.manual_seed(1)
    model = MODELS[name]()
    expected = step(model, precision)
    model.zero_grad()
    limit = RECURRENT_LIMIT if isinstance(model, Recurrent) else LIMIT
    offload = make_offload(model if name == "detached" else None, min_nbytes=limit)
    with offload:
        actual = step(model, precision)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    stats = offload.stats
    assert stats.num_offloaded == 0 and stats.offloaded_nbytes == 0, str(stats)
    assert stats.num_live_records == 0 and stats.written_nbytes == 0
    assert stats.skipped["weight"].count > 0


@pytest.mark.parametrize("name", WITH_COPIES)
def test_uncached_copies_are_offloaded(make_offload: MakeOffload, name: str) -> None:
    """Autocast copies a weight that needs no gradient anew for every use and does not keep the copy: only the graph
    holds it, so that sending it to the drive frees memory as with any activation."""
    torch.manual_seed(1)
    model = MODELS[name]()
    expected = step(model, "autocast")
    model.zero_grad()
    offload = make_offload(model, min_nbytes=LIMIT)
    with offload:
        actual = step(model, "autocast")
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert offload.stats.num_offloaded > 0
    assert offload.stats.offloaded_nbytes == offload.stats.num_offloaded * WIDTH * WIDTH * 2


class Rotary(nn.Module):
    """Multiplies with a table that is a buffer."""

    def __init__(self, register: Callable[[nn.Module, torch.Tensor], Any]) -> None:
        super().__init__()
        register(self, torch.randn(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:1] * self.table


@pytest.mark.parametrize("is_named", [True, False], ids=["model given", "no model"])
@pytest.mark.parametrize("kind", ["register_buffer", "nn.Buffer"])
def test_buffers(make_offload: MakeOffload, kind: str, is_named: bool) -> None:
    """`register_buffer` takes a plain tensor: only the model tells. Without it, it is found to outlive its graph, once
    the engine is through with it: while it copies from a storage, nothing is known of who else holds that."""
    if kind == "nn.Buffer":
        model = Rotary(lambda module, table: setattr(module, "table", nn.Buffer(table)))
    else:
        model = Rotary(lambda module, table: module.register_buffer("table", table))
    expected = step(model, "float32")
    offload = make_offload(model if is_named else None, min_nbytes=LIMIT, mode="auto")

    def send_all() -> None:
        send()
        gauges(offload)  # waits for the engine

    for _ in range(3):
        with offload:
            assert torch.equal(step(model, "float32", send_all)[0], expected[0])
    skipped = offload.stats.skipped
    if is_named or kind == "nn.Buffer":
        assert skipped["weight"].count == 3
    else:
        assert skipped["outlives its graph"].count == 2
    assert offload.stats.read_nbytes == 0


def test_a_computed_weight_is_an_activation(make_offload: MakeOffload) -> None:
    """Weight normalisation makes a new weight in every forward: it lives as long as its graph, and is offloaded."""
    torch.manual_seed(1)
    model = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
    expected = step(model, "float32")
    model.zero_grad()
    offload = make_offload(min_nbytes=LIMIT)
    with offload:
        actual = step(model, "float32")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert sum(v.count for k, v in offload.stats.skipped.items() if k == "weight") > 0
    assert offload.stats.num_saved > 0
