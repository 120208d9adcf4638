"""One rank of two that wrap offloaded models in PyTorch's parallelisms; started by `test_parameter_replicas.py`."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
import torch.distributed as dist
from state_tools import EAGER_STATE, MLP, adamw, batch, check_same, train, values
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import ssdtrain


def model_of_rank() -> nn.Module:
    """Other values on every rank: construction has to even them out."""
    torch.manual_seed(dist.get_rank())
    return MLP()


def steps(model: Any, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Losses on batches of this rank."""
    losses = []
    for step in range(4):
        loss = model(batch(10 * step + dist.get_rank()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def replicas(folder: Path, wrap: Any, *, pages_optimizer: bool) -> bool:
    """Whether training is equal to the bit to that of a plain model, and on every rank."""
    plain, model = model_of_rank(), model_of_rank()
    wrapped = wrap(plain)
    expected = steps(wrapped, adamw(wrapped.parameters()))
    ssdtrain.offload_parameters(model, folder, EAGER_STATE | {"prefetch_nbytes": 0})
    owner = ssdtrain.parameter_offload(model)
    wrapped = wrap(model)
    optimizer: torch.optim.Optimizer = adamw(wrapped.parameters())
    if pages_optimizer:
        optimizer = ssdtrain.offload_optimizer(optimizer, owner, EAGER_STATE)
    check_same(steps(wrapped, optimizer), expected)
    check_same(values(model), values(plain))
    owner.flush()
    assert all(r.storage is None for r in inside.working_set(owner)) and owner.stats.read_nbytes > 0
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, values(model))
    check_same(everyone[0], everyone[1])
    return True


# Whether a broadcast asks the class of a tensor what to do, as other collectives do: since PyTorch 2.12.
ASKS_CLASSES = "has_torch_function" in inspect.unwrap(dist.broadcast).__code__.co_names


def broadcast(folder: Path) -> bool:
    """By hand, of parameters as they are and through their data."""
    for take in (lambda p: p, lambda p: p.data, lambda p: p.detach()):
        plain, model = model_of_rank(), model_of_rank()
        ssdtrain.offload_parameters(model, folder, EAGER_STATE)
        with contextlib.nullcontext() if ASKS_CLASSES else ssdtrain.parameter_offload(model).gathered():
            for p in (*plain.parameters(), *model.parameters()):
                with torch.no_grad():
                    dist.broadcast(take(p), 0)
        check_same(values(model), values(plain))
        torch.manual_seed(0)
        check_same(values(model), values(MLP()))
    is_async, error = (True, ValueError) if ASKS_CLASSES else (False, RuntimeError)
    with pytest.raises(error, match=r"async_op=False.*gathered\(\)|Cannot access data pointer"):
        dist.broadcast(next(model.parameters()), 0, async_op=is_async)
    return True


def refused(folder: Path) -> list[str]:
    """What those say who put other parameters in the place of ours; the model trains on as if nothing had been."""
    messages = []
    for wrap in (
        FullyShardedDataParallel,
        lambda m: FullyShardedDataParallel(m, use_orig_params=True),
        lambda m: FullyShardedDataParallel(m.blocks[0]),
        fully_shard,
        lambda m: fully_shard(m.blocks[1]),
        lambda m: [fully_shard(block) for block in m.blocks],
    ):
        plain, model = model_of_rank(), model_of_rank()
        ssdtrain.offload_parameters(model, folder, EAGER_STATE)
        before = dict(model.named_parameters())
        try:
            wrap(model)
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
        assert all(found is before[name] for name, found in model.named_parameters())
        check_same(values(model), values(plain))
        check_same(train(model, adamw(model.parameters()), 2), train(plain, adamw(plain.parameters()), 2))
        ssdtrain.parameter_offload(model).close()
        fully_shard(model)  # which it may have now
    return messages


def prepared(folder: Path) -> bool | None:
    """Accelerate's `prepare`, where it is installed."""
    try:
        from accelerate import Accelerator
    except ImportError:
        return None
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    return replicas(folder, accelerator.prepare, pages_optimizer=False)


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    facts = {
        "replicas": replicas(folder, DistributedDataParallel, pages_optimizer=False),
        "views": replicas(
            folder,
            lambda m: DistributedDataParallel(m, gradient_as_bucket_view=True, find_unused_parameters=True),
            pages_optimizer=True,
        ),
        "broadcast": broadcast(folder),
        "refused": refused(folder),
        "prepared": prepared(folder),
    }
    print(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
