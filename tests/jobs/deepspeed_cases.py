"""The cases of `test_deepspeed.py`: each is a function of a directory and returns what the test looks at."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed_tools import (
    NUM_STEPS,
    ROWS,
    WIDTH,
    Block,
    Case,
    Model,
    Result,
    compare,
    end,
    loss_of,
    parameters_of,
    zero,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ssdtrain.store.saved_tensors import innermost_hooks

BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 2, "hysteresis": 1}}
CLIP = {"gradient_clipping": 0.1}


def zero0(directory: str) -> dict[str, Any]:
    return compare(Case(zero(0) | CLIP, micro_batches=2), directory)


def zero1(directory: str) -> dict[str, Any]:
    return compare(Case(zero(1) | CLIP, micro_batches=2), directory)


def zero2(directory: str) -> dict[str, Any]:
    return compare(Case(zero(2) | CLIP, micro_batches=2), directory)


def zero3(directory: str) -> dict[str, Any]:
    return compare(Case(zero(3) | CLIP, micro_batches=2), directory)


def bf16_zero0(directory: str) -> dict[str, Any]:
    return compare(Case(zero(0) | BF16, dtype=torch.bfloat16), directory)


def bf16_zero1(directory: str) -> dict[str, Any]:
    return compare(Case(zero(1) | BF16, dtype=torch.bfloat16), directory)


def bf16_zero2(directory: str) -> dict[str, Any]:
    return compare(Case(zero(2) | BF16, dtype=torch.bfloat16), directory)


def bf16_zero3(directory: str) -> dict[str, Any]:
    return compare(Case(zero(3) | BF16, dtype=torch.bfloat16), directory)


def autocast_zero2(directory: str) -> dict[str, Any]:
    return compare(Case(zero(2) | {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}), directory)


def autocast_zero3(directory: str) -> dict[str, Any]:
    return compare(Case(zero(3) | {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}), directory)


def fp16_zero0(directory: str) -> dict[str, Any]:
    return _with_fp16(zero(0), directory)


def fp16_zero2(directory: str) -> dict[str, Any]:
    return _with_fp16(zero(2), directory)


def fp16_zero3(directory: str) -> dict[str, Any]:
    return _with_fp16(zero(3), directory)


def _with_fp16(config: dict[str, Any], directory: str) -> dict[str, Any]:
    """DeepSpeed asks whether oneDNN has fp16 kernels for this processor; torch computes without them, more slowly."""
    accelerator = deepspeed.get_accelerator()
    asked = accelerator.is_fp16_supported
    accelerator.is_fp16_supported = lambda: True
    try:
        return compare(Case(config | FP16, dtype=torch.float16), directory)
    finally:
        accelerator.is_fp16_supported = asked


def optimizer_on_cpu(directory: str) -> dict[str, Any]:
    config = zero(2, offload_optimizer={"device": "cpu"}) | {"zero_force_ds_cpu_optimizer": False}
    return compare(Case(config), directory)


def parameters_on_cpu(directory: str) -> dict[str, Any]:
    offloads = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    return compare(
        Case(zero(3, **offloads) | BF16 | {"zero_force_ds_cpu_optimizer": False}, dtype=torch.bfloat16), directory
    )


def optimizer_on_nvme(directory: str) -> dict[str, Any]:
    """The same drive for both; DeepSpeed's own bytes are seen there too."""
    place = Path(directory).parent / f"infinity{deepspeed.comm.get_rank()}"
    place.mkdir(exist_ok=True)
    offload = {"offload_optimizer": {"device": "nvme", "nvme_path": str(place)}}
    large = partial(Model, layers=12)  # DeepSpeed leaves states of less than 1 MiB in memory
    facts = compare(Case(zero(3, **offload) | {"zero_force_ds_cpu_optimizer": False}, large), directory)
    return facts | {"theirs": sum(path.stat().st_size for path in place.rglob("*") if path.is_file())}


def recompute(directory: str) -> dict[str, Any]:
    return compare(Case(zero(3), lambda: Model(run=lambda b, x: checkpoint(b, x, use_reentrant=True))), directory)


def recompute_not_reentrant(directory: str) -> dict[str, Any]:
    return compare(Case(zero(3), lambda: Model(run=lambda b, x: checkpoint(b, x, use_reentrant=False))), directory)


def recompute_not_reentrant_zero1(directory: str) -> dict[str, Any]:
    return compare(Case(zero(1), lambda: Model(run=lambda b, x: checkpoint(b, x, use_reentrant=False))), directory)


class _Hidden(nn.Module):
    """Returns its result in an object that DeepSpeed does not look into: it learns too late that backward comes here.

    Its linear function then gathers the frozen weight by itself, which it knows by attributes of the saved parameter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8, requires_grad=False)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(result=F.linear(x, self.weight))


class _FrozenModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.last = Block(), _Hidden(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.hidden(self.first(x)).result))


def frozen_and_unseen(directory: str) -> dict[str, Any]:
    return compare(Case(zero(3), _FrozenModel), directory)


class _TensorParallel:
    """All ranks are one group that splits activations, none splits data."""

    def get_model_parallel_rank(self) -> int:
        return deepspeed.comm.get_rank()

    def get_model_parallel_world_size(self) -> int:
        return deepspeed.comm.get_world_size()

    def get_model_parallel_group(self) -> Any:
        return deepspeed.comm.get_world_group()


def _checkpointed(directory: str, run: Any, **options: bool) -> dict[str, Any]:
    """With DeepSpeed's own checkpointing, of all blocks but the first."""

    def make() -> Model:
        model = Model()
        deepspeed.checkpointing.reset()
        deepspeed.checkpointing.configure(_TensorParallel(), num_checkpoints=2, **options)
        model.run = lambda block, x: block(x) if block is model.blocks[0] else run(block, x)
        return model

    return compare(Case(zero(1), make, is_replicated=True), directory)


def checkpointing(directory: str) -> dict[str, Any]:
    return _checkpointed(directory, deepspeed.checkpointing.checkpoint)


def checkpointing_partitioned(directory: str) -> dict[str, Any]:
    return _checkpointed(directory, deepspeed.checkpointing.checkpoint, partition_activations=True)


def checkpointing_on_cpu(directory: str) -> dict[str, Any]:
    return _checkpointed(
        directory, deepspeed.checkpointing.checkpoint, partition_activations=True, checkpoint_in_cpu=True
    )


def checkpointing_not_reentrant(directory: str) -> dict[str, Any]:
    return _checkpointed(directory, deepspeed.checkpointing.non_reentrant_checkpoint, partition_activations=True)


# -- pipeline ----------------------------------------------------------------------------------------------------------


def pipeline(directory: str) -> dict[str, Any]:
    return compare(_pipeline_case(), directory, run=_train_pipeline)


def pipeline_recompute(directory: str) -> dict[str, Any]:
    return compare(_pipeline_case(activation_checkpoint_interval=1), directory, run=_train_pipeline)


def _pipeline_case(**options: Any) -> Case:
    def make() -> PipelineModule:
        blocks = [LayerSpec(Block) for _ in range(4)]
        stages = deepspeed.comm.get_world_size()
        return PipelineModule(blocks, num_stages=stages, loss_fn=_pipeline_loss, partition_method="uniform", **options)

    return Case(zero(1) | {"train_micro_batch_size_per_gpu": ROWS}, make, micro_batches=4)


def _pipeline_loss(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return loss_of(output)


def _train_pipeline(case: Case, own: dict[str, Any] | None, num_steps: int = NUM_STEPS) -> Result:
    deepspeed.checkpointing.configure(None)  # back to the defaults: other cases partition
    engine = case.build(own)
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield torch.randn(ROWS, WIDTH, generator=generator), torch.zeros(ROWS)

    losses = [engine.train_batch(batches()).detach().clone() for _ in range(num_steps)]
    assert innermost_hooks() is None, "hooks were left on"
    evaluated = engine.eval_batch(batches(), compute_loss=True)
    parameters = parameters_of(engine)
    return Result([*losses, evaluated.clone()], parameters, parameters, end(engine))
