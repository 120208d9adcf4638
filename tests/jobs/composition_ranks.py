"""The table's rows of two and four ranks: replicas, shards, tensor parallelism and pipelines, in one job."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pipelining_worker
import sharded_worker
import tensor_parallel_worker
import torch
import torch.distributed as dist
from composition import Group, Way
from composition_eager import batch, grads, mean, mlp
from composition_state import resumed
from torch import nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

RANKS = Group("Two ranks")
FOUR = Group("Four ranks")


@contextlib.contextmanager
def job(folder: Path) -> Iterator[None]:
    """The ranks have met."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-of-{size}", rank=rank, world_size=size)
    yield
    dist.destroy_process_group()


def mesh(*shape: int) -> DeviceMesh:
    shape = shape or (2,)
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple(map(str, range(len(shape)))))


def steps(way: Way, model: Any, optimizer: Any = None, *, micro_batches: int = 1, loss_of: Any = mean) -> list[Any]:
    """Two steps on batches of this rank; all but the last of several micro-batches do not communicate."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01) if optimizer is None else optimizer
    found = []
    with way.activations():
        for step in range(2):
            for i in range(micro_batches):
                with contextlib.nullcontext() if i == micro_batches - 1 else model.no_sync():
                    loss = loss_of(model, batch(10 * step + 2 * i + dist.get_rank()))
                    way.send()
                    loss.backward()
                found.append(loss.detach())
            found += grads(model)
            optimizer.step()
            optimizer.zero_grad()
    return [*found, *[p.detach() for p in model.parameters()]]


# -- replicas ----------------------------------------------------------------------------------------------------------


@RANKS.row("DDP")
def replicas(way: Way) -> Any:
    return steps(way, DistributedDataParallel(mlp()))


@RANKS.row("DDP, static graph")
def static_graph(way: Way) -> Any:
    return steps(way, DistributedDataParallel(mlp(), static_graph=True))


@RANKS.row("DDP, gradients as views of buckets")
def bucket_views(way: Way) -> Any:
    return steps(way, DistributedDataParallel(mlp(), gradient_as_bucket_view=True))


@RANKS.row("DDP, unused parameters looked for")
def unused(way: Way) -> Any:
    model = mlp()
    model.register_module("never", nn.Linear(2, 2))
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
    return steps(way, DistributedDataParallel(model, find_unused_parameters=True))


@RANKS.row("DDP, no_sync for all micro-batches but the last")
def no_sync(way: Way) -> Any:
    return steps(way, DistributedDataParallel(mlp()), micro_batches=3)


@RANKS.row("DDP, non-reentrant checkpoints")
def checkpoints(way: Way) -> Any:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    return steps(way, DistributedDataParallel(Checkpointed()))


@RANKS.row("DDP, parameters and optimizer state offloaded")
def all_of_it(way: Way) -> Any:
    model = mlp()
    owner = way.parameters(model)
    wrapped = DistributedDataParallel(model)
    optimizer = way.optimizer(torch.optim.AdamW(wrapped.parameters(), lr=1e-2), owner)
    losses = []
    with way.activations():
        for step in range(2):
            loss = mean(wrapped, batch(2 * step + dist.get_rank()))
            way.send()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return [*losses, *[value.clone() for value in model.state_dict().values()]]


# -- shards ------------------------------------------------------------------------------------------------------------


@RANKS.row("FSDP1")
def fsdp1(way: Way) -> Any:
    return steps(way, FullyShardedDataParallel(mlp(), device_id=torch.device("cpu")))


@RANKS.row("FSDP1, original parameters, every block")
def fsdp1_blocks(way: Way) -> Any:
    cpu, model = torch.device("cpu"), mlp()
    for i, block in enumerate(model):
        model[i] = FullyShardedDataParallel(block, device_id=cpu, use_orig_params=True)
    return steps(way, FullyShardedDataParallel(model, device_id=cpu, use_orig_params=True))


def sharded(way: Way, *shape: int, pages_optimizer: bool = False) -> Any:
    """The model of the job that shards; it is as wide as its batches."""
    model = sharded_worker.sharded_model(mesh(*shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if pages_optimizer:
        optimizer = way.optimizer(optimizer)
    with way.activations():
        losses = sharded_worker.train(model, optimizer, range(3))
    return [losses, *[p.detach() for p in model.parameters()]]


@RANKS.row("FSDP2")
def fsdp2(way: Way) -> Any:
    return sharded(way)


@RANKS.row("FSDP2, optimizer state offloaded")
def fsdp2_state(way: Way) -> Any:
    return sharded(way, pages_optimizer=True)


@RANKS.row("FSDP2, kept whole between forward and backward")
def fsdp2_whole(way: Way) -> Any:
    model = mlp()
    for block in model:
        fully_shard(block, mesh=mesh(), reshard_after_forward=False)
    return steps(way, fully_shard(model, mesh=mesh()))


@RANKS.row("FSDP2, non-reentrant checkpoints")
def fsdp2_checkpoints(way: Way) -> Any:
    model = mlp()
    for block in model:
        fully_shard(block, mesh=mesh())
    fully_shard(model, mesh=mesh())

    def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
        model.unshard()
        for block in model:
            x = checkpoint(block, x, use_reentrant=False)
        return x.square().mean()

    return steps(way, model, loss_of=loss_of)


@RANKS.row("FSDP2, optimizer state offloaded, saved and loaded (DCP)")
def fsdp2_saved(way: Way) -> Any:
    def make() -> Any:
        model = sharded_worker.sharded_model(mesh())
        return model, way.optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))

    return resumed(make, sharded_worker.train)


@RANKS.row("a collective that is under way (AsyncCollectiveTensor)")
def under_way(way: Way) -> Any:
    newer = getattr(collectives, "all_gather_single_autograd", None)  # the name since PyTorch 2.13
    all_gather = newer or collectives.all_gather_tensor_autograd

    def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
        gathered = all_gather(model[0](x), 0, dist.group.WORLD)
        assert isinstance(gathered, collectives.AsyncCollectiveTensor)
        return mean(model[1:], gathered.sin() * gathered)

    return steps(way, mlp(), loss_of=loss_of)


# -- tensor parallelism ------------------------------------------------------------------------------------------------


def tensor_parallel(way: Way, *, splits: bool) -> Any:
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(tensor_parallel_worker.VOCABULARY, (2, 2, 32), generator=generator)

    def make() -> Any:
        return tensor_parallel_worker.parallel_model(mesh(), splits_loss=splits)

    context = None if way.folder is None else way.activations()
    return tensor_parallel_worker.train(make, lambda step: (data[0], data[1]), context, splits=splits)[0]


@RANKS.row("tensor and sequence parallel (DTensor)")
def sequence_parallel(way: Way) -> Any:
    return tensor_parallel(way, splits=False)


@RANKS.row("tensor and sequence parallel, loss_parallel")
def loss_parallel(way: Way) -> Any:
    return tensor_parallel(way, splits=True)


@RANKS.row("tensor parallel, optimizer state offloaded")
def tensor_parallel_state(way: Way) -> Any:
    model = tensor_parallel_worker.parallel_model(mesh(), splits_loss=False)
    optimizer = way.optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))
    tokens = torch.randint(96, (2, 2, 32), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        tensor_parallel_worker.loss_of(model, tokens[0], tokens[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.to_local() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


# -- pipelines ---------------------------------------------------------------------------------------------------------


def pipeline(way: Way, name: str) -> Any:
    schedule, chunks = pipelining_worker.make_schedule(name, dist.get_rank(), 2)
    with way.activations():
        return [pipelining_worker.step(schedule, chunks, number) for number in range(2)]


for row, schedule_name in {
    "GPipe": "ScheduleGPipe",
    "1F1B": "Schedule1F1B",
    "interleaved 1F1B": "ScheduleInterleaved1F1B",
    "zero bubble": "ScheduleInterleavedZeroBubble",
}.items():
    RANKS.row(f"pipeline, {row}")(partial(pipeline, name=schedule_name))


# -- four --------------------------------------------------------------------------------------------------------------


@FOUR.row("HSDP: FSDP2 on two replicas of two shards")
def hsdp(way: Way) -> Any:
    return sharded(way, 2, 2)


@FOUR.row("HSDP, optimizer state offloaded")
def hsdp_state(way: Way) -> Any:
    return sharded(way, 2, 2, pages_optimizer=True)


@FOUR.row("HSDP, optimizer state offloaded, saved and loaded (DCP)")
def hsdp_saved(way: Way) -> Any:
    def make() -> Any:
        model = sharded_worker.sharded_model(mesh(2, 2))
        return model, way.optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))

    return resumed(make, sharded_worker.train)


@FOUR.row("FSDP2 of tensor parallel blocks")
def two_dimensions(way: Way) -> Any:
    whole, model = mesh(2, 2), mlp()
    for block in model:
        parallelize_module(block, whole["1"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=whole["0"])
    return steps(way, fully_shard(model, mesh=whole["0"]))
