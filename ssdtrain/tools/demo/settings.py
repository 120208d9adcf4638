"""What one demonstration trains and where: plain values, checked once, that are passed to the workers as JSON.

It knows neither torch nor ssdtrain, so the command line can build it without importing either.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

DEFAULT_POLICY = {"staging_nbytes": "80MiB", "prefetch_nbytes": "64MiB"}
"""The demo saves tensors of 6 to 24 MiB: enough of them each way to ride out a slow moment of the drive."""


@dataclass(frozen=True)
class DemoSettings:
    """One demonstration.

    Raises:
        ValueError: A number is out of range, or `width` is not a multiple of `heads`.
    """

    directory: str
    """Folder on the drive that saved activations are offloaded to."""
    layers: int = 14
    """Transformer blocks."""
    width: int = 384
    """Size of the residual stream."""
    heads: int = 6
    """Attention heads per block."""
    batch: int = 8
    """Sequences per step."""
    sequence: int = 512
    """Bytes of text per sequence."""
    steps: int = 5
    """Timed steps, after one warm-up step."""
    seed: int = 0
    """Seed of the weights and of the batches."""
    threads: int | None = None
    """CPU threads of each run; None leaves the choice to torch."""
    data: str | None = None
    """File to train on; None takes the standard library's sources."""
    policy: dict[str, Any] = field(default_factory=lambda: dict(DEFAULT_POLICY))
    """Fields of `ssdtrain.ActivationPolicy`."""

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "batch", "sequence", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} to be at least 1, got {getattr(self, name)}.")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"Expected threads to be at least 1, got {self.threads}.")
        if self.width % self.heads:
            raise ValueError(
                f"Expected width to be a multiple of heads, got width {self.width} and heads {self.heads}. "
                f"Try width {self.heads * max(1, round(self.width / self.heads))}."
            )

    def describe(self) -> str:
        """Says in one line what is trained."""
        shape = f"{self.layers} layers, width {self.width}, {self.heads} heads"
        data = f"batches of {self.batch} x {self.sequence} bytes"
        return f"GPT of {shape} on {data}: 1 warm-up step, {self.steps} timed ones"

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as JSON can carry them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DemoSettings:
        """Rebuilds the settings from `to_dict()`."""
        return cls(**{f.name: values[f.name] for f in fields(cls)})
