"""Real text for training without a download: the sources of Python's standard library, or a file.

Text is read as bytes, one token a byte, so nothing has to be tokenised and any file will do. Batches depend
on the seed and the step alone: two processes with the same text see the same tokens.

Example:
    >>> text = Text(standard_library())
    >>> tokens, targets = text.batch(0, size=8, sequence=512)
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Text", "read_text", "standard_library"]


class Text:
    """A byte string that hands out training batches."""

    def __init__(self, data: bytes, *, seed: int = 0) -> None:
        """Keeps `data` as a tensor of bytes.

        Args:
            data: The text.
            seed: Where the batches of this text begin to differ from another's.

        Raises:
            ValueError: `data` is empty.
        """
        if not data:
            raise ValueError("Expected text to train on, got 0 bytes. Pass a file with something in it.")
        self._tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._seed = seed

    def __len__(self) -> int:
        return len(self._tokens)

    def batch(self, step: int, *, size: int, sequence: int) -> tuple[Tensor, Tensor]:
        """Draws the batch of a step.

        Args:
            step: Number of the step; the same number draws the same batch.
            size: Sequences in the batch.
            sequence: Tokens per sequence.

        Returns:
            Tokens and the tokens that follow them, int64, each of shape (size, sequence).

        Raises:
            ValueError: The text is shorter than one sequence and its target.
        """
        if len(self) <= sequence:
            raise ValueError(
                f"Expected a text longer than one sequence of {sequence} bytes, got {len(self)} bytes. "
                "Use a longer text or a shorter sequence."
            )
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        starts = torch.randint(len(self) - sequence, (size,), generator=generator).tolist()
        windows = torch.stack([self._tokens[start : start + sequence + 1] for start in starts]).long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def read_text(path: str | None) -> bytes:
    """Reads the file at `path`, or the standard library's sources when it is None.

    Raises:
        OSError: The file cannot be read.
    """
    return standard_library() if path is None else Path(path).read_bytes()


def standard_library() -> bytes:
    """Reads the top-level modules of this Python's standard library, about 5 MB, in order of their names.

    Raises:
        FileNotFoundError: This Python has no sources on disk.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    data = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    if not data:
        raise FileNotFoundError(
            f"Expected the standard library's sources in {folder}, got none. Name a text file (--data)."
        )
    return data
