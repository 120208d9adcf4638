"""What the children of `test_deepspeed.py` share: models, configurations, and training the same twice.

A child is one rank of a job on the CPU with gloo. DeepSpeed's shared-memory operator stays off: it takes two minutes to
compile, and nothing here depends on it.
"""

from __future__ import annotations

import gc
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import nn
from torch.nn import functional as F

import ssdtrain
import ssdtrain.integrations.deepspeed
from ssdtrain.store.saved_tensors import innermost_hooks

KIB = 1024
WIDTH, ROWS, NUM_STEPS = 64, 256, int(os.environ.get("NUM_STEPS", "5"))
# Every activation of 256 rows is 64 KiB or more; staging and prefetch bound what is in memory on its way.
POLICY = {"min_nbytes": "32KiB", "mode": "all", "staging_nbytes": "256KiB", "prefetch_nbytes": "256KiB"}
KEEP = POLICY | {"min_nbytes": "1TiB"}

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Block(nn.Module):
    """Saves weights in every way there is: as parameter, as a view, transposed by hand, detached."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mix = nn.Parameter(torch.randn(width, width) / width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        x = x + x @ self.mix.t()
        return x + x @ self.mix.detach()


class Model(nn.Module):
    """A few blocks; `run` says how each is called (a way of checkpointing, for instance)."""

    def __init__(self, *, layers: int = 3, run: Callable[..., torch.Tensor] | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.run = run or (lambda block, x: block(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.run(block, x)
        return x


@dataclass
class Case:
    """One way of training: what is in the configuration beside the usual, and how the model is made."""

    config: dict[str, Any] = field(default_factory=dict)
    make: Callable[[], nn.Module] = Model
    dtype: torch.dtype = torch.float32
    micro_batches: int = 1
    is_replicated: bool = False  # every rank sees the same data, as under tensor parallelism

    def build(self, section: dict[str, Any] | None) -> Any:
        """An engine; `section` is what the configuration has for ssdtrain."""
        torch.manual_seed(0)
        config = {
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_accumulation_steps": self.micro_batches,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "steps_per_print": 2,
            "log_level": "info",
        } | self.config
        if section is not None:
            config["ssdtrain"] = section
        return deepspeed.initialize(model=self.make(), config=config)[0]


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """The section of ZeRO; at stage 3 nothing is so small that it stays gathered."""
    own = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0} if stage == 3 else {}
    return {"zero_optimization": {"stage": stage} | own | more}


@dataclass
class Result:
    """What a run came to."""

    losses: list[torch.Tensor]
    grads: list[torch.Tensor]
    parameters: list[torch.Tensor]
    stats: ssdtrain.Stats | None


def section(directory: str, policy: dict[str, Any] = POLICY) -> dict[str, Any]:
    """The section of the configuration."""
    return {"enabled": True, "activations": {"directory": directory} | policy}


def loss_of(output: torch.Tensor) -> torch.Tensor:
    """A user's loss, computed after the engine returned; it saves tensors as large as the output."""
    return F.cross_entropy(output.float().tanh().exp(), torch.arange(len(output)) % output.shape[1])


def train(case: Case, own: dict[str, Any] | None, num_steps: int = NUM_STEPS) -> Result:
    """Some steps with an engine of its own."""
    engine = case.build(own)
    generator = torch.Generator().manual_seed(0 if case.is_replicated else deepspeed.comm.get_rank())
    losses, grads = [], []
    for step in range(num_steps):
        for _ in range(case.micro_batches):
            x = torch.randn(ROWS, WIDTH, generator=generator).to(case.dtype).requires_grad_()
            loss = loss_of(engine(x))
            losses.append(loss.detach().clone())
            engine.backward(loss)
            if step == num_steps - 1 and engine.is_gradient_accumulation_boundary():
                grads = grads_of(engine)
            engine.step()
            del loss
    result = Result(losses, grads, parameters_of(engine), end(engine))
    assert innermost_hooks() is None, "hooks were left on"
    return result


def grads_of(engine: Any) -> list[torch.Tensor]:
    """Whole gradients, whoever has the parts."""
    whole = safe_get_full_grad if engine.zero_optimization() else lambda parameter: parameter.grad
    return [whole(parameter).detach().clone() for parameter in trained(engine)]


def parameters_of(engine: Any) -> list[torch.Tensor]:
    """Whole parameters, at full precision where there is one."""
    whole = safe_get_full_fp32_param if engine.zero_optimization() else lambda parameter: parameter
    return [whole(parameter).detach().clone() for parameter in trained(engine)]


def trained(engine: Any) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]


def end(engine: Any) -> ssdtrain.Stats | None:
    """Ends an engine; what ssdtrain did for it."""
    offload = engine.__dict__.get("ssdtrain")
    engine.destroy()
    return offload.stats if offload is not None else None


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Whether all are equal to the bit."""
    return len(left) == len(right) > 0 and all(
        a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip((t.reshape(-1) for t in left), (t.reshape(-1) for t in right), strict=True)
    )


def compare(case: Case, directory: str, run: Callable[..., Result] = train) -> dict[str, Any]:
    """Trains without ssdtrain, a step with everything kept, and with everything on disk; what the test looks at."""
    plain = run(case, None)
    kept = run(case, section(directory, KEEP), 1)
    ours = run(case, section(directory))
    gc.collect()
    assert plain.stats is None and kept.stats is not None and ours.stats is not None
    assert kept.stats.num_offloaded == 0
    return {
        "losses": same(plain.losses, ours.losses),
        "finite": all(math.isfinite(loss) for loss in plain.losses),
        "grads": same(plain.grads, ours.grads),
        "parameters": same(plain.parameters, ours.parameters),
        "kept_peak": kept.stats.peak_saved_nbytes,
    } | facts(ours.stats, directory)


def facts(stats: ssdtrain.Stats, directory: str) -> dict[str, Any]:
    """What a run did to the drive."""
    return {
        "peak": stats.peak_saved_nbytes,
        "written": stats.written_nbytes,
        "read": stats.read_nbytes,
        "disk": stats.peak_disk_nbytes,
        "live": stats.num_live_records,
        "fallbacks": list(stats.fallbacks),
        "weights": stats.skipped["weight"].count if "weight" in stats.skipped else 0,
        "files": len(list(Path(directory).iterdir())),
    }


def raises(kind: type[BaseException], text: str) -> Any:
    """Inside, this must be raised, with this in its message."""
    return pytest.raises(kind, match=re.escape(text))
