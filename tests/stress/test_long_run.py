"""A month of training: nothing may grow from step to step."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import inside
import pytest
import torch

import ssdtrain

PAGE = os.sysconf("SC_PAGE_SIZE")


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def holdings(offload: ssdtrain.ActivationOffload) -> dict[str, int]:
    store = inside.store(offload)
    transport = inside.transport_of(store)
    assert transport is not None
    offload.stats  # noqa: B018  takes note of what the engine did
    return {
        "records": store.counters.num_live_records,
        "held": store.counters.held_nbytes,
        "prefetched": store.counters.prefetched_nbytes,
        "extents": transport.space.in_use_nbytes,
        "slabs": transport.engine.staging_in_use_nbytes,
        "writes": len(transport.pending.writes),
        "reads": len(transport.pending.reads),
        "pending_reads": len(store.reloads._under_way),
        "filed": len(store.index._records),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


@pytest.mark.parametrize("engine", ["io_uring", "threads", "python"])
def test_a_thousand_steps_are_flat(tmp_path: Path, engine: str) -> None:
    """Records, extents, slabs, descriptors, threads and memory after 1,000 steps are those after 200; every tenth
    graph is dropped without a backward."""
    num_steps = 1000 if engine != "python" else 300
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[m for _ in range(4) for m in (torch.nn.Linear(64, 64), torch.nn.GELU())])
    policy = {"min_nbytes": "4KiB", "mode": "all", "staging_nbytes": "256KiB", "engine": engine}
    with ssdtrain.offload_activations(tmp_path, policy) as offload:
        transport = inside.transport(offload)
        assert transport is not None
        for step in range(num_steps):
            loss = model(torch.randn(64, 64)).square().sum()
            if step % 10:
                loss.backward()
            del loss
            if step == 200:
                gc.collect()
                transport.engine.drain()
                early, early_rss = holdings(offload), rss()
        gc.collect()
        transport.engine.drain()
        late, late_rss = holdings(offload), rss()
    assert late == early
    assert late["records"] == late["held"] == late["extents"] == late["slabs"] == late["filed"] == 0
    assert late_rss - early_rss < 8 << 20
    assert offload.stats.read_nbytes > 0
