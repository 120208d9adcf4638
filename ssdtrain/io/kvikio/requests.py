"""Requests whose bytes go straight from the tensor's memory to the file: a source is free when its write is over."""

from __future__ import annotations

from ssdtrain.io.python import Chunk, Fence, Piece, Write

from .memory import Memory


class DirectWrite(Write):
    """A write without slabs; methods with an underscore need the monitor's condition."""

    producer: Fence | None = None

    def sources(self, chunk: Chunk) -> list[tuple[int, Memory]]:
        """What there is to write for a chunk: (offset in the chunk, where)."""
        return [
            (part.chunk_offset, Memory(_address(self._pieces[part.piece], part.piece_offset), part.nbytes))
            for part in chunk.parts
            if not part.is_skipped
        ]

    def stored_nbytes(self, chunk: Chunk) -> int:
        return sum(part.nbytes for part in chunk.parts if not part.is_skipped)  # gaps and padding are not written

    def _end_write(self, chunk: Chunk) -> None:
        self._free_sources(chunk)
        super()._end_write(chunk)

    def _fail_write(self, chunk: Chunk, number: int, rescued: bytes | bytearray | None) -> None:
        if rescued is not None:
            self._free_sources(chunk)
        super()._fail_write(chunk, number, rescued)


def _address(piece: Piece, offset: int) -> int:
    return piece.address + offset
