"""One rank of a pipeline of `torch.distributed.pipelining` on the CPU; started by `test_pipelining.py`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules

import ssdtrain

WIDTH, ROWS, NUM_MICRO_BATCHES, NUM_STEPS = 64, 64, 8, 6
POLICY = {"min_nbytes": "4KiB", "staging_nbytes": "4MiB", "prefetch_nbytes": "1MiB", "decline_below_nbytes": 0}


def make_chunk(number: int) -> nn.Module:
    torch.manual_seed(number)
    return nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH))])


class Stage(PipelineStage):
    """A stage that does not greet its neighbours: for gloo there is no need to, and with PyTorch 2.9 it fails there."""

    def _get_init_p2p_neighbors_ops(self) -> list[Any]:
        return []


def make_schedule(name: str, rank: int, world: int) -> tuple[Any, list[nn.Module]]:
    kind = getattr(schedules, name)
    is_multi = issubclass(kind, schedules.PipelineScheduleMulti)
    numbers = [rank, 2 * world - 1 - rank] if name == "ScheduleZBVZeroBubble" else [rank, rank + world]
    chunks = [make_chunk(number) for number in (numbers if is_multi else [rank])]
    num_stages = world * len(chunks)
    cpu = torch.device("cpu")
    stages = [Stage(c, n, num_stages, cpu) for c, n in zip(chunks, numbers, strict=False)]

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output - target).square().mean()

    return kind(stages if is_multi else stages[0], NUM_MICRO_BATCHES, loss_fn=loss), chunks


def step(schedule: Any, chunks: list[nn.Module], number: int) -> list[torch.Tensor]:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    generator = torch.Generator().manual_seed(number)
    x, target = (torch.randn(ROWS * NUM_MICRO_BATCHES, WIDTH, generator=generator) for _ in range(2))
    for chunk in chunks:
        chunk.zero_grad()
    losses: list[torch.Tensor] = []
    has_loss = rank == world - 1 or (isinstance(schedule, schedules.ScheduleZBVZeroBubble) and rank == 0)
    extra = {"target": target, "losses": losses} if has_loss else {}
    schedule.step(*((x,) if rank == 0 else ()), **extra)
    grads = [p.grad.clone() for chunk in chunks for p in chunk.parameters() if p.grad is not None]
    return [*[loss.detach() for loss in losses], *grads]


def train(name: str, context: Any) -> tuple[list[list[torch.Tensor]], list[int]]:
    schedule, chunks = make_schedule(name, torch.distributed.get_rank(), torch.distributed.get_world_size())
    results, demands = [], []
    with context:
        for number in range(NUM_STEPS):
            results.append(step(schedule, chunks, number))
            demands.append(context.stats.num_demand_reloads if hasattr(context, "stats") else 0)
    return results, demands


def main(folder: Path, rank: int, world: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    facts: dict[str, Any] = {}
    for name in names:
        expected, _ = train(name, contextlib.nullcontext())
        for mode in ("auto", "all"):
            offload = ssdtrain.offload_activations(folder, POLICY | {"mode": mode})
            actual, demands = train(name, offload)
            steps = zip(expected, actual, strict=True)
            pairs = [pair for left, right in steps for pair in zip(left, right, strict=True)]
            stats = offload.stats
            facts[f"{name} {mode}"] = {
                "num_compared": len(pairs),
                "is_equal": all(torch.equal(a, b) for a, b in pairs),
                "num_offloaded": stats.num_offloaded,
                "num_demands": demands,
                "num_reloads": stats.num_prefetched + stats.num_demand_reloads,
                "num_live_records": stats.num_live_records,
                "written_nbytes": stats.written_nbytes,
                "plan": stats.plan,
            }
            offload.close()
    torch.distributed.destroy_process_group()
    print(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sys.argv[2:])
