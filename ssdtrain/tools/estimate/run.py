"""A whole step on one GPU of the job, the one of the first pipeline stage, which holds most.

[Note: the model of a step]
A step computes forward once and backward twice as long. 1F1B keeps as many micro-batches alive on the first stage as
there are stages. Offloading leaves two consecutive blocks in memory; what is written in a step is written while half of
it passes (the paper's bandwidth), and read in the other half. Recomputing keeps the inputs of blocks and one block, and
costs another forward; the inputs may go to the drives too, but for two. The mix sends what the drives take, and keeps
the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from ssdtrain.tools.estimate.drives import Drives
from ssdtrain.tools.estimate.gpu import Gpu
from ssdtrain.tools.estimate.layer import layer_flops, layer_nbytes, layer_parameters
from ssdtrain.tools.estimate.shape import Shape

_STATE_NBYTES = 12  # of Adam in mixed precision: master copy and two moments
_GRADIENT_NBYTES = 4
_PARAMETER_NBYTES = 2
_RESIDENT_BLOCKS = 2
_RECOMPUTE_COST = 1 / 3


@dataclass(frozen=True)
class Estimate:
    """Numbers per GPU; bytes and seconds."""

    parameters: float
    """Of the whole model."""
    layer_nbytes: float
    """Activations of one block and micro-batch, mean over blocks."""
    step_nbytes: float
    """Activations saved per step."""
    forward_seconds: float
    """Of one micro-batch."""
    step_seconds: float
    """Bubbles of the pipeline included."""
    needed_bandwidth: float
    """Bytes per second to write all activations in half of a step."""
    hidden_share: float
    """Of the activations: what the drives take without a wait."""
    keep_nbytes: float
    """Peak of activations when all stay."""
    recompute_nbytes: float
    """Peak of activations when every block is recomputed."""
    offload_nbytes: float
    """Peak of activations when all go to the drives, waiting where they must."""
    mix_nbytes: float
    """Peak of activations when as much goes as the drives take without a wait."""
    recompute_cost: float
    """Share of the step time that recomputing adds."""
    offload_cost: float
    """Share that waiting for the drives adds when all go."""
    inputs_nbytes: float
    """Inputs of blocks per step: what recomputing keeps, or sends to the drives."""
    inputs_bandwidth: float
    """Bytes per second to write them in half of a step that recomputes."""
    recompute_offload_nbytes: float
    """Peak of activations when blocks are recomputed and their inputs go to the drives."""
    recompute_offload_cost: float
    """Share of the step time that recomputing and waiting for the drives then add."""
    state_nbytes: float
    """Parameters, gradients and optimizer state, divided over data parallel ranks as far as they are sharded."""
    optimizer_nbytes: float
    """The optimizer's part of that."""
    written_bytes_per_second: float
    """To the drives, with the mix, averaged over steps."""
    life_days: float | None
    """Of the drives, with the mix; null without their endurance."""
    price_per_day: float | None
    """What wearing them out costs; null without their endurance and price."""


def estimate(shape: Shape, gpu: Gpu, drives: Drives, mfu: float = 0.4) -> Estimate:
    """What a run needs.

    Args:
        shape: model and job.
        gpu: each of its GPUs.
        drives: those of one GPU.
        mfu: share of the GPU's peak rate that training reaches.

    Raises:
        ValueError: `mfu` is not above 0 and at most 1.
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"Expected mfu above 0 and at most 1, got {mfu}")
    blocks = shape.num_blocks / shape.pp
    block_nbytes, block_flops, parameters = _mean_block(shape)
    forward = blocks * block_flops / shape.tp / (gpu.flops * mfu)
    bubble = (shape.micro_batches + shape.pp - 1) / shape.micro_batches
    step = 3 * forward * shape.micro_batches * bubble
    alive = min(shape.pp, shape.micro_batches)
    saved = block_nbytes * blocks * shape.micro_batches
    needed = saved / (step / 2)
    share = min(1.0, drives.write_bandwidth / needed)
    keep = block_nbytes * blocks * alive
    resident = _RESIDENT_BLOCKS * block_nbytes
    inputs = float(shape.element_nbytes * shape.sequence * shape.batch * shape.hidden)
    inputs /= shape.tp if shape.is_sequence_parallel else 1
    saved_inputs = inputs * blocks * shape.micro_batches
    inputs_rate = saved_inputs / (step * (1 + _RECOMPUTE_COST) / 2)
    wait = max(0.0, inputs_rate / drives.write_bandwidth - 1)
    rate = saved * share / step
    optimizer_nbytes = _STATE_NBYTES * parameters / shape.tp / shape.pp / (1 if shape.sharding == "none" else shape.dp)
    return Estimate(
        parameters=parameters,
        layer_nbytes=block_nbytes,
        step_nbytes=saved,
        forward_seconds=forward,
        step_seconds=step,
        needed_bandwidth=needed,
        hidden_share=share,
        keep_nbytes=keep,
        recompute_nbytes=inputs * blocks * alive + block_nbytes,
        offload_nbytes=min(keep, resident),
        mix_nbytes=min(keep, keep * (1 - share) + resident),
        recompute_cost=_RECOMPUTE_COST,
        offload_cost=max(0.0, needed / drives.write_bandwidth - 1),
        inputs_nbytes=saved_inputs,
        inputs_bandwidth=inputs_rate,
        recompute_offload_nbytes=min(inputs * blocks * alive, _RESIDENT_BLOCKS * inputs) + block_nbytes,
        recompute_offload_cost=(1 + _RECOMPUTE_COST) * (1 + wait) - 1,
        state_nbytes=_weights_nbytes(shape, parameters / shape.tp / shape.pp) + optimizer_nbytes,
        optimizer_nbytes=optimizer_nbytes,
        written_bytes_per_second=rate,
        life_days=drives.life_days(rate),
        price_per_day=drives.price_per_day(rate),
    )


def _weights_nbytes(shape: Shape, parameters: float) -> float:
    """Parameters and gradients of one GPU; where ranks share them, two blocks of parameters are gathered at a time."""
    if shape.sharding != "full":
        return (_PARAMETER_NBYTES + _GRADIENT_NBYTES) * parameters
    gathered = _PARAMETER_NBYTES * parameters * min(1.0, _RESIDENT_BLOCKS / (shape.num_blocks / shape.pp))
    return (_PARAMETER_NBYTES + _GRADIENT_NBYTES) * parameters / shape.dp + gathered


def _mean_block(shape: Shape) -> tuple[float, float, float]:
    """Bytes and operations of a block, mean over those of the model, and the model's parameters."""
    kinds = (False, True) if shape.kind == "t5" else (False,)
    nbytes = sum(layer_nbytes(shape, is_decoder=kind) for kind in kinds) / len(kinds)
    flops = sum(layer_flops(shape, is_decoder=kind) for kind in kinds) / len(kinds)
    weights = sum(layer_parameters(shape, is_decoder=kind) for kind in kinds) * shape.layers
    return nbytes, flops, float(weights + shape.vocabulary * shape.hidden)
