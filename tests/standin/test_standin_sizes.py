"""Sizes that do not fit: copies across steps of the host tier, records larger than what may be prefetched."""

from __future__ import annotations

from typing import Any

import pytest
import standin_gpu
import torch
from standin_tools import make

from ssdtrain.devices.cuda import CudaDevice


def test_copies_across_the_steps_of_the_host_tier(make: Any) -> None:
    """The host tier grows by steps, each registered by itself; CUDA refuses a copy that touches two. The length is no
    multiple of the slabs' so that records come to lie across."""
    x = torch.linspace(0, 1, ((5 << 20) + (12 << 10)) // 4, device="cuda", requires_grad=True)

    def gradient(context: Any) -> torch.Tensor:
        x.grad = None
        with context:
            y = x
            for _ in range(70):
                y = y.sin()
        y.sum().backward()
        assert x.grad is not None
        return x.grad.cpu()

    before = standin_gpu.counts()["copies_refused"]
    offload = make("host", mode="all", host_nbytes="1GiB", staging_nbytes="64MiB")
    ours = gradient(offload)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        y = x.detach().requires_grad_()
        z = y
        for _ in range(70):
            z = z.sin()
        z.sum().backward()
    assert torch.equal(ours, y.grad.cpu())
    assert standin_gpu.counts()["copies_refused"] == before
    assert offload.stats.num_offloaded > 0


@pytest.mark.parametrize("prefetch", ["512KiB", "1MiB", "4MiB"])
def test_a_record_larger_than_what_may_be_prefetched(make: Any, prefetch: str) -> None:
    """Records of 1 MiB: one at a time is always allowed, so that backward finds it there."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[m for _ in range(6) for m in (torch.nn.Linear(256, 256), torch.nn.GELU())]).cuda()
    x = torch.randn(1024, 256, device="cuda")
    model(x).square().mean().backward()
    expected = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
    offload = make("drive", mode="all", staging_nbytes="8MiB", prefetch_nbytes=prefetch)
    for _ in range(4):
        model.zero_grad()
        with offload:
            loss = model(x).square().mean()
        loss.backward()
        assert all(map(torch.equal, [p.grad.cpu() for p in model.parameters() if p.grad is not None], expected))
    stats = offload.stats
    assert stats.num_offloaded > 0
    assert stats.num_prefetched > 0, str(stats)


def test_bounds_follow_the_device_and_its_records(make: Any) -> None:
    """Twice the largest record, as far as an eighth of the device's memory (8 GiB) allows: nobody set a bound."""
    offload = make("drive", staging_nbytes="128MiB")
    with offload:
        offload._pack(torch.empty(100 << 20, dtype=torch.uint8, device="cuda"))
    assert (offload.stats.staging_limit_nbytes, offload.stats.prefetch_limit_nbytes) == (128 << 20, 200 << 20)
    assert 0 < CudaDevice(0).free_nbytes() <= 8 << 30
