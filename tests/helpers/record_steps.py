"""Records steps of small models for the planner's tests: run as a script it writes `tests/data/steps`.

What is recorded is what `offload_activations` itself sees: sizes, order, and times measured on this machine. The models
have the shapes of well-known ones and a few thousand parameters; times are scaled to a step of 10 s.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator

import inside
import torch
from steps import FOLDER
from torch import Tensor, nn
from torch.nn import functional as F

import ssdtrain
from ssdtrain.planner import Step
from ssdtrain.tools.demo.model import GPT, GPTConfig

_MOST_RECORDS = 16  # the solver answers in seconds
_STEP_SECONDS = 10.0


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class LlamaBlock(nn.Module):
    """Grouped-query attention and a gated perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, RMSNorm(width), RMSNorm(width)
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, width // 2, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        h = self.norm1(x)
        q = self.q(h).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = self.kv(h).view(batch, length, 2, self.heads // 4, -1).permute(2, 0, 3, 1, 4)
        k, v = (t.repeat_interleave(4, dim=1) for t in (k, v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class EncoderDecoder(nn.Module):
    """The shape of a T5: backward asks for the encoder's last tensors only after all of the decoder's."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Transformer(width, 4, 1, 2, 4 * width, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, x[:, :32]).square().mean()


class VisionTransformer(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(self.patches(images).flatten(2).transpose(1, 2)).square().mean()


class Residual(nn.Module):
    def __init__(self, channels: int, wider: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, wider, 3, stride, 1), nn.BatchNorm2d(wider)
        self.conv2, self.norm2 = nn.Conv2d(wider, wider, 3, 1, 1), nn.BatchNorm2d(wider)
        self.skip = nn.Conv2d(channels, wider, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + self.skip(x))


class Experts(nn.Module):
    """A mixture: each expert sees some of the tokens, so sizes differ."""

    def __init__(self, width: int = 64, num: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, num)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(num)
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().flatten()
            out = out.index_add(0, rows, expert(tokens[rows]) * weights[rows, None])
        return (x + out.view_as(x)).square().mean()


def forward_backward(model: nn.Module, *inputs: Tensor) -> Callable[[], None]:
    return lambda: model(*inputs).mean().backward()


def one_f_one_b(model: nn.Module, depth: int, num: int, *inputs: Tensor) -> Callable[[], None]:
    """The middle stage of a pipeline: up to `depth` micro-batches are alive."""

    def run() -> None:
        losses = [model(*inputs).mean() for _ in range(depth)]
        for i in range(num):
            losses.pop(0).backward()
            if i + depth < num:
                losses.append(model(*inputs).mean())

    return run


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    torch.manual_seed(0)
    tokens = torch.randint(0, 256, (4, 64))
    hidden = torch.randn(4, 64, 64)
    gpt = GPT(GPTConfig(layers=1, width=64, heads=4, sequence=64))
    llama = nn.Sequential(LlamaBlock(64, 8))
    blocks = nn.Sequential(Residual(3, 16, 2), Residual(16, 32, 2))
    dense = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.GELU())
    yield "gpt", forward_backward(gpt, tokens, tokens)
    yield "llama", forward_backward(llama, hidden)
    yield "t5", forward_backward(EncoderDecoder(), hidden)
    yield "vit", forward_backward(VisionTransformer(), torch.randn(4, 3, 64, 64))
    yield "resnet", forward_backward(blocks, torch.randn(4, 3, 64, 64))
    yield "moe", forward_backward(Experts(), hidden)
    yield "1f1b_dense", one_f_one_b(dense, 3, 5, hidden)
    yield "1f1b_moe", one_f_one_b(Experts(), 2, 3, hidden)
    yield "1f1b_resnet", one_f_one_b(blocks, 2, 3, torch.randn(4, 3, 64, 64))


def record(run: Callable[[], None]) -> Step:
    """A step with at most `_MOST_RECORDS` records: those at least as large as it takes for that."""
    for min_nbytes in (2048 * 2**k for k in range(12)):
        with tempfile.TemporaryDirectory() as folder:
            policy = {"min_nbytes": min_nbytes, "staging_nbytes": "64MiB", "decline_below_nbytes": 0}
            with ssdtrain.offload_activations(folder, policy) as offload:
                for _ in range(3):
                    run()
                step = inside.step(offload).as_step(inside.counters(offload).compute_seconds())
        if len(step.records) <= _MOST_RECORDS:
            return step
    raise ValueError("Expected a step that can be cut down to few records")


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, run in cases():
        step = record(run)
        scale = _STEP_SECONDS / step.seconds
        rows = [
            [r.nbytes, round(r.saved * scale, 5), round(r.needed * scale, 5), round(r.released * scale, 5)]
            + [r.micro_batch, r.module]
            for r in step.records
        ]
        text = ",\n    ".join(json.dumps(row) for row in rows)
        data = f'{{\n  "seconds": {_STEP_SECONDS},\n  "records": [\n    {text}\n  ]\n}}\n'
        (FOLDER / f"{name}.json").write_text(data)
        print(name, len(rows))


if __name__ == "__main__":
    main()
