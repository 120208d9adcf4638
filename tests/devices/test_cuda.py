"""On a real CUDA device: bits, memory, streams, capture. `FAIL_WITHOUT_CUDA=1` makes a missing device a failure."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import same_bits, strict_kernels
from folders import HELPERS

import ssdtrain
from ssdtrain.tools.demo.model import Block, GPTConfig

pytestmark = pytest.mark.needs_cuda

MIB = 1 << 20
BATCH = 2 if "standin_gpu" in sys.modules else 8  # where the CPU computes
ONE = BATCH * 512 * 512 * 2  # an activation in bf16
POLICY = {
    "min_nbytes": "64KiB",
    "mode": "all",
    "staging_nbytes": "16MiB",
    "prefetch_nbytes": "16MiB",
    "decline_below_nbytes": 0,
}
TIERS: dict[str, tuple[bool, dict[str, Any]]] = {
    "drive": (True, {}),
    "drive, checksum": (True, {"checksum": True}),
    "drive, threads": (True, {"engine": "threads"}),
    "drive, auto": (True, {"mode": "auto"}),
    "host": (False, {}),
    "host then drive": (True, {"host_nbytes": "32MiB"}),
}


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with strict_kernels():
        yield


def make(tmp_path: Path, tier: str = "drive", **fields: Any) -> ssdtrain.ActivationOffload:
    has_directory, own = TIERS[tier]
    return ssdtrain.offload_activations(tmp_path if has_directory else None, POLICY | own | fields)


class Blocks(torch.nn.Sequential):
    """GPT blocks in bf16: activations of `ONE` bytes."""

    def __init__(self, device: str = "cuda", layers: int = 6) -> None:
        torch.manual_seed(0)
        config = GPTConfig(layers=layers, width=512, heads=8, sequence=512)
        super().__init__(*[Block(config) for _ in range(layers)])
        self.to(device, torch.bfloat16)


def train(model: torch.nn.Module, offload: ssdtrain.ActivationOffload | None, steps: int = 3) -> list[torch.Tensor]:
    """Losses and parameters; the process never waits for the device."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator(device).manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(BATCH, 512, 512, generator=generator, device=device, dtype=torch.bfloat16)
        if offload is None:
            loss = model(x).float().square().mean()
        else:
            with offload:
                loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [tensor.cpu() for tensor in (*losses, *(p.detach() for p in model.parameters()))]


@pytest.mark.parametrize("tier", TIERS)
def test_training_is_equal_to_the_bit(tmp_path: Path, tier: str) -> None:
    expected = train(Blocks(), None)
    offload = make(tmp_path, tier)
    assert same_bits(train(Blocks(), offload), expected)
    stats = offload.stats
    assert stats.num_offloaded > 0, str(stats)
    assert (stats.read_nbytes > 0) == (tier != "host"), str(stats)
    assert (stats.host_read_nbytes > 0) == tier.startswith("host"), str(stats)
    assert not [text for text in stats.fallbacks if "pinned" in text], str(stats)
    offload.close()
    assert list(tmp_path.iterdir()) == []


def peak_of(body: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    body()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("tier", ["drive", "host"])
def test_memory_really_falls(tmp_path: Path, tier: str) -> None:
    """With the process far ahead of the device: staging, prefetch and what one block works on are what is left."""
    model = Blocks(layers=16)
    x = torch.randn(BATCH, 512, 512, device="cuda", dtype=torch.bfloat16)
    offload = make(tmp_path, tier)

    def step(context: Any) -> None:
        if context is None:
            loss = model(x).float().square().mean()
        else:
            with context:
                loss = model(x).float().square().mean()
        loss.backward()
        model.zero_grad()

    step(None), step(offload)
    plain, ours = peak_of(lambda: step(None)), peak_of(lambda: step(offload))
    gradients = sum(p.nbytes for p in model.parameters())
    in_flight = 16 * MIB + 16 * MIB  # staging: sources under way; prefetch: reloads ahead
    one_block = 24 * ONE  # results and gradients of a block, qkv and the wide layer counting 3 and 4
    if not torch.backends.cuda.flash_sdp_enabled():  # attention's weights exist: before and after softmax, gradient
        one_block += 3 * BATCH * 8 * 512 * 512 * 4
    assert plain - gradients > 16 * 10 * ONE
    assert ours <= gradients + in_flight + one_block, f"plain {plain / MIB:.0f} MiB, ours {ours / MIB:.0f} MiB"


def test_training_on_a_side_stream(tmp_path: Path) -> None:
    expected = train(Blocks(), None)
    offload = make(tmp_path)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        ours = train(Blocks(), offload)
    assert same_bits(ours, expected)
    assert offload.stats.read_nbytes > 0


def test_every_device_of_the_process(tmp_path: Path) -> None:
    """One context, one thread per device."""
    expected = train(Blocks(), None)
    models = [Blocks(f"cuda:{index}") for index in range(torch.cuda.device_count())]  # one generator makes them all
    offload = make(tmp_path)
    results: dict[int, list[torch.Tensor]] = {}

    def body(index: int) -> None:
        with torch.cuda.device(index):
            results[index] = train(models[index], offload)

    threads = [threading.Thread(target=body, args=(index,)) for index in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same_bits(results[index], expected) for index in range(torch.cuda.device_count()))


def test_capture_is_left_alone(tmp_path: Path) -> None:
    """A graph replays what it captured: nothing in it may have moved."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.GELU(), torch.nn.Linear(256, 256)).cuda()
    x = torch.randn(512, 256, device="cuda")
    offload = make(tmp_path)

    def step() -> torch.Tensor:
        with offload:
            loss = model(x).square().mean()
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    before = offload.stats.num_offloaded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    captured = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    model(x).square().mean().backward()
    assert same_bits(captured, [p.grad for p in model.parameters()])
    assert offload.stats.num_offloaded == before
    assert offload.stats.skipped["CUDA graph capture"].count > 0


def test_a_fence_knows_when_a_stream_has_come_there() -> None:
    from ssdtrain.io.open_engine import cuda_driver, fence

    driver, stream = cuda_driver(0), torch.cuda.current_stream().cuda_stream
    torch.cuda._sleep(int(1e9))
    point = fence(driver, stream)
    assert point is not None and not point.is_complete
    point.synchronize()
    assert point.is_complete


def test_expandable_segments(tmp_path: Path) -> None:
    """Memory that PyTorch maps piece by piece."""
    script = HELPERS / "cuda_small.py"
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    environment["PYTHONPATH"] = os.pathsep.join(part for part in sys.path if part)
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
