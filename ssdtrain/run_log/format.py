"""The bytes of a run record: one line that says what it is, then blocks, each with its length and checksum.

A block is a dict as compressed JSON and is appended with one write. A process that dies in the middle leaves a cut
block at the end; everything before it can be read. Knows nothing of what the dicts mean.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

VERSION = 1
"""Of the format; a reader refuses newer ones."""

_KIND = b"ssdtrain run record "
_MAX_LINE = 40
_FRAME = struct.Struct("<II")  # length of the payload, its crc32
_MAX_BLOCK_NBYTES = 64 << 20  # a length above this is no length
MAX_TEXT_NBYTES = 64 << 20
"""Of one block before it is compressed; the largest timelines have a third of it."""
_LEAST_TEXT_NBYTES = 64 << 20  # of all blocks, however small the file
_MAX_RATIO = 64  # of the text of all blocks to the file
_LEAST_VALUES = 4_000_000
_MAX_VALUES_PER_BYTE = 8

Parse = Callable[[bytes], dict[str, Any] | None]
"""Makes a block of its text. Raises ValueError for what is none."""


class RecordError(ValueError):
    """A file is no run record, or none that can be read; the message is one line."""


def first_line() -> bytes:
    """What every record begins with."""
    return _KIND + b"%d\n" % VERSION


def is_record(fd: int) -> bool:
    """Whether an open file begins like a record of any version."""
    return os.pread(fd, len(_KIND), 0) == _KIND


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


def read_blocks(path: str | os.PathLike[str], parse: Parse) -> Blocks:
    """Reads every block that is whole. `parse` makes one of its JSON text, or None of what is not needed.

    Raises:
        RecordError: the file is no record, of a newer version, cut before its first block, holds what no record holds,
            or more than a file of its size could.
        OSError: it cannot be read.
    """
    with open(path, "rb", opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise RecordError(f"Expected a run record, got no regular file: {path}; write one with record=...")
        _check_first_line(file.readline(_MAX_LINE), path)
        blocks, bounds = Blocks(), _Bounds(status.st_size)
        try:
            for payload in _payloads(file, status.st_size, blocks):
                block = parse(bounds.inflated(payload))
                if block is not None:
                    blocks.found.append(block)
        except (ValueError, zlib.error) as error:
            raise RecordError(f"Expected a run record, got one that no run wrote: {error}: {path}") from error
    if not blocks.found:
        raise RecordError(f"Expected a whole run record, got one cut before its first block: {path}; run again")
    return blocks


def _open_without_waiting(path: str, flags: int) -> int:
    """A pipe would have us wait for who writes into it."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _check_first_line(line: bytes, path: str | os.PathLike[str]) -> None:
    number = line.removeprefix(_KIND).removesuffix(b"\n")
    if not line.startswith(_KIND) or not line.endswith(b"\n") or not number.isdigit():
        raise RecordError(f"Expected a run record, got another kind of file: {path}; write one with record=...")
    version = int(number)
    if version > VERSION:
        raise RecordError(
            f"Expected a run record of version {VERSION} or older, got version {version}: {path}; update ssdtrain"
        )


class _Bounds:
    """How much text and how many values may come out of a file: a few bytes of it could fill memory otherwise."""

    def __init__(self, file_nbytes: int) -> None:
        self._left_nbytes = max(_LEAST_TEXT_NBYTES, _MAX_RATIO * file_nbytes)
        self._left_values = max(_LEAST_VALUES, _MAX_VALUES_PER_BYTE * file_nbytes)

    def inflated(self, payload: bytes) -> bytes:
        limit = min(self._left_nbytes, MAX_TEXT_NBYTES)
        inflater = zlib.decompressobj()
        text = inflater.decompress(payload, limit + 1)
        self._left_nbytes -= len(text)
        self._left_values -= text.count(b",") + text.count(b"[") + text.count(b"{")
        if len(text) > limit or self._left_values < 0:
            raise ValueError("more in it than a file of its size can hold")
        if not inflater.eof:
            raise ValueError("a block that ends too early")
        return text


def _payloads(file: BinaryIO, file_nbytes: int, blocks: Blocks) -> Iterator[bytes]:
    at = file.tell()
    while at + _FRAME.size <= file_nbytes:
        nbytes, checksum = _FRAME.unpack(file.read(_FRAME.size))
        if nbytes > _MAX_BLOCK_NBYTES or at + _FRAME.size + nbytes > file_nbytes:
            break
        payload = file.read(nbytes)
        at += _FRAME.size + nbytes
        if zlib.crc32(payload) == checksum:
            yield payload
        else:
            blocks.num_damaged += 1
    blocks.cut_nbytes = file_nbytes - at
