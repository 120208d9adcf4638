"""Activation checkpointing inside an offload context: what it saves is offloaded, what it recomputes does not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import Send, assert_same, unhooked
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import ssdtrain

Offload = ssdtrain.ActivationOffload


class Block(nn.Module):
    """Enough of a layer: two products, dropout, and a tensor from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(32, 64), nn.Linear(64, 32), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.dropout(nn.functional.gelu(self.up(x)))
        return x + self.down(hidden if scale is None else hidden * scale)


def blocks(num: int = 4) -> nn.ModuleList:
    torch.manual_seed(1)
    return nn.ModuleList(Block() for _ in range(num))


def one_by_one(model: nn.ModuleList, x: torch.Tensor, reentrant: bool) -> torch.Tensor:
    for block in model:
        x = checkpoint(block, x, use_reentrant=reentrant)
    return x


def nested(model: nn.ModuleList, x: torch.Tensor, reentrant: bool) -> torch.Tensor:
    """A checkpoint of checkpoints: recomputation inside recomputation."""

    def half(part: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
        return one_by_one(part, x, reentrant)

    return checkpoint(half, model[2:], checkpoint(half, model[:2], x, use_reentrant=reentrant), use_reentrant=reentrant)


def sequential(model: nn.ModuleList, x: torch.Tensor, reentrant: bool) -> torch.Tensor:
    return checkpoint_sequential(nn.Sequential(*model), 2, x, use_reentrant=reentrant)


def closed_over(model: nn.ModuleList, x: torch.Tensor, reentrant: bool) -> torch.Tensor:
    """A tensor that reaches the function by its closure: the checkpoint does not see it, recomputation uses it."""
    scale = x.mean(0).repeat(2).detach() * 1
    for block in model:
        x = checkpoint(lambda y, block=block: block(y, scale=scale), x, use_reentrant=reentrant)
    return x


def by_keyword(model: nn.ModuleList, x: torch.Tensor, reentrant: bool) -> torch.Tensor:
    assert not reentrant
    scale = x.mean(0).repeat(2) * 1
    for block in model:
        x = checkpoint(block, x, scale=scale, use_reentrant=False)
    return x


def every_other(model: nn.ModuleList, x: torch.Tensor, reentrant: bool) -> torch.Tensor:
    """Mixed with layers that save as usual."""
    for i, block in enumerate(model):
        x = checkpoint(block, x, use_reentrant=reentrant) if i % 2 else block(x)
    return x


def selective(model: nn.ModuleList, x: torch.Tensor, reentrant: bool) -> torch.Tensor:
    """Products are kept by the checkpoint, the rest is recomputed."""
    assert not reentrant

    def decide(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE

    for block in model:
        contexts = partial(create_selective_checkpoint_contexts, decide)
        x = checkpoint(block, x, use_reentrant=False, context_fn=contexts, **unhooked())
    return x


CASES = [
    *(
        (f, reentrant)
        for f in (one_by_one, nested, sequential, closed_over, every_other)
        for reentrant in (True, False)
    ),
    (by_keyword, False),
    (selective, False),
]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # of inner checkpoints, rightly
@pytest.mark.parametrize("function, reentrant", CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_checkpoint(offload: Offload, function: Callable[..., torch.Tensor], reentrant: bool) -> None:
    """Recomputation runs in backward, right before its results are used: sending those to the drive is pure loss."""
    num_records: list[int] = []
    num_offloaded: list[int] = []

    def run(send: Send) -> Any:
        model, x = blocks(), torch.randn(8, 32)
        loss = function(model, x.requires_grad_() * 1, reentrant).square().sum()
        num_records.append(offload.stats.num_live_records)
        send()
        num_offloaded.append(offload.stats.num_offloaded)
        loss.backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    assert_same(run, offload)
    assert offload.stats.num_offloaded == num_offloaded[-1] > 0
    with offload:
        loss = nn.Sequential(*blocks())(torch.randn(8, 32)).square().sum()
        assert 0 < num_records[-1] < offload.stats.num_live_records, "forward must not save what is recomputed"
        del loss


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_outside_the_context(offload: Offload, reentrant: bool) -> None:
    """The whole step inside a checkpointed function that enters the context by itself, again in recomputation."""

    def run(send: Send) -> Any:
        model, x = blocks(2), torch.randn(8, 32, requires_grad=True)

        def body(y: torch.Tensor) -> torch.Tensor:
            with offload if is_ours[0] else ssdtrain.keep_resident():
                return model[1](model[0](y))

        loss = checkpoint(body, x * 1, use_reentrant=reentrant).square().sum()
        send()
        loss.backward()
        is_ours[0] = True
        return [x.grad, *(p.grad for p in model.parameters())]

    is_ours = [False]
    assert_same(run, offload)
