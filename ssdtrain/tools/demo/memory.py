"""The memory of this process as Linux counts it: peak resident size, and a cap on private memory.

It knows nothing of tensors. Resident memory (VmRSS) is what the demo reports. The cap is RLIMIT_DATA, which
needs no privilege and bounds private writable memory (VmData): torch's tensors, staging slabs and thread
stacks alike.
"""

from __future__ import annotations

import resource
import threading
from contextlib import suppress
from pathlib import Path

_SAMPLE_SECONDS = 0.005
_RESET_SLACK_NBYTES = 1 << 20
"""The kernel counts resident pages per CPU and adds them up late: two of its numbers may differ this much."""


def read_status(field: str) -> int:
    """Reads one size of `/proc/self/status` in bytes, such as `VmRSS`, `VmHWM` or `VmData`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"Expected a line {field} in /proc/self/status, found none. The demo needs Linux.")


class PeakResident:
    """Peak of the resident memory from its creation on, above the level at its creation.

    The kernel keeps the peak (VmHWM) and lets a process reset its own; where it does not, a thread samples.
    """

    def __init__(self) -> None:
        self._sampler = None if _reset_kernel_peak() else PeakSampler("VmRSS")
        self._level = read_status("VmRSS")

    def nbytes(self) -> int:
        """Returns the peak so far in bytes above the level at the start."""
        peak = read_status("VmHWM") if self._sampler is None else self._sampler.peak_nbytes
        return max(0, peak - self._level)

    def forget(self) -> None:
        """Begins a new peak above the same level."""
        if self._sampler is None:
            _reset_kernel_peak()
        else:
            self._sampler.peak_nbytes = read_status("VmRSS")


class PeakSampler:
    """A daemon thread that remembers the largest value seen of one field of `/proc/self/status`."""

    def __init__(self, field: str) -> None:
        self.start_nbytes = read_status(field)
        self.peak_nbytes = self.start_nbytes
        self._field = field
        self._stop = threading.Event()
        threading.Thread(target=self._sample, name=f"ssdtrain-demo-{field}", daemon=True).start()

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.peak_nbytes = max(self.peak_nbytes, read_status(self._field))


class MemoryLimit:
    """A cap on the private memory this process may add to what it has now."""

    def __init__(self, nbytes: int) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (read_status("VmData") + nbytes, self._before[1]))

    def lift(self) -> None:
        """Takes the cap away, so that a process that ran into it can still say so."""
        resource.setrlimit(resource.RLIMIT_DATA, self._before)


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether an exception means that an allocation was refused.

    torch's CPU allocator raises a bare RuntimeError, so its words are all there is to go by.
    """
    words = (
        "can't allocate memory",
        "out of memory",
        "not enough memory",
        "bad_alloc",
        "cannot allocate memory",
    )
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def _reset_kernel_peak() -> bool:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return read_status("VmHWM") - read_status("VmRSS") < _RESET_SLACK_NBYTES
    return False
