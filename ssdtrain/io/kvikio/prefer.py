"""Is GPUDirect worth it? Real on these directories, and measured faster than copies through pinned slabs."""

from __future__ import annotations

import ctypes
import errno
import mmap
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from ssdtrain.io.python import Fence

from .memory import Driver, Memory
from .probe import probe

Side = tuple[Any, Sequence[Any]]
"""An open engine and its files."""

_PAGE_NBYTES = 4096
_NBYTES = 64 << 20
_SLAB_NBYTES = 4 << 20
_NUM_ROUNDS = 3
_MAX_SECONDS = 5.0
_WORTH = 1.1  # a difference smaller than this is noise, and slabs let go of device memory sooner


class _Ready:
    """Device memory that nobody else uses."""

    def __init__(self, device_index: int) -> None:
        self.device_index = device_index

    def synchronize(self) -> None:
        """Nothing to wait for."""


@lru_cache(maxsize=8)
def pays(directories: tuple[str, ...], device_index: int, open_engine: Callable[..., Any]) -> tuple[bool, str]:
    """Whether kvikio is the better engine between a GPU and these directories, and why; found out once per process."""
    verdict, choices = probe(directories), list[Any]()
    if not verdict.is_real:
        return False, verdict.sentence
    try:
        for kind in ("kvikio", "auto"):
            choices.append(open_engine(kind, directories, _NBYTES, _SLAB_NBYTES))
        direct, host = [(choice.engine, choice.files) for choice in choices]
        is_better, figures = is_faster(direct, host, device_index)
    except (OSError, RuntimeError) as error:  # a better engine is a wish: training goes on without it
        is_better, figures = False, f"it could not be measured: {error}"
    finally:
        for choice in choices:
            choice.close()
    return is_better, f"{verdict.sentence}; {figures}"


def is_faster(direct: Side, host: Side, device_index: int) -> tuple[bool, str]:
    """Whether the kvikio engine moves memory of a device faster than a `host` engine, and the figures.

    The host engine is timed on host memory, as if copies from the device cost nothing: kvikio has to beat that.

    Raises:
        OSError: there is no room, or no device memory, to try with.
    """
    through_slabs, past_host = _rate_on_host(host), _rate_on_device(direct, device_index)
    figures = f"measured {past_host / 1e9:.2f} GB/s, {through_slabs / 1e9:.2f} GB/s through slabs"
    return past_host > _WORTH * through_slabs, figures


def _rate_on_host(side: Side) -> float:
    pages = mmap.mmap(-1, _NBYTES)
    start = ctypes.c_char.from_buffer(pages)  # keeps the pages mapped
    return moved_per_second(side, Memory(ctypes.addressof(start), _NBYTES))


def _rate_on_device(side: Side, device_index: int) -> float:
    with Driver().allocated(_NBYTES, device_index) as memory:
        return moved_per_second(side, memory, _Ready(device_index))


def moved_per_second(
    side: Side, memory: Memory, fence: Fence | None = None, clock: Callable[[], float] = time.monotonic
) -> float:
    """Bytes per second, written and read back, in the best of a few rounds; 0 when a request failed.

    Args:
        side: an open engine and its files, whose first bytes are overwritten.
        memory: what is written and read into: an equal part of it for each file.
        fence: of device memory; None for host memory.
        clock: seconds.

    Raises:
        OSError: there is no room.
    """
    parts = _split(side[1], memory)
    deadline, best = clock() + _MAX_SECONDS, 0.0
    for _ in range(_NUM_ROUNDS):
        began = clock()
        if not _move(side[0], parts, fence):
            return 0.0
        ended = clock()
        best = max(best, 2 * sum(part.nbytes for part in parts) / max(ended - began, 1e-9))
        if ended > deadline:
            break
    return best


def _split(files: Sequence[Any], memory: Memory) -> list[Memory]:
    """The part of `memory` for each file, which is made long enough for it."""
    parts, share = [], memory.nbytes // len(files) // _PAGE_NBYTES * _PAGE_NBYTES
    for i, file in enumerate(files):
        limit = share if file.cap_nbytes is None else min(share, file.cap_nbytes)
        nbytes = limit // file.block_nbytes * file.block_nbytes
        if nbytes == 0:
            raise OSError(errno.EDQUOT, f"{file.cap_nbytes} bytes are not enough to try")
        file.grow(nbytes)
        parts.append(Memory(memory.address + i * share, nbytes))
    return parts


def _move(engine: Any, parts: Sequence[Memory], fence: Fence | None) -> bool:
    before_write = {} if fence is None else {"producer": fence}
    before_read = {} if fence is None else {"ready": fence}
    writes = [engine.write(i, 0, part.nbytes, [(*part, 0)], **before_write) for i, part in enumerate(parts)]
    for write in writes:
        write.wait()
    if any(write.error is not None for write in writes):
        return False
    reads = [engine.read(write, 0, *part, **before_read) for write, part in zip(writes, parts, strict=True)]
    return all(read.wait(_MAX_SECONDS) and read.error is None for read in reads)
