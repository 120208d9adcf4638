"""Is GPUDirect worth it? Real on these directories, and measured faster than copies through pinned slabs."""

from __future__ import annotations

import ctypes
import errno
import mmap
import time
from collections.abc import Callable, Sequence
from typing import Any

from ssdtrain._python_engine import Fence

from .memory import Driver, Memory
from .probe import GpuDirect, probe

Side = tuple[Any, Sequence[Any]]
"""An open engine and its files."""

_PAGE_NBYTES = 4096
_NBYTES = 64 << 20
_NUM_ROUNDS = 3
_MAX_SECONDS = 5.0
_WORTH = 1.1  # a difference smaller than this is noise, and slabs let go of device memory sooner


class _Ready:
    """Device memory that nobody else uses."""

    def __init__(self, device_index: int) -> None:
        self.device_index = device_index

    def synchronize(self) -> None:
        """Nothing to wait for."""


def better_than(host: Side, open_direct: Callable[[GpuDirect], Side], device_index: int) -> tuple[Side | None, str]:
    """The kvikio engine where it is better than a `host` engine for memory of a device, and why; None and why not.

    The host engine is timed on host memory, as if copies from the device cost nothing: kvikio has to beat that.
    """
    verdict = probe([file.directory for file in host[1]])
    if not verdict.is_real:
        return None, f"kvikio is not preferred: {verdict.sentence}"
    try:
        direct = open_direct(verdict)
    except Exception as error:  # a better engine is a wish, and training goes on without it
        return None, f"kvikio is not preferred: it does not open ({error})"
    try:
        rates = _rate_on_host(host), _rate_on_device(direct, device_index)
    except OSError as error:
        rates, verdict = (0.0, 0.0), GpuDirect(verdict.mode, (f"it could not be measured ({error})",))
    figures = f"{rates[1] / 1e9:.2f} GB/s against {rates[0] / 1e9:.2f} through slabs"
    if rates[1] > _WORTH * rates[0]:
        return direct, f"{verdict.sentence}; {figures}"
    direct[0].close()
    for file in direct[1]:
        file.close()
    return None, f"kvikio is not preferred: {verdict.sentence}; {figures}"


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
