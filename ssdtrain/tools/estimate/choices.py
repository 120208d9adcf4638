"""What to do: where activations and optimizer state may go, what each choice costs, and which is the best.

Knows an estimate of a step; the same assumptions, see [Note: the model of a step] in `run`. Optimizer state that is
elsewhere comes and goes once a step, which nothing hides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile

from ssdtrain.policy import parse_nbytes
from ssdtrain.tools.estimate.drives import Drives
from ssdtrain.tools.estimate.gpu import LEAST_MEMORY_NBYTES, Gpu
from ssdtrain.tools.estimate.run import Estimate, estimate
from ssdtrain.tools.estimate.shape import Shape

_MOST_GPUS = 4096
ON_GPU = "on the GPU"


@dataclass(frozen=True)
class Host:
    """Pinned host memory of one GPU."""

    memory_nbytes: float
    gbs: float = 25.0
    """GB/s of copies each way."""


def host_of(memory: str | None, gbs: float) -> Host | None:
    """Host memory as users write it, ``"128GB"``; None where none is to be used.

    Raises:
        ValueError: it is no size, or the rate is not above 0.
    """
    if memory is None:
        return None
    nbytes = parse_nbytes(memory)
    if not (isinstance(nbytes, int) and nbytes >= LEAST_MEMORY_NBYTES and 0 < gbs < math.inf):
        raise ValueError(
            f"Expected host_memory and host_gbs such as 128GB and 25, got {memory!r} and {gbs:g}; a number without a "
            "unit is bytes"
        )
    return Host(float(nbytes), gbs)


@dataclass(frozen=True)
class Choice:
    """One way to train, per GPU."""

    activations: str
    optimizer_state: str
    how: str
    """What to write for it."""
    memory_nbytes: float
    """Of the GPU: peak of activations, and all state that stays there."""
    host_nbytes: float
    cost: float
    """Share of the step time that it adds."""
    written_bytes_per_second: float
    """To the drives, averaged over steps."""
    life_days: float | None
    """Of the drives; None where nothing is written, or the endurance is not known."""

    def fits(self, gpu: Gpu) -> bool:
        """Whether the GPU has so much memory."""
        return self.memory_nbytes <= gpu.memory_nbytes


@dataclass(frozen=True)
class _Part:
    """One place for activations, or for optimizer state."""

    name: str
    how: str
    gpu_nbytes: float
    host_nbytes: float = 0.0
    cost: float = 0.0
    written_nbytes: float = 0.0  # a step


def choices(found: Estimate, drives: Drives, host: Host | None = None) -> list[Choice]:
    """All of them, the cheapest in time first, of equals the one that takes the least memory."""
    made = [
        _choice(activations, state, found, drives)
        for activations in _places_of_activations(found, host)
        for state in _places_of_state(found, drives, host)
        if host is None or activations.host_nbytes + state.host_nbytes <= host.memory_nbytes
    ]
    return sorted(made, key=lambda choice: (round(choice.cost, 2), choice.memory_nbytes))


def best(some: list[Choice], gpu: Gpu, num: int) -> list[Choice]:
    """The cheapest `num` that fit, each with less memory than the one before; then those that need least."""
    fit: list[Choice] = []
    for choice in some:
        if choice.fits(gpu) and (not fit or choice.memory_nbytes < 0.95 * fit[-1].memory_nbytes):
            fit.append(choice)
    rest = sorted([choice for choice in some if not choice.fits(gpu)], key=lambda choice: choice.memory_nbytes)
    return (fit + rest)[:num]


def gpus_that_fit(
    shape: Shape, gpu: Gpu, drives: Drives, host: Host | None, mfu: float, most_cost: float
) -> tuple[int, Choice] | None:
    """The fewest data parallel ranks that share all state (FSDP, ZeRO-3) with which something fits, and what.

    `most_cost`: the share of the step time that it may add.
    """
    for dp in takewhile(lambda dp: dp <= _MOST_GPUS, (shape.dp << power for power in range(64))):
        sharded = replace(shape, dp=dp, sharding="full")
        cheapest_first = choices(estimate(sharded, gpu, drives, mfu), drives, host)
        fit = next((choice for choice in cheapest_first if choice.fits(gpu) and choice.cost <= most_cost), None)
        if fit is not None:
            return dp, fit
    return None


def _choice(activations: _Part, state: _Part, found: Estimate, drives: Drives) -> Choice:
    cost = activations.cost + state.cost
    written = (activations.written_nbytes + state.written_nbytes) / (found.step_seconds * (1 + cost))
    stays = found.state_nbytes - found.optimizer_nbytes + state.gpu_nbytes
    return Choice(
        activations=activations.name,
        optimizer_state=state.name,
        how=" + ".join(filter(None, [activations.how, state.how])),
        memory_nbytes=activations.gpu_nbytes + stays,
        host_nbytes=activations.host_nbytes + state.host_nbytes,
        cost=cost,
        written_bytes_per_second=written,
        life_days=drives.life_days(written) if written else None,
    )


def _places_of_activations(found: Estimate, host: Host | None) -> Iterator[_Part]:
    again, all_nbytes, inputs = found.recompute_cost, found.step_nbytes, found.inputs_nbytes
    yield _Part("keep", "", found.keep_nbytes)
    yield _Part("recompute", "torch.utils.checkpoint per block", found.recompute_nbytes, cost=again)
    yield _Part(
        "offload what hides",
        "offload_activations(DIR)",
        found.mix_nbytes,
        written_nbytes=all_nbytes * found.hidden_share,
    )
    how, cost = 'offload_activations(DIR, mode="all")', found.offload_cost
    yield _Part("offload all", how, found.offload_nbytes, cost=cost, written_nbytes=all_nbytes)
    how, peak = 'offload_activations(DIR, recompute="all", model=model)', found.recompute_offload_nbytes
    cost = found.recompute_offload_cost
    yield _Part("recompute, offload inputs", how, peak, cost=cost, written_nbytes=inputs)
    if host is None:
        return
    needs = max(0.0, found.keep_nbytes - found.offload_nbytes)
    wait = max(0.0, found.needed_bandwidth / (host.gbs * 1e9) - 1)
    yield _Part("offload all to host memory", "offload_activations(None)", found.offload_nbytes, needs, wait)
    needs = max(0.0, found.recompute_nbytes - found.recompute_offload_nbytes)
    wait = (1 + again) * (1 + max(0.0, found.inputs_bandwidth / (host.gbs * 1e9) - 1)) - 1
    how = 'offload_activations(None, recompute="all", model=model)'
    yield _Part("recompute, inputs to host memory", how, found.recompute_offload_nbytes, needs, wait)


def _places_of_state(found: Estimate, drives: Drives, host: Host | None) -> Iterator[_Part]:
    nbytes, step = found.optimizer_nbytes, found.step_seconds
    yield _Part(ON_GPU, "", nbytes)
    seconds = nbytes / drives.write_bandwidth
    yield _Part("drives", "offload_optimizer(optimizer, DIR)", 0.0, 0.0, seconds / step, nbytes)
    if host is not None and not math.isinf(host.memory_nbytes):
        seconds = nbytes / (host.gbs * 1e9)
        yield _Part("host memory", "offload_optimizer(optimizer, None)", 0.0, nbytes, seconds / step)
