"""Activations of GPT blocks offloaded, beside everything else one could do about them, interleaved in one process.

    python recipes/benchmarks/gpu.py /mnt/nvme
    python recipes/benchmarks/gpu.py /mnt/nvme --hidden 8192 --layers 6 --sequence 4096

Every variant computes the same step on the same weights, round by round, so that what changes on the machine changes
for all. A row has the peak of device memory above what was there before the step, the median step time, both against
plain, and whether the gradients are equal to the bit. The ceilings of link and drive are measured in the same run, and
with them the least step time at which all saved bytes could be hidden. The last line is JSON.

On a machine without a GPU it runs on the CPU, at whatever size is asked for: there the peak is not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import ssdtrain
from ssdtrain.tools.demo.model import Block, GPTConfig

GB = 1e9
LINK_NBYTES = 1 << 30


class Blocks(torch.nn.Module):
    """The repeated part of a GPT: where the activations are."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(config) for _ in range(config.layers))
        self.is_recomputed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, sequence, width) to the same."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.is_recomputed else block(x)
        return x


@dataclass
class Variant:
    """One way to deal with saved activations, and what it measured."""

    name: str
    around: Callable[[], AbstractContextManager[Any]]
    is_recomputed: bool = False
    offload: ssdtrain.ActivationOffload | None = None
    seconds: list[float] = field(default_factory=list)
    peak_nbytes: list[int] = field(default_factory=list)
    is_equal: bool = True


def variants(directory: str, on_gpu: bool, policy: dict[str, Any]) -> list[Variant]:
    """Plain first, then ours, then the peers that are installed."""

    def ours(name: str, where: str | None, **fields: Any) -> Variant:
        offload = ssdtrain.offload_activations(where, policy | fields)
        return Variant(name, lambda: offload, offload=offload)

    found = [Variant("plain", contextlib.nullcontext)]
    if on_gpu:
        found.append(ours("ssdtrain host", None, mode="all"))
        found.append(ours("ssdtrain host + drive", directory, host_nbytes="4GiB"))
    found.append(ours("ssdtrain drive auto", directory))
    found.append(ours("ssdtrain drive all", directory, mode="all"))
    found.append(Variant("save_on_cpu", lambda: save_on_cpu(pin_memory=on_gpu)))
    found.append(Variant("recompute", contextlib.nullcontext, is_recomputed=True))
    with contextlib.suppress(ImportError):
        from trl.models.activation_offloading import OffloadActivations

        if on_gpu:
            found.append(Variant("trl", lambda: OffloadActivations(use_streams=True)))
    return found


def step(model: Blocks, x: torch.Tensor, variant: Variant) -> tuple[float, int]:
    """Forward and backward: seconds, and bytes of device memory above what was there before."""
    model.zero_grad(set_to_none=True)
    model.is_recomputed = variant.is_recomputed
    before = settle(x.device)
    begin = time.perf_counter()
    with variant.around():
        loss = model(x).float().square().mean()
    loss.backward()
    del loss
    synchronize(x.device)
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated(x.device) - before if x.is_cuda else 0
    return seconds, peak


def settle(device: torch.device) -> int:
    """Nothing is running, and the peak is counted from here; bytes allocated now."""
    synchronize(device)
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def synchronize(device: torch.device) -> None:
    """The device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def link_gbs(device: torch.device) -> dict[str, float]:
    """GB/s of one long copy from and to pinned memory."""
    if device.type != "cuda":
        return {}
    host = torch.empty(LINK_NBYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(LINK_NBYTES, dtype=torch.uint8, device=device)
    rates = {}
    for name, target, source in (("out", host, there), ("in", there, host)):
        target.copy_(source, non_blocking=True)
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(4):
            target.copy_(source, non_blocking=True)
        synchronize(device)
        rates[name] = 4 * LINK_NBYTES / (time.perf_counter() - begin) / GB
    return rates


def saved_nbytes(model: Blocks, x: torch.Tensor) -> int:
    """Bytes of storages that autograd keeps for backward, weights aside."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(storage.nbytes() for storage in kept.values())


def measure(model: Blocks, x: torch.Tensor, found: list[Variant], repeats: int, warm_up: int) -> None:
    """Rounds of one step each; the first `warm_up` rounds only teach."""
    for index in range(warm_up + repeats):
        expected: list[torch.Tensor] = []
        for variant in found:
            seconds, peak = step(model, x, variant)
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            if variant.name == "plain":
                expected = [grad.clone() for grad in grads]
            variant.is_equal &= all(map(torch.equal, grads, expected))
            if index >= warm_up:
                variant.seconds.append(seconds)
                variant.peak_nbytes.append(peak)
            print(f"\rround {index + 1} of {warm_up + repeats}: {variant.name:24}", end="", flush=True)
    print()


def row(variant: Variant, plain: Variant) -> dict[str, Any]:
    """What is known of a variant."""
    seconds, peak = statistics.median(variant.seconds), max(variant.peak_nbytes)
    ratios = [ours / theirs for ours, theirs in zip(variant.seconds, plain.seconds, strict=True)]
    result = {
        "variant": variant.name,
        "step_seconds": seconds,
        "step_time_ratio": statistics.median(ratios),
        "peak_nbytes": peak,
        "peak_against_plain": peak / max(plain.peak_nbytes) if max(plain.peak_nbytes) else None,
        "is_equal": variant.is_equal,
    }
    if variant.offload is not None:
        result["stats"] = variant.offload.stats.as_dict()
    return result


def drive_gbs(rows: list[dict[str, Any]]) -> dict[str, float]:
    """GB/s while the drive was busy in the variant that waits for it."""
    stats = next(r["stats"] for r in rows if r["variant"] == "ssdtrain drive all")
    pairs = {"write": ("written_nbytes", "write_busy_seconds"), "read": ("read_nbytes", "read_busy_seconds")}
    return {name: stats[n] / stats[s] / GB if stats[s] else 0.0 for name, (n, s) in pairs.items()}


def machine(device: torch.device) -> dict[str, Any]:
    """Where the numbers were taken."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    return {
        "device": name,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "ssdtrain": ssdtrain.__version__,
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """The table for a reader."""
    print(f"{'variant':24} {'step':>9} {'ratio':>7} {'peak':>10} {'of plain':>9}  equal")
    for r in rows:
        share = "" if r["peak_against_plain"] is None else f"{r['peak_against_plain']:.1%}"
        print(
            f"{r['variant']:24} {r['step_seconds']:8.3f}s {r['step_time_ratio']:7.3f} "
            f"{r['peak_nbytes'] / (1 << 30):6.2f} GiB {share:>9}  {'yes' if r['is_equal'] else 'NO'}"
        )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Offloaded activations of GPT blocks beside the alternatives.")
    parser.add_argument("directory", help="a directory on the drive")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--policy", type=json.loads, default={}, help='fields as JSON, such as {"staging_nbytes": ...}')
    return parser.parse_args()


def main() -> None:
    """Measures, prints the table, ends with JSON."""
    options = arguments()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    shape = GPTConfig(options.layers, options.hidden, options.heads, options.sequence)
    model = Blocks(shape).to(device, dtype)
    x = torch.randn(options.batch, options.sequence, options.hidden, device=device, dtype=dtype)
    nbytes = saved_nbytes(model, x)
    found = variants(options.directory, device.type == "cuda", options.policy)
    measure(model, x, found, options.repeats, options.warm_up)
    rows = [row(variant, found[0]) for variant in found]
    link, drive = link_gbs(device), drive_gbs(rows)
    show(rows)
    bounds = {name: nbytes / rate / GB for name, rate in {**link, **drive}.items() if rate}
    print(f"saved for backward: {nbytes / GB:.2f} GB; seconds it takes on its way: {bounds}")
    sizes = {k: v for k, v in vars(options).items() if k != "directory"}
    result = {"machine": machine(device), "sizes": sizes, "saved_nbytes": nbytes, "rows": rows}
    print(json.dumps(result | {"link_gbs": link, "drive_gbs": drive, "bound_seconds": bounds}))


if __name__ == "__main__":
    main()
