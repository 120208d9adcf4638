"""Several streams and several threads: the numbers are those of the same program without ssdtrain."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import standin_gpu
import torch
from standin_tools import TIERS, Context, are_equal, blocks, gates, make, on_host, train

import ssdtrain
from ssdtrain.devices.cuda import CudaDevice

Offload = ssdtrain.ActivationOffload
MIB = 1 << 20
NUM = 1 << 18  # elements of 1 MiB


def saved_on_another_stream(context: Context, gates: Callable[[], Any]) -> float:
    """Made on stream A, saved on side stream B; B waits for A, A waits for B's backward. A goes on allocating."""
    a, b = torch.cuda.current_stream(), torch.cuda.Stream()
    w = torch.ones((), device="cuda", requires_grad=True)
    with context:
        made = [torch.full((NUM,), float(index + 1), device="cuda") for index in range(8)]
        b.wait_stream(a)
        with torch.cuda.stream(b):
            gate = gates()  # B is far behind
            loss = torch.stack([(x * w).sum() for x in made]).sum()
        del made  # the graph has them
        junk = [torch.full((NUM,), -7.0, device="cuda") for _ in range(16)]
        a.query(), gate.open()
    with torch.cuda.stream(b):
        loss.backward()
    a.wait_stream(b)
    del junk
    return float(w.grad.item())


@pytest.mark.parametrize("mode, tier", TIERS)
def test_a_block_goes_back_to_the_stream_it_is_of(make: Any, gates: Any, mode: str, tier: str) -> None:
    """A source let go after the *saving* stream waits for its copy goes to its *allocating* stream, which did not: what
    that one puts there next was copied instead. The gradient came out wrong by half, silently."""
    expected = saved_on_another_stream(contextlib.nullcontext(), gates)
    for _ in range(3):
        assert saved_on_another_stream(make(tier, mode=mode), gates) == expected


def test_the_default_stream_is_shared_with_under_its_handle(gates: Any) -> None:
    """`ExternalStream(0)` is another stream to PyTorch's allocator: to share with handle 0 must mean the default one.

    Memory is allocated on a side stream, read late on the default stream, and dropped: the side stream must not get it
    again before that.
    """
    device, side = CudaDevice(0), torch.cuda.Stream()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    with torch.cuda.stream(side):
        allocation = device.allocate(4 * MIB, 512, 512)
    address = allocation.address
    device.share(allocation.storage, device.current_stream())
    gate = gates()
    standin_gpu.enqueue(lambda: None)  # whatever reads it
    del allocation
    for _ in range(64):  # all of PyTorch's pool: only the default stream is behind
        torch.cuda.Stream().synchronize()
    with torch.cuda.stream(side):
        again = torch.empty(4 * MIB, dtype=torch.uint8, device="cuda")
    assert again.data_ptr() != address
    gate.open()


@pytest.mark.parametrize("mode, tier", TIERS)
def test_training_on_a_side_stream(make: Any, mode: str, tier: str) -> None:
    expected = on_host(train(blocks(), contextlib.nullcontext()))
    offload = make(tier, mode=mode, min_nbytes=0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert are_equal(on_host(train(blocks(), offload)), expected)
    assert offload.stats.num_offloaded > 0


@pytest.mark.parametrize("mode, tier", TIERS)
def test_forward_on_one_stream_and_backward_from_another(make: Any, mode: str, tier: str) -> None:
    """Backward of a node runs on the stream of its forward, whichever stream asks for it."""

    def run(context: Context) -> list[torch.Tensor]:
        model, side = blocks(), torch.cuda.Stream()
        x = torch.ones(256, 128, device="cuda")
        for _ in range(3):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), context:
                loss = model(x).square().mean()
            torch.cuda.current_stream().wait_stream(side)
            loss.backward()
            del loss
        return on_host([p.grad for p in model.parameters() if p.grad is not None])

    assert are_equal(run(make(tier, mode=mode, min_nbytes=0)), run(contextlib.nullcontext()))


@pytest.mark.parametrize("mode, tier", TIERS)
def test_two_threads_on_streams_of_their_own(make: Any, mode: str, tier: str) -> None:
    """One context, two models, two threads, two streams."""
    expected = on_host(train(blocks(), contextlib.nullcontext()))
    offload = make(tier, mode=mode, min_nbytes=0)
    models, results = [blocks(), blocks()], {}
    torch.cuda.synchronize()

    def body(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results[index] = train(models[index], offload)

    threads = [threading.Thread(target=body, args=(index,)) for index in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert are_equal(on_host(results[0]), expected)
    assert are_equal(on_host(results[1]), expected)


class Experts(torch.nn.Module):
    """Half of the tokens on one stream, half on another, joined: what mixtures of experts do to overlap."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.experts = torch.nn.Linear(128, 128), torch.nn.ModuleList([blocks(2), blocks(2)])
        self.cuda()
        self.side = torch.cuda.Stream()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        main = torch.cuda.current_stream()
        routed = self.router(x)
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            late = self.experts[1](routed[128:])
            routed.record_stream(self.side)
        early = self.experts[0](routed[:128])
        main.wait_stream(self.side)
        late.record_stream(main)
        return torch.cat([early, late]) + x


@pytest.mark.parametrize("mode, tier", TIERS)
def test_experts_that_overlap(make: Any, mode: str, tier: str) -> None:
    def model() -> torch.nn.Module:
        return torch.nn.Sequential(Experts(), Experts(), Experts())

    expected = on_host(train(model(), contextlib.nullcontext()))
    offload = make(tier, mode=mode, min_nbytes=0)
    assert are_equal(on_host(train(model(), offload)), expected)
    assert offload.stats.num_offloaded > 0
