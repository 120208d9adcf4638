"""GPUs: peak rate and memory, from the makers' data sheets (dense bf16, SXM where there are several forms)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    flops: float
    """Operations per second at its best."""
    memory_nbytes: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40", 312e12, 40e9),
        Gpu("A100", 312e12, 80e9),
        Gpu("L40S", 362e12, 48e9),
        Gpu("RTX4090", 165e12, 24e9),
        Gpu("H100", 989e12, 80e9),
        Gpu("H200", 989e12, 141e9),
        Gpu("B200", 2250e12, 180e9),
    )
}
