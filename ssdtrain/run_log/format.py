"""The bytes of a run record: one line that says what it is, then blocks, each with its length and checksum.

A block is a dict as compressed JSON and is appended with one write. A process that dies in the middle leaves a cut
block at the end; everything before it can be read. Knows nothing of what the dicts mean.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VERSION = 1
"""Of the format; a reader refuses newer ones."""

_KIND = b"ssdtrain run record "
_MAX_LINE = 40
_FRAME = struct.Struct("<II")  # length of the payload, its crc32
_MAX_BLOCK_NBYTES = 256 << 20  # a length above this is no length


class RecordError(ValueError):
    """A file is no run record, or none that can be read; the message is one line."""


def first_line() -> bytes:
    """What every record begins with."""
    return _KIND + b"%d\n" % VERSION


def is_record(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like a record of any version."""
    with open(path, "rb") as file:
        return file.read(len(_KIND)) == _KIND


def pack(block: dict[str, Any]) -> bytes:
    """One block as bytes."""
    payload = zlib.compress(json.dumps(block, separators=(",", ":")).encode(), 6)
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


@dataclass
class Blocks:
    """What could be read of a record."""

    found: list[dict[str, Any]] = field(default_factory=list)
    """Whole blocks, in the order they were written."""
    num_damaged: int = 0
    """Whole blocks whose checksum was wrong."""
    cut_nbytes: int = 0
    """Bytes at the end that are no whole block: the run was ended in the middle of a write."""


def read_blocks(path: str | os.PathLike[str]) -> Blocks:
    """Reads every block that is whole.

    Raises:
        RecordError: the file is no record, of a newer version, or cut before its first block.
        OSError: it cannot be read.
    """
    data = Path(path).read_bytes()
    end = data.find(b"\n", 0, _MAX_LINE)
    if not data.startswith(_KIND) or end < 0 or not data[len(_KIND) : end].isdigit():
        raise RecordError(f"Expected a run record, got another kind of file: {path}; write one with record=...")
    version = int(data[len(_KIND) : end])
    if version > VERSION:
        raise RecordError(
            f"Expected a run record of version {VERSION} or older, got version {version}: {path}; update ssdtrain"
        )
    blocks = Blocks()
    for payload in _payloads(data, end + 1, blocks):
        blocks.found.append(json.loads(zlib.decompress(payload)))
    if not blocks.found:
        raise RecordError(f"Expected a whole run record, got one cut before its first block: {path}; run again")
    return blocks


def _payloads(data: bytes, at: int, blocks: Blocks) -> Iterator[bytes]:
    while at + _FRAME.size <= len(data):
        nbytes, checksum = _FRAME.unpack_from(data, at)
        payload = data[at + _FRAME.size : at + _FRAME.size + nbytes]
        if nbytes > _MAX_BLOCK_NBYTES or len(payload) < nbytes:
            break
        at += _FRAME.size + nbytes
        if zlib.crc32(payload) == checksum:
            yield payload
        else:
            blocks.num_damaged += 1
    blocks.cut_nbytes = len(data) - at
