"""One rank of a job whose activations are DTensors; trains plainly and offloaded, and says what differed.

Started by `activations/test_wrapped.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

import ssdtrain

WIDTH, LENGTH, BATCH, NUM_BLOCKS, VOCABULARY = 64, 128, 8, 3, 96
POLICY = {"min_nbytes": 1024, "mode": "all", "staging_nbytes": 256 * 1024}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def parallel_model(mesh: DeviceMesh, *, splits_loss: bool) -> Model:
    model = Model()
    for block in model.blocks:
        plan = {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
            "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        }
        parallelize_module(block, mesh, plan)
    head = ColwiseParallel(
        input_layouts=Shard(1),
        output_layouts=Shard(-1) if splits_loss else Replicate(),
        use_local_output=not splits_loss,
    )
    embedding = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False)
    return parallelize_module(model, mesh, {"embedding": embedding, "head": head})  # type: ignore[return-value]


def batch_sharded_model(mesh: DeviceMesh) -> Model:
    return distribute_module(Model(), mesh)  # type: ignore[return-value]


def loss_of(model: Model, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = model(tokens)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1))
    return loss.full_tensor() if isinstance(loss, DTensor) and not loss.placements[0].is_replicate() else loss


def local(value: Any) -> torch.Tensor:
    found: torch.Tensor = value.to_local() if isinstance(value, DTensor) else value
    return found


def train(
    make: Callable[[], Model], data: Callable[[int], tuple[torch.Tensor, torch.Tensor]], context: Any, *, splits: bool
) -> tuple[list[torch.Tensor], int]:
    """Losses and gradients of two steps, and the bytes held between forward and backward of the last."""
    model = make()
    values, held_nbytes = [], 0
    for step in range(2):
        with loss_parallel() if splits else contextlib.nullcontext():
            with context if context is not None else contextlib.nullcontext():
                loss = loss_of(model, *data(step))
                torch.zeros((), requires_grad=True).exp()
            if context is not None:
                context._store.source.store.engine.drain()
                held_nbytes = context.stats.num_live_records and context._counters.held_nbytes
            loss.backward()
        values.append(local(loss).detach())
    return values + [local(p.grad).clone() for p in model.parameters() if p.grad is not None], held_nbytes


def check(
    make: Callable[[], Model], data: Callable[[int], tuple[torch.Tensor, torch.Tensor]], folder: Path, *, splits: bool
) -> dict[str, Any]:
    plain, _ = train(make, data, None, splits=splits)
    offload = ssdtrain.offload_activations(folder, POLICY)
    ours, held_nbytes = train(make, data, offload, splits=splits)
    stats = offload.stats
    kept = sum(s.nbytes for reason, s in stats.skipped.items() if reason != "weight")
    return {
        "is_equal": len(plain) == len(ours) and all(map(torch.equal, plain, ours)),
        "offloaded_nbytes": stats.offloaded_nbytes,
        "saved_nbytes": stats.offloaded_nbytes + kept,  # of both steps
        "held_nbytes": held_nbytes,
        "skipped": {reason: [s.count, s.nbytes] for reason, s in stats.skipped.items()},
        "read_nbytes": stats.read_nbytes,
    }


def main() -> None:
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def tokens(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        both = torch.randint(VOCABULARY, (2, BATCH, LENGTH), generator=generator)
        return both[0], both[1]

    def sharded(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = tokens(step)
        return distribute_tensor(a, mesh, [Shard(0)]), distribute_tensor(b, mesh, [Shard(0)])

    found = {
        "sequence parallel": check(lambda: parallel_model(mesh, splits_loss=False), tokens, folder, splits=False),
        "loss parallel": check(lambda: parallel_model(mesh, splits_loss=True), tokens, folder, splits=True),
        "batch sharded": check(lambda: batch_sharded_model(mesh), sharded, folder, splits=False),
    }
    print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
