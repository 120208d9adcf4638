"""How much model trains in a quarter of the memory: AdamW on a GPT, parameters and optimizer state on the drive.

    python recipes/benchmarks/state_cap.py /mnt/nvme
    python recipes/benchmarks/state_cap.py /mnt/nvme --layers 24 --width 1536 --share 0.2

Plain training runs first, without a cap; its peak resident memory is what it needs. Then the same training runs with
ssdtrain in a process that the kernel kills when it needs more than `--share` of that (a memory control group, without
swap; needs root): the model is built on the meta device and read from a checkpoint, tensor by tensor; parameters, their
gradients, the optimizer state and saved activations are never in memory as a whole. Losses of every step and the final
parameters must be equal to the bit. A third run, without a cap, pages the state through `optimizer.step()` after
backward, where the drive works alone: its bandwidth is set beside that of plain direct I/O, measured between the steps;
once with the drive as it is, once throttled by the kernel. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from memory_group import memory_group, why_not
from state_figures import bandwidth_of, waiting_seconds
from throttle import throttled

import ssdtrain
from ssdtrain.devices.vector_math import settle_vector_math
from ssdtrain.tools.demo.model import GPT, GPTConfig

MIB = 1 << 20


def model_of(args: argparse.Namespace) -> GPT:
    """On the device that is current."""
    return GPT(GPTConfig(args.layers, args.width, args.width // 64, args.sequence, args.vocabulary))


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    """PyTorch's own, fused."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def digest(model: torch.nn.Module) -> str:
    """A hash of all parameters. A state dict of what is on the drive is in files, not in memory."""
    found = hashlib.sha256()
    for value in model.state_dict().values():
        found.update(value.numpy())
    return found.hexdigest()


def train(
    args: argparse.Namespace,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    between: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Steps on the same tokens as everybody."""
    losses, seconds, update_seconds = [], [], []
    for step in range(args.steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, args.vocabulary, (args.batch, args.sequence), generator=generator)
        begin = time.perf_counter()
        loss = model(tokens, tokens)
        loss.backward()
        before_update = time.perf_counter()
        optimizer.step()
        update_seconds.append(time.perf_counter() - before_update)
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
        between()
        losses.append(loss.item().hex())
        print(f"  step {step + 1} of {args.steps}: {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
    return {"losses": losses, "seconds": seconds, "update_seconds": update_seconds}


def work(args: argparse.Namespace) -> dict[str, Any]:
    """What one process does."""
    settle_vector_math()  # the runs are compared to the bit
    if args.worker == "prepare":
        torch.manual_seed(0)
        ssdtrain.save_safetensors(model_of(args), args.checkpoint)
        return {}
    if args.worker == "plain":
        model = model_of(args)
        ssdtrain.load_safetensors(model, args.checkpoint)
        optimizer = adamw(model)
        stats: dict[str, Any] = {}
        found = train(args, model, optimizer)
    elif args.worker in ("paged", "throttled"):
        model = model_of(args)
        ssdtrain.load_safetensors(model, args.checkpoint)
        bandwidths: list[float] = []
        with throttled(args.directory, args.throttle * 1e9 if args.worker == "throttled" else None):
            paged = ssdtrain.offload_optimizer(adamw(model), args.directory)
            ceiling = Ceiling(args.directory, args.ceiling * MIB)
            found = train(args, model, paged, lambda: bandwidths.append(ceiling.measure()))
            found["ceiling_gbs"] = bandwidths
            stats = {"optimizer": paged.stats.as_dict()}
    else:
        with torch.device("meta"):
            model = model_of(args)
        budget = {"staging_nbytes": args.staging, "min_nbytes": "64KiB"}
        ssdtrain.offload_parameters(model, args.directory, budget | {"prefetch_nbytes": args.prefetch})
        ssdtrain.load_safetensors(model, args.checkpoint)
        policy = budget | {"chunk_nbytes": args.chunk, "step_in_backward": True}
        parameters = ssdtrain.parameter_offload(model)
        paged = ssdtrain.offload_optimizer(adamw(model), parameters, policy)
        activations = {"mode": "all", "staging_nbytes": args.staging, "prefetch_nbytes": args.staging}
        with ssdtrain.offload_activations(args.directory, activations) as offload:
            found = train(args, model, paged)
        print(offload.stats, parameters.stats, paged.stats, sep="\n", file=sys.stderr)
        stats = {"activations": offload.stats.as_dict(), "parameters": parameters.stats.as_dict()}
        stats["optimizer"] = paged.stats.as_dict()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    num = sum(p.numel() for p in model.parameters())
    return found | {"peak_nbytes": peak, "parameters": num, "digest": digest(model), "stats": stats}


def run(worker: str, args: argparse.Namespace, prefix: list[str] | None = None) -> dict[str, Any]:
    """The same in a process of its own."""
    print(f"{worker}:", file=sys.stderr, flush=True)
    command = [
        *(prefix or []),
        sys.executable,
        __file__,
        *args.argv,
        "--worker",
        worker,
        "--checkpoint",
        args.checkpoint,
    ]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "1048576"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{worker} ended with {done.returncode}: killed at the cap, or see above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class Ceiling:
    """What the drive moves both ways at once: plain threads, direct I/O, nothing computed.

    Both halves are written before: what was never written is read without the drive. Huge pages, as for the state: a
    drive behind a hypervisor may read at half the speed into small ones.
    """

    request_nbytes, num_threads = 4 * MIB, 4

    def __init__(self, directory: str, nbytes: int) -> None:
        self.nbytes = nbytes
        handle, path = tempfile.mkstemp(dir=directory)
        os.close(handle)
        self.fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        os.unlink(path)
        os.posix_fallocate(self.fd, 0, 2 * self.nbytes)
        self._buffers = [_huge(self.request_nbytes) for _ in range(2 * self.num_threads)]
        for offset in range(0, 2 * self.nbytes, self.request_nbytes):
            os.pwritev(self.fd, [self._buffers[0]], offset)

    def measure(self) -> float:
        """GB/s of a pass that reads one half and writes the other."""
        begin = time.perf_counter()
        with ThreadPoolExecutor(len(self._buffers)) as pool:
            list(pool.map(self._move, range(len(self._buffers))))
        return 2 * self.nbytes / 1e9 / (time.perf_counter() - begin)

    def _move(self, thread: int) -> None:
        is_write, first = thread % 2, thread // 2
        move = os.pwritev if is_write else os.preadv
        start = self.nbytes * is_write
        for offset in range(first * self.request_nbytes, self.nbytes, self.num_threads * self.request_nbytes):
            if move(self.fd, [self._buffers[thread]], start + offset) != self.request_nbytes:
                raise OSError("Expected whole requests, got a part of one")


def _huge(nbytes: int) -> mmap.mmap:
    """Memory that is there, full of bytes that no drive compresses."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory[:] = os.urandom(nbytes)
    return memory


def main() -> None:
    """Prints the table; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", help="a directory on the drive")
    for name, default in {
        "layers": 12, "width": 1024, "sequence": 256, "batch": 2, "vocabulary": 256, "steps": 8,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--share", type=float, default=0.25, help="of the memory that plain training needs")
    parser.add_argument("--throttle", type=float, default=0.5, help="GB/s each way of the drive in the last run")
    parser.add_argument("--ceiling", type=int, default=512, help="MiB each way of a pass of plain direct I/O")
    parser.add_argument("--staging", default="24MiB")
    parser.add_argument("--prefetch", default="64MiB")
    parser.add_argument("--chunk", default="32MiB")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.argv = sys.argv[1:]
    if args.worker:
        print(json.dumps(work(args)))
        return
    if why_not():
        raise SystemExit(f"A cap {why_not()}")
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        args.checkpoint = str(Path(folder) / "model.safetensors")
        run("prepare", args)
        plain = run("plain", args)
        cap = int(plain["peak_nbytes"] * args.share) // 4096 * 4096
        with memory_group(cap) as group:
            capped = run("capped", args, group.command)
            capped["group_peak_nbytes"] = group.peak_nbytes
        paged = {name: run(name, args) for name in ("paged", "throttled")}
    report(args, plain, capped, paged, cap)


def report(args: argparse.Namespace, plain: Any, capped: Any, paged: Any, cap: int) -> None:
    """The words and the JSON."""
    is_equal = all(run[key] == plain[key] for run in (capped, *paged.values()) for key in ("losses", "digest"))
    settled = slice(1, None)
    plain_step, capped_step = (statistics.median(run["seconds"][settled]) for run in (plain, capped))
    waits = waiting_seconds(capped) / args.steps
    print(f"{plain['parameters'] / 1e6:.0f} M parameters, {args.batch} x {args.sequence} tokens a step")
    print(f"plain     {plain['peak_nbytes'] / MIB:7.0f} MiB  {plain_step:6.2f} s a step")
    memory = f"{capped['group_peak_nbytes'] / MIB:7.0f} MiB"  # cached pages of files included
    print(f"ssdtrain  {memory}  {capped_step:6.2f} s a step, {waits:.2f} s of it waiting for the drive")
    print(f"          under a cap of {cap / MIB:.0f} MiB")
    print(f"equal to the bit: {'yes' if is_equal else 'NO'}")
    for name, found in paged.items():
        update, moved, ceiling = bandwidth_of(found)
        print(
            f"optimizer.step() after backward, {name}: {update:.2f} s, {moved:.2f} GB/s in and out together; plain "
            f"direct I/O between the steps {ceiling:.2f} GB/s"
        )
    found = {"plain": plain, "capped": capped, **paged, "cap_nbytes": cap}
    hidden = ("argv", "worker", "checkpoint", "directory")
    size = {name: value for name, value in vars(args).items() if name not in hidden}
    machine = {"cores": os.cpu_count(), "system": platform.platform(), "device": "cpu"}
    versions = {"torch": torch.__version__, "ssdtrain": ssdtrain.__version__}
    print(json.dumps({"machine": machine, "versions": versions, "size": size, "is_equal": is_equal} | found))
    if not is_equal:
        raise SystemExit("losses or parameters differ")


if __name__ == "__main__":
    main()
