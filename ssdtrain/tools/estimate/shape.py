"""The shape of a model and of the job that trains it."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("gpt", "bert", "t5", "llama")
SHARDINGS = ("none", "optimizer", "full")


@dataclass(frozen=True)
class Shape:
    """A transformer in mixed precision (bf16), split over GPUs as Megatron does.

    Raises:
        ValueError: numbers that do not fit together.
    """

    kind: str = "gpt"
    """One of gpt, bert, t5, llama."""
    layers: int = 32
    """Blocks; of a T5, so many in the encoder and as many in the decoder."""
    hidden: int = 4096
    """Size of the residual stream."""
    heads: int = 32
    """Of attention."""
    kv_heads: int | None = None
    """Key and value heads of a Llama; None: as many as `heads`."""
    ffn: int | None = None
    """Width of the MLP; None: 4 x hidden, for a Llama 8/3 x hidden."""
    sequence: int = 2048
    """Tokens per sequence."""
    batch: int = 1
    """Sequences of one micro-batch on one GPU."""
    vocabulary: int = 50304
    tp: int = 1
    """Tensor parallel size."""
    pp: int = 1
    """Pipeline stages."""
    dp: int = 1
    """Data parallel ranks."""
    sharding: str = "optimizer"
    """What data parallel ranks share: the optimizer's state, all state (FSDP, ZeRO-3), or nothing."""
    micro_batches: int = 1
    """Per step and pipeline."""
    is_sequence_parallel: bool = False
    """Megatron's sequence parallelism."""
    has_flash: bool = True
    """Attention that keeps no scores (FlashAttention, SDPA)."""
    has_dropout: bool = True
    element_nbytes: int = 2
    """Of an activation."""

    def __post_init__(self) -> None:
        """Checks."""
        if self.kind not in KINDS:
            raise ValueError(f"Expected a model among {', '.join(KINDS)}, got {self.kind!r}")
        if self.sharding not in SHARDINGS:
            raise ValueError(f"Expected sharding among {', '.join(SHARDINGS)}, got {self.sharding!r}")
        for name in "layers hidden heads sequence batch vocabulary tp pp dp micro_batches ffn".split():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Expected {name} of at least 1, got {value}")
        for whole, part in (("hidden", "heads"), ("heads", "tp"), ("layers", "pp"), ("hidden", "tp")):
            if getattr(self, whole) % getattr(self, part):
                numbers = getattr(self, whole), getattr(self, part)
                raise ValueError(f"Expected {whole} to be a multiple of {part}, got {numbers[0]} and {numbers[1]}")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"Expected heads to be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")

    @property
    def ffn_width(self) -> int:
        """Width of the MLP."""
        if self.ffn is not None:
            return self.ffn
        return 4 * self.hidden if self.kind != "llama" else 8 * self.hidden // 3

    @property
    def kv_width(self) -> int:
        """Width of keys, and of values."""
        return self.hidden // self.heads * (self.kv_heads or self.heads)

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return 2 * self.layers if self.kind == "t5" else self.layers
