"""Activations of GPT blocks offloaded, beside everything else one could do about them, in turn in one process.

    python recipes/benchmarks/gpu.py /mnt/nvme --tier host --hidden 8192 --heads 64 --layers 4 --batch 4 --sequence 4096
    python recipes/benchmarks/gpu.py /mnt/nvme --tier drive --seconds 120 --json results/drive.json

Every variant computes the same step on the same weights, round by round, so that what changes on the machine changes
for all. A row has step time by the device's events and by the clock, the peak of *activations* (gradients are there
before the step begins, so that they do not count) and of everything; times and peaks are also given against plain. One
strict round with deterministic algorithms compares gradients bit by bit; a second plain run in it is the control. The
link, and with it the drive where ours goes there, is measured in the same run; with it come the bound (what the bytes
take on the way against what the computation takes) and the fraction of it that was reached.

`--json` is written anew after every step: whatever ends the run leaves what was measured, in rows that have counted no
step yet those of the latest that only taught. `--seconds` ends it in time, SIGINT at once, both with the table.
A variant far slower than plain is measured once and left out of later rounds. Without a GPU all of it runs on the CPU,
at whatever size is asked for; peaks are not measured there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import mmap
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import ssdtrain
from ssdtrain.tools.demo.model import Block, GPTConfig

GB = 1e9
TOO_SLOW = 8.0  # times plain: one such step is enough, if it is also
LONG = 5.0  # seconds
BUDGET_SHARE = 0.4  # of the saved bytes, for the mix of keeping, recomputing and moving
REQUEST_NBYTES, NUM_REQUESTS = 8 << 20, 8  # at once, to measure a drive


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
class Measured:
    """One step."""

    wall_seconds: float
    device_seconds: float
    forward_seconds: float
    activation_nbytes: int
    peak_nbytes: int
    moved_nbytes: int = 0
    """What ours took out of memory."""


@dataclass
class Variant:
    """One way to deal with saved activations, and what it measured."""

    name: str
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    is_recomputed: bool = False
    offload: ssdtrain.ActivationOffload | None = None
    steps: list[Measured] = field(default_factory=list)
    lessons: list[Measured] = field(default_factory=list)
    """Steps that do not count."""
    is_equal: bool | None = None
    left_out: str = ""

    @property
    def measured(self) -> list[Measured]:
        """What counts, or what there is."""
        return self.steps or self.lessons[-1:]

    @property
    def moved_nbytes(self) -> int:
        """What ours took out of memory so far and was not asked for on its way."""
        if self.offload is None:
            return 0
        stats = self.offload.stats
        return stats.offloaded_nbytes - stats.forwarded_nbytes


class Bench:
    """One model, one input, all variants."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.begun = time.monotonic()
        self.plain_seconds = 0.0  # of the latest step
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        dtype = getattr(torch, options.dtype)
        torch.manual_seed(0)
        shape = GPTConfig(options.layers, options.hidden, options.heads, options.sequence)
        self.model = made_on(self.device, dtype, lambda: Blocks(shape))
        self.x = torch.randn(options.batch, options.sequence, options.hidden, device=self.device, dtype=dtype)
        self.saved_nbytes = saved_nbytes(self.model, self.x)
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.machine = machine(self.device)
        self.has_host_tier = options.tier == "host" and self.device.type == "cuda"
        self.link = link_gbs(self.device, options.link_nbytes)
        self.drive = {} if self.has_host_tier else drive_gbs(options.directory, options.link_nbytes)
        self.variants = list(self._variants())

    def _variants(self) -> Iterator[Variant]:
        """Plain first, then ours, then the peers that are installed."""
        yield Variant("plain")
        if self.has_host_tier:
            yield self._ours("ssdtrain host all", None, mode="all")
            yield self._ours("ssdtrain host auto", None)
        else:
            yield self._ours("ssdtrain drive auto", self.options.directory)
            yield self._ours("ssdtrain drive all", self.options.directory, mode="all")
        if self.options.tier == "drive" and importlib.util.find_spec("kvikio") and self.device.type == "cuda":
            with self._leaving_out("kvikio"):
                yield self._ours("ssdtrain kvikio", self.options.directory, engine="kvikio")
        mix = {"memory_budget": max(1, int(BUDGET_SHARE * self.saved_nbytes)), "recompute": "auto"}
        where = None if self.has_host_tier else self.options.directory
        yield self._ours("ssdtrain mix", where, **mix)
        yield Variant("save_on_cpu", lambda: save_on_cpu(pin_memory=self.device.type == "cuda"))
        yield Variant("recompute", is_recomputed=True)
        if self.device.type == "cuda":
            with self._leaving_out("trl"):
                from trl.models.activation_offloading import OffloadActivations

                peer = OffloadActivations(use_streams=True)  # which pins
                peer.update_model_params(self.model)  # or weights would be offloaded too
                yield Variant("trl", lambda: peer)

    def _ours(self, name: str, where: str | None, **fields: Any) -> Variant:
        offload = ssdtrain.offload_activations(where, self.options.policy | fields, model=self.model)
        return Variant(name, lambda: offload, offload=offload)

    @contextlib.contextmanager
    def _leaving_out(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a peer, whatever it is
            print(f"{name}: left out: {error}", flush=True)

    @property
    def left_seconds(self) -> float:
        """Until the budget is used up."""
        return float(self.options.seconds - (time.monotonic() - self.begun))

    # -- steps -----------------------------------------------------------------------------------------------------

    def step(self, variant: Variant) -> Measured:
        """Forward and backward."""
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()
        self.model.is_recomputed = variant.is_recomputed
        before, moved = self._settle(), variant.moved_nbytes
        marks = [self._mark()]
        begin = time.perf_counter()
        with variant.around():
            loss = self.model(self.x).float().square().mean()
            marks.append(self._mark())
        loss.backward()
        marks.append(self._mark())
        del loss
        self._settle(reset=False)
        wall = time.perf_counter() - begin
        peak = torch.cuda.max_memory_allocated(self.device) if self.x.is_cuda else 0
        whole, forward = _between(marks[0], marks[2]), _between(marks[0], marks[1])
        return Measured(wall, whole, forward, max(0, peak - before), peak, variant.moved_nbytes - moved)

    def _mark(self) -> Any:
        if not self.x.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _settle(self, *, reset: bool = True) -> int:
        """Nothing is running, and the peak is counted from here; bytes allocated now."""
        if not self.x.is_cuda:
            return 0
        torch.cuda.synchronize(self.device)
        if reset:
            torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def rounds(self) -> None:
        """As many as the budget allows, at most what was asked for; the first ones only teach."""
        num = self.options.warm_up + self.options.repeats
        for index in range(num):
            begin = time.monotonic()
            for variant in [v for v in self.variants if not v.left_out]:
                self._one(variant, is_counted=index >= self.options.warm_up)
                self.write(is_complete=False)
            if self.left_seconds < 2.5 * (time.monotonic() - begin) and index >= self.options.warm_up:
                print(f"\nends after {index + 1} of {num} rounds: the budget is used up")
                break
        print()

    def _one(self, variant: Variant, *, is_counted: bool) -> None:
        measured = self._try(variant)
        if measured is None:
            return
        if variant is self.variants[0]:
            self.plain_seconds = measured.wall_seconds
        is_first = not variant.measured  # which imports, compiles and pins
        if not is_first and measured.wall_seconds > max(LONG, TOO_SLOW * self.plain_seconds):
            variant.left_out = f"after one step, which took {measured.wall_seconds:.1f} s"
        elif self.left_seconds < 0 and variant is not self.variants[0]:
            variant.left_out = "the budget is used up"
        (variant.steps if is_counted or variant.left_out else variant.lessons).append(measured)
        print(f"\r{variant.name:24} {measured.wall_seconds:7.3f} s", end="", flush=True)

    def _try(self, variant: Variant) -> Measured | None:
        try:
            return self.step(variant)
        except Exception as error:  # out of memory, no such engine, or what a peer does not support
            variant.left_out = (str(error).splitlines() or [type(error).__name__])[0][:200]
        if self.x.is_cuda:  # now that nothing of the step is held by the error any more
            torch.cuda.empty_cache()
        return None

    def compare_bits(self) -> None:
        """One strict round: the gradients of every variant beside plain's, and a second plain run as control.

        They are compared where they are: of a large model they take seconds to the host.
        """
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it would fill what a peer has pinned
        try:
            self.step(self.variants[0])
            expected = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
            control = Variant("plain again")
            for variant in [control, *(v for v in self.variants[1:] if not v.left_out)]:
                if self._try(variant) is None:
                    continue
                found = [p.grad for p in self.model.parameters() if p.grad is not None]
                variant.is_equal = all(map(torch.equal, found, expected))
                self.variants[0].is_equal = control.is_equal
                self.write(is_complete=False)
        finally:
            torch.use_deterministic_algorithms(False)

    # -- results ---------------------------------------------------------------------------------------------------

    def write(self, *, is_complete: bool) -> dict[str, Any]:
        """What is known so far, also to the file."""
        rows = [self.row(variant) for variant in self.variants if variant.measured or variant.left_out]
        sizes = {k: v for k, v in vars(self.options).items() if k not in ("directory", "json")}
        result = {
            "machine": self.machine,
            "sizes": sizes,
            "saved_nbytes": self.saved_nbytes,
            "link_gbs": self.link,
            "drive_gbs": self.drive,
            "bounds": self.bounds(),
            "rows": rows,
            "is_complete": is_complete,
        }
        if self.options.json:
            path = Path(self.options.json)
            beside = path.with_name(f".{path.name}.{os.getpid()}")
            beside.write_text(json.dumps(result, indent=1))
            beside.rename(path)
        return result

    @property
    def rates(self) -> dict[str, float]:
        """GB/s of the way that ours goes: the link's, or the drive's where that is slower."""
        ways = [way for way in (self.link, self.drive) if way]
        return {name: min(way[name] for way in ways) for name in ("out", "in")} if ways else {}

    def bounds(self) -> dict[str, float]:
        """What physics allows, by what was measured and plain's times; empty before they are known."""
        if not self.variants[0].measured or not self.rates:
            return {}
        forward, backward = self._plain_seconds()
        out, back = (self.saved_nbytes / self.rates[name] / GB for name in ("out", "in"))
        return {
            "needed_gbs": self.saved_nbytes / forward / GB,
            "hidden_fraction": min(1.0, forward / out, backward / back),
            "all_step_seconds": self._bound_seconds(self.saved_nbytes),
        }

    def _plain_seconds(self) -> tuple[float, float]:
        plain = self.variants[0].measured
        forward = statistics.median(m.forward_seconds for m in plain)
        return forward, statistics.median(m.device_seconds for m in plain) - forward

    def _bound_seconds(self, nbytes: float) -> float:
        """The shortest step in which so many bytes leave and come back."""
        forward, backward = self._plain_seconds()
        return max(forward, nbytes / self.rates["out"] / GB) + max(backward, nbytes / self.rates["in"] / GB)

    def row(self, variant: Variant) -> dict[str, Any]:
        """What is known of a variant."""
        row: dict[str, Any] = {"variant": variant.name, "is_equal": variant.is_equal}
        if variant.left_out:
            row["left_out"] = variant.left_out
        if variant.measured:
            row |= self._figures(variant)
        if variant.offload is not None:
            row["stats"] = variant.offload.stats.as_dict()
            row |= self._link_use(row["stats"])
        return row

    def _link_use(self, stats: dict[str, Any]) -> dict[str, float]:
        """How fast the copies were while there were any, against one long copy."""
        use = {}
        for name in ("out", "in") if self.link else ():
            nbytes, seconds = stats[f"copied_{name}_nbytes"], stats[f"copy_{name}_seconds"]
            if seconds > 0:
                use[f"fraction_of_link_{name}"] = nbytes / seconds / GB / self.link[name]
        return use

    def _figures(self, variant: Variant) -> dict[str, Any]:
        plain, steps = self.variants[0].measured or variant.measured, variant.measured
        seconds = statistics.median(m.device_seconds for m in steps)
        peak, whole = (max(getattr(m, name) for m in steps) for name in ("activation_nbytes", "peak_nbytes"))
        plain_peak = max(m.activation_nbytes for m in plain)
        figures = {
            "num_steps": len(variant.steps),
            "step_seconds": seconds,
            "wall_seconds": statistics.median(m.wall_seconds for m in steps),
            "step_time_ratio": seconds / statistics.median(m.device_seconds for m in plain),
            "activation_nbytes": peak,
            "peak_nbytes": whole,
            "activations_against_plain": peak / plain_peak if plain_peak else None,
        }
        if variant.offload is not None:
            moved = statistics.median(m.moved_nbytes for m in steps)
            figures |= {"moved_nbytes": moved, "moved_fraction": moved / self.saved_nbytes}
            if self.rates:
                bound = self._bound_seconds(moved)
                figures |= {"bound_seconds": bound, "fraction_of_bound": bound / seconds}
        return figures


def made_on(device: torch.device, dtype: torch.dtype, make: Callable[[], Blocks]) -> Blocks:
    """Billions of weights would take the host half a minute."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return make()
    finally:
        torch.set_default_dtype(before)


def _between(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3


def link_gbs(device: torch.device, nbytes: int) -> dict[str, float]:
    """GB/s of one long copy from and to pinned memory; empty without a link."""
    if device.type != "cuda":
        return {}
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    rates = {}
    for name, target, source in (("out", host, there), ("in", there, host)):
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(4):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        rates[name] = 4 * nbytes / (time.perf_counter() - begin) / GB
    return rates


def drive_gbs(directory: str, nbytes: int) -> dict[str, float]:
    """GB/s of direct requests, several at once, to a file of `directory`; empty where there is no direct I/O."""
    size = min(REQUEST_NBYTES, nbytes)
    offsets = range(0, nbytes // size * size, size)
    with tempfile.NamedTemporaryFile(dir=directory) as file, ThreadPoolExecutor(NUM_REQUESTS) as threads:
        try:
            at = os.open(file.name, os.O_RDWR | os.O_DIRECT)
        except OSError:
            return {}
        try:
            buffers = [mmap.mmap(-1, size) for _ in range(NUM_REQUESTS)]
            for buffer in buffers:
                buffer.write(os.urandom(size))
            rates = {}
            for name, request in (("", os.pwritev), ("out", os.pwritev), ("in", os.preadv)):  # the first makes room
                begin = time.perf_counter()
                done = [threads.submit(request, at, [buffers[i % NUM_REQUESTS]], o) for i, o in enumerate(offsets)]
                num = sum(future.result() for future in done)
                rates[name] = num / (time.perf_counter() - begin) / GB
        except OSError:
            return {}
        finally:
            os.close(at)
    return {name: rates[name] for name in ("out", "in")}


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


def show(result: dict[str, Any]) -> None:
    """The table for a reader."""
    print(f"{'variant':24} {'step':>9} {'ratio':>7} {'activations':>12} {'of plain':>9} {'of bound':>9}  equal")
    for r in result["rows"]:
        if "step_seconds" not in r:
            print(f"{r['variant']:24} left out: {r['left_out']}")
            continue
        share, bound = r["activations_against_plain"], r.get("fraction_of_bound")
        print(
            f"{r['variant']:24} {r['step_seconds']:8.3f}s {r['step_time_ratio']:7.3f} "
            f"{r['activation_nbytes'] / (1 << 30):8.2f} GiB {'' if share is None else f'{share:.1%}':>9} "
            f"{'' if bound is None else f'{bound:.1%}':>9}  "
            f"{ {True: 'yes', False: 'NO', None: '-'}[r['is_equal']] }"
        )
    for r in result["rows"]:
        stats = r.get("stats", {})
        if stats.get("measured_step_seconds"):
            times = [
                f"{stats[f'{name}_step_seconds']:.3f} s, {stats[f'{name}_peak_nbytes'] / (1 << 30):.2f} GiB"
                for name in ("predicted", "measured")
            ]
            print(f"{r['variant']}: planned step {times[0]} predicted, {times[1]} measured")
    ways = f"link {result['link_gbs']}; drive {result['drive_gbs']}"
    print(f"saved for backward: {result['saved_nbytes'] / GB:.2f} GB; {ways}; {result['bounds']}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Offloaded activations of GPT blocks beside the alternatives.")
    parser.add_argument("directory", help="a directory on the drive")
    parser.add_argument("--tier", choices=["host", "drive"], default="drive", help="where ours sends them")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=3, help="rounds that only teach: plans are made in them")
    parser.add_argument("--seconds", type=float, default=600.0, help="a budget: no round begins that would exceed it")
    parser.add_argument("--link-nbytes", type=int, default=1 << 30, help="length of the copies that measure the link")
    parser.add_argument("--json", help="a file for the result, written anew after every step")
    parser.add_argument("--policy", type=json.loads, default={}, help='fields as JSON, such as {"staging_nbytes": ...}')
    return parser.parse_args()


def main() -> None:
    """Measures, prints the table, ends with JSON."""
    bench = Bench(arguments())
    is_complete = False
    try:
        bench.rounds()
        bench.compare_bits()
        is_complete = True
    except KeyboardInterrupt:
        print("\nended by SIGINT: this is what was measured until then")
    result = bench.write(is_complete=is_complete)
    show(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
