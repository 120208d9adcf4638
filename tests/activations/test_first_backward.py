"""Reloads of a first backward, before any order is known: nothing is read twice."""

from __future__ import annotations

from typing import Any

import inside
import pytest
import torch
from conftest import Send, assert_same, gauges, send

import ssdtrain
from ssdtrain.stats import Stats

Offload = ssdtrain.ActivationOffload


class Product(torch.autograd.Function):
    """Reads its saved tensors item by item."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b, c)
        return a * b * c

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return (
            grad * ctx.saved_tensors[1] * ctx.saved_tensors[2],
            grad * ctx.saved_tensors[0] * ctx.saved_tensors[2],
            grad * ctx.saved_tensors[0] * ctx.saved_tensors[1],
        )


def products(x: torch.Tensor) -> torch.Tensor:
    for _ in range(3):
        x = Product.apply(torch.sin(x), torch.cos(x), torch.tanh(x))
    return x.square().sum()


def first_backward(offload: Offload, forward: Any, x: torch.Tensor) -> Stats:
    with offload:
        loss = forward(x)
        send()
    loss.backward()
    return offload.stats


@pytest.mark.cpu_only
def test_what_is_to_come_later_is_not_dropped(make_offload: Any) -> None:
    """Backward goes through every second operator and then through the others, the first of which nobody foresaw."""
    offload = make_offload()
    x, y = (torch.randn(32, 64, requires_grad=True) for _ in range(2))
    with offload:
        left, right = x, y
        for _ in range(6):
            left, right = left.sin(), right.sin()
        left, right = left.sum(), right.sum()
        send()
    left.backward()
    inside.transport_of(inside.store(offload)).engine.drain()  # what was prefetched is there
    right.backward()
    stats = offload.stats
    assert stats.read_nbytes <= stats.offloaded_nbytes, stats
    assert stats.num_demand_reloads <= 2, stats


def test_items_are_read_once(make_offload: Any) -> None:
    def run(send: Send) -> Any:
        x = torch.randn(64, 64, requires_grad=True)
        loss = products(x)
        send()
        loss.backward()
        return x.grad

    assert_same(run, make_offload())
    x = torch.randn(64, 64, requires_grad=True)
    offload = make_offload()
    for step in (1, 2):
        before = offload.stats.read_nbytes
        stats = first_backward(offload, products, x)
        node = 3 * x.nbytes
        most = stats.offloaded_nbytes // step + (node if step == 1 else 0)  # the first node is how it is learned
        assert stats.read_nbytes - before <= most, stats


@pytest.mark.cpu_only
def test_items_are_held_while_the_node_runs_and_no_longer(make_offload: Any) -> None:
    held: list[int] = []
    kept = torch.randn(64, 64, requires_grad=True)

    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            y = x.sin()
            ctx.save_for_backward(y)
            return y * 1

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            addresses = [ctx.saved_tensors[0].untyped_storage()._cdata for _ in range(4)]
            held.append(len(set(addresses[1:])))
            return grad * ctx.saved_tensors[0]

    offload = make_offload()
    with offload:
        loss = Reads.apply(Reads.apply(kept)).sum()
        send()
    loss.backward(retain_graph=True)
    held_nbytes = gauges(offload)[0]
    loss.backward()
    assert held == [1] * 4
    assert held_nbytes < kept.nbytes, "backward is over"
