"""What the engine tests share: aligned memory, files and engines of every kind, at sizes that make them work hard."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import mmap
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = tuple(os.environ.get("SSDTRAIN_TEST_ENGINES", "io_uring threads python").split())
SLAB_NBYTES = 64 * 1024


def implementation(kind: str) -> Any:
    """The module that has `kind`'s spill file."""
    return importlib.import_module(f"ssdtrain.io.{kind}" if kind in ("python", "kvikio") else "ssdtrain._C")


def round_up(nbytes: int, step: int) -> int:
    return -(-nbytes // step) * step


def random_bytes(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


class Memory:
    """Page-aligned memory with an address."""

    def __init__(self, nbytes: int, content: bytes = b"") -> None:
        self._map = mmap.mmap(-1, max(nbytes, 1))
        self.nbytes = nbytes
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._map[: len(content)] = content

    def bytes(self, nbytes: int | None = None) -> bytes:
        return self._map[: self.nbytes if nbytes is None else nbytes]

    def fill(self, byte: int) -> None:
        self._map[:] = bytes([byte]) * len(self._map)


@dataclass
class Written:
    """A write request, what it was asked to write, and where from."""

    write: Any
    contents: Sequence[bytes]
    sources: list[Memory] = field(default_factory=list)


class Io:
    """An engine on new files, closed again with everything else by `close`."""

    def __init__(
        self,
        kind: str,
        directory: Path | str,
        *,
        num_slabs: int = 8,
        num_files: int = 1,
        file_nbytes: int = 16 << 20,
        **options: Any,
    ) -> None:
        module = implementation(kind)
        self.files = [module.SpillFile(str(directory), None) for _ in range(num_files)]
        for file in self.files:
            file.grow(file_nbytes)
        staging = num_slabs * SLAB_NBYTES
        if kind == "python":
            self.engine = module.PythonEngine(self.files, staging, SLAB_NBYTES, **options)
        elif kind == "kvikio":
            verdict = module.GpuDirect("posix", ("there is no GPU in the tests",))
            self.engine = module.KvikioEngine(self.files, staging, SLAB_NBYTES, gpudirect=verdict, **options)
        else:
            self.engine = module.Engine(kind, self.files, staging, SLAB_NBYTES, **options)
        self.has_slabs = kind != "kvikio"
        self.block = self.files[0].block_nbytes
        self._next = [0] * num_files
        self.kept: list[Memory] = []  # sources, as long as a thread may read them

    def close(self) -> None:
        self.engine.close()
        for file in self.files:
            file.close()

    def written_nbytes(self, nbytes: int) -> int:
        """What a piece of `nbytes` puts into the file: whole blocks, unless it goes there without a slab."""
        return round_up(nbytes, self.block) if self.has_slabs else nbytes

    def write(self, *contents: bytes, file: int = 0, gap_blocks: int = 0) -> Written:
        """Begins to write `contents` as the pieces of one new extent, `gap_blocks` of nothing after each."""
        sources = [Memory(len(content), content) for content in contents]
        self.kept.extend(sources)
        pieces, at = [], 0
        for source in sources:
            pieces.append((source.address, source.nbytes, at))
            at += round_up(source.nbytes, self.block) + gap_blocks * self.block
        offset = self._next[file]
        self._next[file] += at
        return Written(self.engine.write(file, offset, at, pieces), contents, sources)

    def start_read(self, written: Written, piece: int) -> tuple[Any, Memory]:
        destination = Memory(round_up(len(written.contents[piece]), self.block))
        destination.fill(0xEE)
        read = self.engine.read(written.write, piece, destination.address, destination.nbytes)
        return read, destination

    def read(self, written: Written, piece: int = 0) -> bytes:
        """Piece as it comes back; raises when the read reports an error."""
        read, destination = self.start_read(written, piece)
        assert read.wait()
        assert read.error is None, read.error
        return destination.bytes(len(written.contents[piece]))

    def check(self, written: Written) -> None:
        """All pieces come back equal."""
        for piece, content in enumerate(written.contents):
            assert self.read(written, piece) == content, f"piece {piece} of {len(written.contents)}"


def descriptors() -> set[tuple[int, str]]:
    """Descriptors of this process and what each is open on.

    What is in the set now and was not before is ours. Others may close meanwhile: garbage of an earlier test.
    """
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
    return found


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether `condition` comes true: for what the kernel cleans up some time after we are done."""
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
