"""What ssdtrain costs under DeepSpeed: step times of two engines that take turns in one process.

    python recipes/benchmarks/deepspeed_overhead.py /mnt/nvme
    python recipes/benchmarks/deepspeed_overhead.py /mnt/nvme --layers 12 --width 512 --rounds 20

Both train the same GPT with ZeRO-2 in mode "auto"; one configuration has the section "ssdtrain". A machine that slows
down slows both: the figure is the median over the rounds of (with / without), in the same round, and the order changes
from round to round. Losses must be equal to the bit. The last line is JSON. On a machine with few cores say
`OMP_NUM_THREADS` one less than there are: the engine's threads copy while training computes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from typing import Any

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
    os.environ.setdefault(name, value)

import deepspeed  # noqa: E402  it reads the environment

import ssdtrain.integrations.deepspeed  # noqa: E402
from ssdtrain.tools.demo.model import GPT, GPTConfig  # noqa: E402


def engine_of(args: argparse.Namespace, directory: str | None) -> Any:
    """An engine; with a directory its activations are offloaded there."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": args.batch,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
    }
    if directory is not None:
        policy = {"min_nbytes": args.min_nbytes, "mode": args.mode, "decline_below_nbytes": 0}
        config["ssdtrain"] = {"activations": {"directory": directory} | policy}
    return deepspeed.initialize(model=GPT(GPTConfig(args.layers, args.width, 4, args.sequence)), config=config)[0]


def step(engine: Any, tokens: torch.Tensor) -> tuple[float, float]:
    """Seconds and loss of one step."""
    begin = time.perf_counter()
    loss = engine(tokens, tokens)
    engine.backward(loss)
    engine.step()
    return time.perf_counter() - begin, loss.item()


def main() -> None:
    """Prints the ratio; the last line is JSON."""
    parser = argparse.ArgumentParser(description="Overhead of ssdtrain under DeepSpeed.")
    parser.add_argument("directory", nargs="?", help="a directory on the drive (default: a temporary one)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--min-nbytes", default="1MiB")
    parser.add_argument(
        "--mode", default="auto", choices=["auto", "all"], help="what is offloaded; a toy only with all"
    )
    args = parser.parse_args()
    if os.environ["DS_ACCELERATOR"] == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes minutes to compile, not needed
    os.environ.setdefault("MASTER_PORT", "29513")
    deepspeed.init_distributed(verbose=False)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        engines = {"plain": engine_of(args, None), "ssdtrain": engine_of(args, directory)}
        tokens = torch.randint(256, (args.batch, args.sequence), device=engines["plain"].device)
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for i in range(args.rounds + 2):
            losses = set()
            for name in sorted(engines, reverse=bool(i % 2)):
                duration, loss = step(engines[name], tokens)
                seconds[name].append(duration)
                losses.add(loss)
            assert len(losses) == 1, f"Expected equal losses, got {losses}"
        stats = engines["ssdtrain"].ssdtrain.stats
        for engine in engines.values():
            engine.destroy()
    ratios = [ours / plain for ours, plain in zip(seconds["ssdtrain"][2:], seconds["plain"][2:], strict=True)]
    result = {
        "machine": {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "kernel": platform.release()},
        "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__, "ssdtrain": ssdtrain.__version__},
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
        "plain_seconds": round(statistics.median(seconds["plain"][2:]), 4),
        "offloaded_nbytes": stats.offloaded_nbytes,
        "written_nbytes": stats.written_nbytes,
        "stall_seconds": round(stats.stall_seconds, 4),
    }
    print(stats)
    print(f"with / without: {result['ratio']} (median of {args.rounds} rounds)")
    print(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
