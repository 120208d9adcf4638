"""Which block is needed next: learned from the order in which blocks were used.

Knows numbers only.
"""

from __future__ import annotations

from collections.abc import Iterator


class BlockOrder:
    """After two uses in a row comes what came after them last time; else the next block of the definition."""

    def __init__(self, num_blocks: int) -> None:
        """Nothing is known yet."""
        self._num_blocks = num_blocks
        self._followers: dict[tuple[int, int], int] = {}
        self._recent = (-1, -1)

    @property
    def latest(self) -> int:
        """The block in use, -1 before the first."""
        return self._recent[1]

    def note(self, block: int) -> None:
        """`block` is used now."""
        self._followers[self._recent] = block
        self._recent = (self._recent[1], block)

    def upcoming(self) -> Iterator[int]:
        """The next blocks, as far as they can be told; may repeat itself, never more than once around."""
        recent = self._recent
        for _ in range(2 * self._num_blocks):
            follower = self._followers.get(recent, recent[1] + 1)
            if follower >= self._num_blocks:
                return
            yield follower
            recent = (recent[1], follower)
