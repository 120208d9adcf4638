"""The open engine of an offload, and where each comes from: another's drive, files that were kept, or new ones.

Knows directories and which of them are not used any more; neither when a context is active nor what moves.

[Note: opening]
A drive may be stuck when files are opened on it, or never answer. Whoever opens waits for `io_timeout_seconds` at most,
without the lock that guards the records; `_opening` has others who would open wait for the same. Files are opened once:
between two engines they are kept, and empty.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from ssdtrain.devices.c_heap import CHeap
from ssdtrain.devices.registry import Devices
from ssdtrain.io.drive import Drive
from ssdtrain.io.engine import SpillFile
from ssdtrain.io.files.paths import printable
from ssdtrain.io.host_space import host_limit_nbytes
from ssdtrain.io.kept_files import KeptFiles
from ssdtrain.io.open_engine import close_files, slab_nbytes_for
from ssdtrain.planner import Buffers
from ssdtrain.policy import ActivationPolicy
from ssdtrain.stats import Counters
from ssdtrain.store.poisonable_lock import PoisonableLock
from ssdtrain.store.record import SavedRecord
from ssdtrain.store.tensor_store import TensorStore, open_for
from ssdtrain.tracing.request_log import RequestLog

logger = logging.getLogger("ssdtrain")

Attach = Callable[[Callable[[str], None], int | None, int | None, Iterable[str]], Drive]
"""`Drive.attach` of another's drive."""


class DriveSource:
    """Opens the drives of one offload, one after the other. Files are opened once: between engines they are kept."""

    def __init__(
        self,
        directories: Sequence[str],
        policy: ActivationPolicy,
        counters: Counters,
        attach: Attach | None = None,
        request_log: RequestLog | None = None,
        buffers: Buffers | None = None,
    ) -> None:
        """Opens nothing yet. `attach`: takes a share of another's drive instead. `request_log`: of every request."""
        self.store: TensorStore | None = None
        """What moves records while an engine is open."""
        self.slab_nbytes = slab_nbytes_for(policy.staging_nbytes)
        self.has_directories = bool(directories)
        self.is_shared = attach is not None
        self.request_log = request_log
        self.policy, self.counters = policy, counters
        self.heap = CHeap(policy.trim_memory)
        """What tensors in host memory free goes to it."""
        self.buffers = buffers or Buffers(policy)
        """How large staging, prefetching and idle memory may be by now."""
        self.note_fallback = partial(_note_fallback, counters)  # knows nothing else: nothing here keeps itself alive
        """Warns once and remembers why something did not go the best way."""
        self._staging_nbytes = 0  # that the open engine may use
        self._directories, self._attach = directories, attach
        self._opening = threading.Lock()
        self._retired: set[str] = set()  # directories that are not used any more
        self._kept = KeptFiles(policy.io_timeout_seconds)

    # -- opening -------------------------------------------------------------------------------------------------

    def ensure_open(self, lock: PoisonableLock) -> None:
        """Opens an engine, unless one is open or no directory is left. `lock` guards the records, and is free.

        Raises:
            OSError: no directory can be used.
            RuntimeError: the engine asked for by name is not available.
        """
        with self._opening:
            drive = self._open() if self.store is None else None
            if drive is None:
                return
            try:
                with lock.mutex, lock:
                    if self.store is None:
                        self._take_over(drive)
            finally:
                if self.store is None or self.store.drive is not drive:  # Ctrl-C, or opened meanwhile: nobody knows it
                    drive.discard()

    def open_now(self) -> None:
        """The same under the lock: nobody else may go on before."""
        drive = self._open()
        if drive is not None:
            self._take_over(drive)

    def _take_over(self, drive: Drive) -> None:
        self.store = TensorStore(drive, self.policy, self.note_fallback, self.request_log)
        self.allow_in_flight()
        self.slab_nbytes = drive.engine.slab_nbytes
        if self.counters.engine != drive.kind:
            self.counters.engine, self.counters.engine_reason = drive.kind, drive.reason

    def allow_in_flight(self) -> None:
        """So many bytes may be on their way out as the counters say."""
        if self.store is not None:
            self.store.pending.allow(self.counters.staging_limit_nbytes)

    @property
    def is_staging_short(self) -> bool:
        """Whether `grow_staging` is to be called."""
        return self.buffers.staging_nbytes > self._staging_nbytes and self.store is not None

    def grow_staging(self, drive: Drive) -> None:
        """More staging may be used. For accelerators it is pinned, which takes long: without the lock."""
        self._staging_nbytes = self.buffers.staging_nbytes
        drive.grow_staging(self._staging_nbytes)

    @property
    def has_idle_staging(self) -> bool:
        """Whether half of the staging, or more, is not needed any more: another engine would take less memory."""
        return self.buffers.staging_nbytes * 2 <= self._staging_nbytes and not self.is_shared

    def _open(self) -> Drive | None:
        p, self._staging_nbytes = self.policy, self.buffers.staging_nbytes
        self.settle()
        kept = {file.directory: file for file in self._kept.take()}
        directories = [directory for directory in self._directories if directory not in self._retired]
        if self._directories and not directories:
            return None
        if self._attach is not None:
            return self._attach(self.note_fallback, p.disk_nbytes, p.host_nbytes, self._retired)
        try:
            locations = [kept.get(directory, directory) for directory in directories]
            return self._open_on(self._kept.kind if kept else p.engine, locations)
        except RuntimeError:  # that engine cannot be had any more
            close_files(list(kept.values()), 0.0)
            if not kept or p.engine != "auto":
                raise
        return self._open_on(p.engine, directories)

    def _open_on(self, kind: str, locations: Sequence[str | SpillFile]) -> Drive:
        return open_for(
            self.policy,
            kind,
            locations,
            self.slab_nbytes,
            note_fallback=self.note_fallback,
            leave_out=self._retired.add,
            host_nbytes=host_limit_nbytes(self.policy.host_nbytes, has_directories=self.has_directories),
            device_index=Devices.gpu_index(),
            keeps_files=True,
            first_staging_nbytes=self._staging_nbytes,
        )

    def stall(self, tier: str, seconds: float, record: SavedRecord) -> None:
        """Training has waited for a drive."""
        self.counters.stall(tier, seconds)
        if self.request_log is not None:
            self.request_log.note_stall(tier, time.monotonic() - seconds, seconds, record)

    # -- closing -------------------------------------------------------------------------------------------------

    def add_totals(self, counters: Counters) -> None:
        """Adds what the open engine has done so far."""
        store = self.store
        if store is not None:
            counters.add_engine(store.drive.totals(), store.space.peak_nbytes)
            counters.cancelled_write_nbytes += store.cancelled_nbytes
            counters.host_limit_nbytes = store.drive.host_nbytes
            counters.peak_host_nbytes = max(counters.peak_host_nbytes, store.drive.peak_host_nbytes)

    def give_back(self) -> None:
        """The open engine has ended: keeps its files, but for those in directories that are not used any more."""
        store = self.store
        if store is None:
            return
        self.add_totals(self.counters)
        self.store, drive = None, store.drive
        self._retired.update(store.space.retired)
        if self.is_shared or not drive.is_closed:
            return
        self._kept.keep(drive.kind, [file for file in drive.files if file.directory not in self._retired])
        close_files([file for file in drive.files if file.directory in self._retired], 0.0)

    def settle(self) -> None:
        """Waits until the room of files that are kept is given back."""
        for directory, why in self._kept.settle():
            self._retired.add(directory)
            self.note_fallback(f"{directory}: not used any more: {why}")

    def close(self) -> None:
        """Closes the files that are kept."""
        self._kept.close()

    def leave_to_parent(self) -> None:
        """This is a forked child: engine and files are the parent's, and so is the log."""
        self._opening = threading.Lock()
        self._kept = KeptFiles(self.policy.io_timeout_seconds)
        self.store = self.request_log = None


def _note_fallback(counters: Counters, text: str) -> None:
    text = printable(text)
    if counters.fall_back(text):
        logger.warning("%s", text)
