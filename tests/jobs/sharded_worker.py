"""One rank of a job whose parameters are sharded by `fully_shard`, and whose optimizer state is on a drive.

Started by `tests/laws/test_state_of_every_kind.py`: trains plainly and offloaded, and says what differed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ssdtrain

POLICY = {"min_nbytes": 1024, "staging_nbytes": 64 * 1024, "chunk_nbytes": 20_000}
OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


def sharded_model(mesh: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(48, 48), nn.GELU()) for _ in range(4)))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
        loss = model(torch.randn(16, 48, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def check(name: str, mesh: Any, folder: Path) -> dict[str, Any]:
    """What a run with offload did and whether all is equal to one without."""
    plain, model = sharded_model(mesh), sharded_model(mesh)
    expected = OPTIMIZERS[name](plain.parameters())
    optimizer: Any = ssdtrain.offload_optimizer(OPTIMIZERS[name](model.parameters()), folder, POLICY)
    is_equal = train(plain, expected, range(4)) == train(model, optimizer, range(4))
    saved = optimizer.state_dict()
    resumed: Any = ssdtrain.offload_optimizer(OPTIMIZERS[name](model.parameters()), folder, POLICY)
    away_nbytes = optimizer.stats.away_nbytes
    resumed.load_state_dict(saved)
    optimizer.close()
    is_equal &= train(plain, expected, range(4, 7)) == train(model, resumed, range(4, 7))
    states = expected.state_dict()["state"], resumed.state_dict()["state"]
    for i, state in states[0].items():
        for key, value in state.items():
            found = states[1][i][key]
            is_equal &= type(found) is type(value) and torch.equal(local(found), local(value))
    pairs = zip(plain.parameters(), model.parameters(), strict=True)
    is_equal &= all(torch.equal(local(a), local(b)) for a, b in pairs)
    resumed.close()
    return {"is_equal": is_equal, "away_nbytes": away_nbytes}


def main() -> None:
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    print(json.dumps({name: check(name, mesh, folder) for name in OPTIMIZERS}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
