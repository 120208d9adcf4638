"""GPUs: peak rate and memory, from the makers' data sheets (dense bf16, SXM where there are several forms)."""

from __future__ import annotations

from dataclasses import dataclass

from ssdtrain.policy import parse_nbytes


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    flops: float
    """Operations per second at its best."""
    memory_nbytes: float
    """All it has."""


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


LEAST_MEMORY_NBYTES = 1 << 20
"""What is less was meant in another unit."""


def gpu_of(text: str) -> Gpu:
    """A GPU by name, in capitals or not, or one of the user's own: ``"400:48GB"``, TFLOP/s and memory.

    Raises:
        ValueError: there is none of this name, or the numbers cannot be read.
    """
    known = {name.lower(): gpu for name, gpu in GPUS.items()}
    if text.lower() in known:
        return known[text.lower()]
    rate, colon, memory = text.partition(":")
    if not colon:
        raise ValueError(f"Expected a GPU among {', '.join(GPUS)}, or numbers such as 400:48GB, got {text!r}")
    try:
        flops, nbytes = float(rate) * 1e12, parse_nbytes(memory)
    except ValueError as error:
        raise ValueError(f"Expected TFLOP/s and memory of a GPU such as 400:48GB, got {text!r}: {error}") from error
    if not (isinstance(nbytes, int) and nbytes >= LEAST_MEMORY_NBYTES and 0 < flops < 1e21):
        raise ValueError(
            f"Expected TFLOP/s and memory of a GPU such as 400:48GB, got {text!r}; a number without a unit is bytes"
        )
    return Gpu(text, flops, float(nbytes))
