"""Writes the record of a run, in a thread of its own: the training thread only hands finished steps over.

It holds no tensor and no storage. What goes wrong with the file never reaches training: it is said once, and the record
ends there.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ssdtrain.io.files.paths import printable
from ssdtrain.planner import Where
from ssdtrain.run_log import encode
from ssdtrain.run_log.format import first_line, pack
from ssdtrain.run_log.path import close_record, open_record
from ssdtrain.run_log.thinning import Rows, States, Timelines
from ssdtrain.stats import Stats
from ssdtrain.tracing.request_log import RequestLog, Requests

if TYPE_CHECKING:
    from ssdtrain.policy import ActivationPolicy
    from ssdtrain.tracing.finished_step import FinishedStep

_MAX_WAITING = 64  # steps handed over and not written: a drive that does not answer must not fill memory
_CLOSE_SECONDS = 5.0
_MAX_MODULES = 10_000

_Finished = tuple[int, "FinishedStep", Requests]


class Recorder:
    """The record of one run."""

    def __init__(self, path: str, policy: ActivationPolicy, directories: Sequence[str]) -> None:
        """Makes the file.

        Raises:
            OSError: it cannot be made, or exists and is no record.
        """
        # Here, because it needs PyTorch, which reading a record does not.
        from ssdtrain.run_log.environment import describe_environment

        self.request_log = RequestLog()
        self._pid = os.getpid()
        head = {
            "kind": "run",
            "policy": policy.model_dump(mode="json", exclude={"record"})
            | {"record": printable(policy.record or "") or None},
            "environment": describe_environment(directories),
            "counters": encode.COUNTERS,
        }
        self._sink = _Sink(path, policy.record_nbytes)
        self._sink.append(head)
        self._queue: queue.Queue[_Finished | None] = queue.Queue(_MAX_WAITING)
        self._thread: threading.Thread | None = None
        self._last: _Finished | None = None
        self._num_lost = 0
        self._said: set[str] = set()

    def note_step(self, number: int, finished: FinishedStep) -> str:
        """Hands a step over. Returns what went wrong since the last one."""
        if os.getpid() != self._pid:
            return ""
        requests, self._last = self.request_log.of(finished.trace), None
        self.request_log.clear()
        if self._sink.error:
            return self._say(self._sink.error)
        try:
            self._queue.put_nowait((number, finished, requests))
        except queue.Full:
            self._num_lost += 1
            return self._say("the run record cannot keep up: steps are missing from it")
        if self._thread is None:
            self._thread = threading.Thread(
                target=_write_all, args=(self._queue, self._sink), name="ssdtrain-record", daemon=True
            )
            self._thread.start()
        return ""

    def offer_last(self, number: int, finished: FinishedStep) -> None:
        """A step that is the last one unless another follows."""
        if os.getpid() == self._pid:
            self._last = number, finished, self.request_log.of(finished.trace)

    def close(self) -> None:
        """Writes what was handed over, and the last step."""
        if os.getpid() != self._pid or self._sink.is_closed:
            return
        if self._last is not None:
            self.note_step(*self._last[:2])
        if self._thread is not None:
            try:
                self._queue.put(None, timeout=_CLOSE_SECONDS)
            except queue.Full:  # the drive does not answer
                return
            if threading.current_thread() is not self._thread:  # which may collect garbage, and us with it
                self._thread.join(_CLOSE_SECONDS)
        else:
            self._sink.close()

    def _say(self, text: str) -> str:
        is_new = bool(text) and text not in self._said
        self._said.add(text)
        return text if is_new else ""


def _write_all(steps: queue.Queue[_Finished | None], sink: _Sink) -> None:
    """The writing thread."""
    try:
        writing = _Writing(sink)
        while (item := steps.get()) is not None:
            writing.add(*item)
            item = None  # keeps nothing while it waits
        writing.finish()
    except Exception as error:  # whatever it is, training goes on, and is told
        sink.error = sink.error or f"the run record ends here: {type(error).__name__}: {error}"
    sink.close()


class _Sink:
    """The file. After an error it takes nothing more."""

    def __init__(self, path: str, limit_nbytes: int) -> None:
        self.error = ""
        self.is_closed = False
        self.limit_nbytes = limit_nbytes
        self.left_nbytes = limit_nbytes
        self._path = path
        self._fd = open_record(path)
        self.append_bytes(first_line())

    def append(self, block: dict[str, Any]) -> int:
        """Appends a block; its size."""
        return self.append_bytes(pack(block))

    def append_bytes(self, data: bytes) -> int:
        """Appends bytes in one write, if they fit; how many."""
        if self.error or self.is_closed or len(data) > self.left_nbytes:
            return 0
        try:
            written = os.write(self._fd, data)
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError as error:
            self.error = f"the run record ends here, {self._path} cannot be written: {error.strerror}"
            return 0
        self.left_nbytes -= len(data)
        return len(data)

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            close_record(self._fd)


class _Writing:
    """Turns steps into blocks, within the limit: see [Note: how a record stays within its limit]."""

    def __init__(self, sink: _Sink) -> None:
        self._sink = sink
        limit = sink.left_nbytes
        self._rows = Rows(limit // 2)
        self._timelines, self._states = Timelines(limit // 4), States(limit // 4)
        self._modules: dict[str, list[float]] = {}
        self._latest: tuple[int, FinishedStep] | None = None

    def add(self, number: int, finished: FinishedStep, requests: Requests) -> None:
        self._latest = number, finished
        self._add_modules(finished, requests)
        self._write_row(self._rows.add(encode.row(number, finished)))
        why = self._timelines.why(number, finished.seconds, finished.stall_seconds)
        if why:
            block = pack(encode.detail(number, finished, requests, why))
            if self._timelines.has_room(len(block)):
                self._sink.append_bytes(block)
        if self._states.is_due(number, len(finished.totals.fallbacks)):
            self._write_state(is_last=False)

    def finish(self) -> None:
        self._write_row(self._rows.flush(), is_last=True)
        self._write_state(is_last=True)
        self._sink.append({"kind": "end"})

    def _write_row(self, row: dict[str, Any] | None, *, is_last: bool = False) -> None:
        block = pack(row) if row is not None else b""
        if row is not None and self._rows.has_room(len(block), is_last=is_last):
            self._sink.append_bytes(block)
        elif row is not None:
            self._rows.keep({name: value for name, value in row.items() if name != "kind"})

    def _write_state(self, *, is_last: bool) -> None:
        if self._latest is None:
            return
        number, finished = self._latest
        stats = Stats.of(finished.totals).as_dict()
        block = pack({"kind": "state", "step": number, "stats": stats, "modules": self._modules})
        if self._states.has_room(len(block), is_last=is_last):
            self._sink.append_bytes(block)

    def _add_modules(self, finished: FinishedStep, requests: Requests) -> None:
        """By module: records, bytes kept, bytes to the host tier, bytes to the drive, seconds waited."""
        records, own = finished.step.records, self._modules
        for record, where in zip(records, encode.placements(finished, requests), strict=True):
            if len(own) < _MAX_MODULES or record.module in own:
                sums = own.setdefault(record.module, [0, 0, 0, 0, 0.0])
                sums[0] += 1
                sums[{Where.KEEP: 1, Where.HOST: 2, Where.DISK: 3}[where]] += record.nbytes
        for _, place, _, seconds in requests.stalls:
            if 0 <= place < len(records) and records[place].module in own:
                sums = own[records[place].module]
                sums[4] = round(sums[4] + seconds, 6)
