"""Programs that keep several streams busy at once: the numbers are those of the same program without ssdtrain."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import torch
from standin_tools import TIERS, Context, are_equal, blocks, make, on_host, train

ROWS, WIDTH = 256, 128


class Exchange(torch.autograd.Function):
    """Sends rows to other places, as an all-to-all does: into a buffer of the calling stream, by copies on another.

    Nobody waits here: who reads the rows waits for the copies.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, copies: torch.cuda.Stream) -> torch.Tensor:
        ctx.save_for_backward(order)
        ctx.copies = copies
        return _sent(rows, order, copies)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (order,) = ctx.saved_tensors
        sent = _sent(grad, order.argsort(), ctx.copies)
        torch.cuda.current_stream().wait_stream(ctx.copies)
        return sent, None, None


def _sent(rows: torch.Tensor, order: torch.Tensor, copies: torch.cuda.Stream) -> torch.Tensor:
    sent = torch.empty_like(rows)
    copies.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(copies):
        torch.index_select(rows, 0, order, out=sent)
    for tensor in (rows, order, sent):
        tensor.record_stream(copies)
    return sent


class Mixture(torch.nn.Module):
    """Tokens are sent to experts and back in two halves. Each half has a stream for its expert, both share one for the
    copies: while one half is computed the other is sent."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.router, self.experts = torch.nn.Linear(WIDTH, WIDTH), torch.nn.ModuleList([blocks(2), blocks(2)])
        self.cuda()
        self.copies, self.streams = torch.cuda.Stream(), [torch.cuda.Stream(), torch.cuda.Stream()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        main = torch.cuda.current_stream()
        routed = self.router(x)
        results = []
        for half, expert, stream in zip(routed.chunk(2), self.experts, self.streams, strict=True):
            order = half.detach()[:, 0].argsort()
            there = Exchange.apply(half, order, self.copies)
            stream.wait_stream(self.copies)
            with torch.cuda.stream(stream):
                there.record_stream(stream), order.record_stream(stream)
                computed = expert(there)
                back = Exchange.apply(computed, order.argsort(), self.copies)
            results.append(back)
        main.wait_stream(self.copies)
        for result in results:
            result.record_stream(main)
        return torch.cat(results) + x


@pytest.mark.parametrize("mode, tier", TIERS)
def test_experts_on_streams_of_their_own_with_an_exchange_of_tokens(make: Any, mode: str, tier: str) -> None:
    def model() -> torch.nn.Module:
        return torch.nn.Sequential(*[Mixture(seed) for seed in range(3)])

    expected = on_host(train(model(), contextlib.nullcontext()))
    offload = make(tier, mode=mode, min_nbytes=0)
    assert are_equal(on_host(train(model(), offload)), expected)
    assert offload.stats.num_offloaded > 0


@pytest.mark.parametrize("mode, tier", TIERS)
def test_two_streams_in_turn(make: Any, mode: str, tier: str) -> None:
    """One thread queues a layer of one model on one stream, then a layer of another on another."""

    def run(context: Context) -> list[torch.Tensor]:
        models, streams = [blocks(), blocks()], [torch.cuda.Stream(), torch.cuda.Stream()]
        torch.cuda.synchronize()
        for step in range(3):
            values = [torch.full((ROWS, WIDTH), step + 1.0, device="cuda") for _ in models]
            for stream in streams:
                stream.wait_stream(torch.cuda.current_stream())
            with context:
                for layers in zip(*models, strict=True):
                    for index, layer in enumerate(layers):
                        with torch.cuda.stream(streams[index]):
                            values[index].record_stream(streams[index])
                            values[index] = layer(values[index])
            for stream, value in zip(streams, values, strict=True):
                with torch.cuda.stream(stream):
                    value.square().mean().backward()
            del values, value
        return on_host([p.grad for model in models for p in model.parameters() if p.grad is not None])

    expected = run(contextlib.nullcontext())
    offload = make(tier, mode=mode, min_nbytes=0)
    assert are_equal(run(offload), expected)
    assert offload.stats.num_offloaded > 0


@pytest.mark.parametrize("mode, tier", TIERS)
def test_two_threads_with_contexts_of_their_own(make: Any, mode: str, tier: str) -> None:
    """On one stream each, one of them the default one."""
    expected = on_host(train(blocks(), contextlib.nullcontext()))
    offloads = [make(tier, mode=mode, min_nbytes=0) for _ in range(2)]
    models, results = [blocks(), blocks()], {}
    streams = [torch.cuda.default_stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()

    def body(index: int) -> None:
        with torch.cuda.stream(streams[index]):
            results[index] = train(models[index], offloads[index])

    threads = [threading.Thread(target=body, args=(index,)) for index in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for index, offload in enumerate(offloads):
        assert are_equal(on_host(results[index]), expected)
        assert offload.stats.num_offloaded > 0
