"""One of two ranks of `test_bad_input.py`: begins with each bad input on one rank, and trains after each.

python begin_worker.py RANK FOLDER FULL_DIRECTORY
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

import ssdtrain
from ssdtrain.store.saved_tensors import innermost_hooks

POLICY = {"min_nbytes": 0, "mode": "all", "staging_nbytes": "64KiB"}
STATE = {"min_nbytes": 0, "staging_nbytes": "64KiB", "chunk_nbytes": "64KiB"}
FEATURES: dict[str, Any] = {"activations": POLICY, "optimizer": STATE}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(128, 128), nn.GELU())])


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters())


def step(module: nn.Module, optimizer: Any, session: Any) -> list[torch.Tensor]:
    with session:
        loss = module(torch.ones(64, 128)).square().mean()
    loss.backward()
    for parameter in module.parameters():
        dist.all_reduce(parameter.grad)
    optimizer.step()
    optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in module.parameters()]


def begin(session: ssdtrain.Offload, make: Callable[[nn.Module], Any] = adamw, **options: Any) -> None:
    """What must fail, with all as it was: a step, which needs both ranks, comes to what it comes to without."""
    module, plain = model(), model()
    try:
        session.begin(module, make(module), **options)
    except Exception:
        nothing = contextlib.nullcontext()
        ours, expected = step(module, adamw(module), nothing), step(plain, adamw(plain), nothing)
        assert all(map(torch.equal, ours, expected))
        raise


def cases(folder: Path, full: str, is_bad: bool) -> dict[str, Callable[[], None]]:
    """By name: what is wrong on one rank, or on both."""
    good = folder / "good"
    good.mkdir(exist_ok=True)
    file, unknown = folder / "file", folder / "own.yaml"
    file.write_text("")
    unknown.write_text(f"directory: {good}\noptimiser: true\n")

    def on(bad: Any) -> ssdtrain.Offload:
        return ssdtrain.Offload(bad if is_bad else good, **FEATURES)

    def save_on_cpu() -> None:
        with torch.autograd.graph.save_on_cpu() if is_bad else contextlib.nullcontext():
            begin(on(good), switches={})

    return {
        "missing": lambda: begin(on(folder / "missing")),
        "file": lambda: begin(on(file)),
        "full": lambda: begin(on(full)),
        "optimizer": lambda: begin(on(good), (lambda m: torch.optim.LBFGS(m.parameters())) if is_bad else adamw),
        "switch": lambda: begin(on(good), switches={"activation_offloading": is_bad}),
        "save_on_cpu": save_on_cpu,
        "yaml": lambda: begin(ssdtrain.Offload(ssdtrain.Section.load(unknown))),
        "variable": lambda: begin(ssdtrain.Offload(ssdtrain.Section.from_environment({"SSDTRAIN_DIRR": str(good)}))),
    }


def main() -> None:
    rank, folder, full = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    own, found = folder / f"rank{rank}", {}
    own.mkdir()
    for name, case in cases(own, full, rank == 1).items():
        try:
            case()
            found[name] = "no error"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        assert innermost_hooks() is None
    module = model()
    session = ssdtrain.Offload(own / "good", **FEATURES)
    (optimizer,) = session.begin(module, adamw(module))
    step(module, optimizer, session)
    assert session.stats is not None and session.stats.read_nbytes
    session.close()
    found["left"] = str([path.name for path in (own / "good").iterdir()])
    (folder / f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    main()
