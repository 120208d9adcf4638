"""Saved activations: the hooks autograd calls, and the context manager that installs them.

The pack hook turns a saved tensor into a handle that autograd owns; the unpack hook turns it back. This file decides
what travels and when a trip may start; the store moves the bytes and the schedule says what to prefetch.

[Note: when a store may start]
An operator may save a tensor before its kernel has filled it, without bumping its version. A saved tensor is therefore
only copied once autograd's sequence number has moved on, which happens when the next operator makes its node: by then
the saving one is over. What the very last operator saved is needed first by backward, and simply stays.

[Note: version checks]
PyTorch does not check for in-place changes of saved tensors that went through hooks. Every handle remembers the version
at save time and shares the counter, so that unpack can raise what autograd would have raised.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ssdtrain.activations.drive_source import Attach
from ssdtrain.activations.module_names import ModuleNames
from ssdtrain.activations.observers import StepObservers
from ssdtrain.activations.recompute import recompute_for
from ssdtrain.activations.storage_index import Index
from ssdtrain.activations.witness import Witness
from ssdtrain.activations.writeback import Store
from ssdtrain.devices.base import Device
from ssdtrain.devices.cpu import CpuDevice
from ssdtrain.devices.registry import Devices
from ssdtrain.io.files.directories import check_directories
from ssdtrain.planner import Plan
from ssdtrain.policy import ActivationPolicy
from ssdtrain.scheduling.replanner import replanner_for
from ssdtrain.scheduling.schedule import Schedule
from ssdtrain.stats import Counters, Stats
from ssdtrain.store.identity import (
    byte_range,
    has_bytes,
    is_made_by,
    is_parameter,
    is_weight,
    rebuild,
    version_probe,
    view_spec,
    why_not,
)
from ssdtrain.store.record import Handle, Resident, SavedRecord
from ssdtrain.store.saved_tensors import (
    HookScope,
    innermost_hooks,
    is_resized,
    modified,
    not_entered,
    widen,
)
from ssdtrain.tracing.finished_step import Callback
from ssdtrain.tracing.pass_trace import PassTrace

_sequence_number = torch._C._autograd._get_sequence_nr
_graph_task = torch._C._current_graph_task_id

_SMALL = "smaller than min_nbytes"


class _Thread(threading.local):
    """What belongs to one forward thread."""

    def __init__(self) -> None:
        self.pending: list[SavedRecord] = []  # saved by an operator that may not be over
        self.sequence_number = -1
        self.pass_: PassTrace | None = None
        self.entered: list[contextlib.ExitStack] = []  # what undoes each `__enter__`, the latest last


class ActivationOffload:
    """A context manager inside which saved activations travel. Made by `offload_activations`, which documents it."""

    def __init__(
        self,
        directories: Sequence[str] | None,
        policy: ActivationPolicy,
        model: torch.nn.Module | None = None,
        cpu: Device | None = None,
        attach: Attach | None = None,
        known_devices: dict[torch.device, Device | str] | None = None,
    ) -> None:
        """Checks the directories and opens the engine, so that what is wrong shows before training starts.

        `directories`: None for a host tier only. `cpu`: the device of tensors in host memory, for simulations.
        `attach`: takes a share of another offload's drive, which is in these directories, instead of opening one.
        `known_devices`: the accelerators that other one knows.
        """
        self.policy = policy
        self._counters = Counters()
        self._index = Index()
        self._recompute = recompute_for(policy, model, self._counters, self._check_version)
        blocks = self._recompute.names if self._recompute is not None else None
        replanner = replanner_for(policy, directories or (), blocks)
        if self._recompute is not None and replanner is not None and policy.recompute == "auto":
            self._recompute.chosen = lambda: replanner.recomputed
        self._schedule = Schedule(self._counters, replanner)
        self._names = ModuleNames(model)
        self._model = model
        self._thread = _Thread()
        self._threads: list[threading.Thread] = []  # in which it is entered, as often as it is
        self._left_alone: frozenset[str] = frozenset()
        self._is_closed = False
        if directories is None and policy.host_nbytes == 0:
            raise ValueError("Expected a directory or a host tier, got directory=None and host_nbytes=0; pass either")
        cpu = cpu or CpuDevice(policy.idle_nbytes)
        self._devices = Devices(cpu, has_host_tier_only=directories is None, known=known_devices)
        self._store = Store(directories or (), policy, self._counters, self._index, self._devices, attach)
        self._store.on_reset = self._schedule.reset
        self._store.on_fork = self._schedule.forget_accelerators
        self._observers = StepObservers(policy, directories or (), self._schedule, self._store)
        if policy.enabled:
            for text in check_directories(directories, policy.io_timeout_seconds) if directories is not None else ():
                self._store.note_fallback(text)
            self._store.open()
        self._witness = Witness(self, policy, self._counters, self._threads)

    # -- context -------------------------------------------------------------------------------------------------

    def __enter__(self) -> ActivationOffload:
        """Installs the hooks for this thread.

        Raises:
            RuntimeError: the context was closed.
        """
        self._check_open()
        self._witness.enter()
        if not self.policy.enabled:
            return self
        with contextlib.ExitStack() as stack:  # an error, Ctrl-C too, undoes what was done: no `__exit__` follows
            stack.callback(self._witness.leave)
            self._store.enter()
            stack.callback(self._store.leave)
            stack.callback(self._observers.leave)
            if self._model is not None:
                self.mark_weights([*self._model.parameters(), *self._model.buffers()])
            stack.enter_context(HookScope(self._pack, self._unpack, self.note))
            stack.callback(self._names.unwatch)
            self._names.install()
            if self._recompute is not None:
                stack.callback(self._recompute.leave)
                self._recompute.enter()
            self._threads.append(threading.current_thread())
            self._thread.entered.append(stack.pop_all())
        return self

    def __exit__(self, *_: object) -> None:
        """Takes the hooks away; what was saved stays available for backward.

        Raises:
            RuntimeError: this thread did not enter, and nothing was changed; or somebody has taken the hooks off.
        """
        if not self.policy.enabled:
            return
        if not self._thread.entered:
            raise not_entered("offload contexts", self._threads)
        self._threads.remove(threading.current_thread())
        self._thread.entered.pop().close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("Expected an open offload, got one after close(); make a new one")

    @property
    def is_innermost(self) -> bool:
        """Whether it is this context that takes what autograd saves in this thread now, rather than a later one."""
        hooks = innermost_hooks()
        return hooks is not None and hooks[0] == self._pack

    @property
    def is_busy(self) -> bool:
        """Whether a thread, perhaps this one, is in the middle of something; a destructor must not wait for it."""
        return self._store.lock.mutex.locked()

    def keep_open(self) -> None:
        """Keeps engine, slabs and spill files until `close()`, also while the context is left and no graph is alive.

        For those who enter and leave it many times a second: opening them takes milliseconds.

        Raises:
            RuntimeError: the context was closed.
        """
        self._check_open()
        if self.policy.enabled:
            self._store.enter()

    def mark_weights(self, tensors: Iterable[torch.Tensor]) -> None:
        """Says that these are weights: whatever shares a storage with one of them, as it is now, stays in memory."""
        with self._store.lock.mutex, self._store.lock:
            self._index.mark_weights(tensors)

    def leave_alone(self, nodes: Iterable[str]) -> None:
        """Leaves what autograd nodes of these names made in memory: its maker frees its storage and refills it."""
        self._left_alone |= frozenset(nodes)

    def note(self, text: str) -> None:
        """Adds a remark to `stats.fallbacks`, and warns with it once."""
        self._store.note_fallback(text)

    def close(self) -> None:
        """Frees slabs, threads and spill files at once. A later backward through records on disk raises an error."""
        self._is_closed = True
        self._witness.end()
        self._observers.close()
        self._store.close()

    @property
    def plan(self) -> Plan | None:
        """What the running step does with every record, for how much memory and time; `print` explains it.

        None before the second step, in mode ``"all"``, and for steps on several devices (`stats.fallbacks` says so).
        """
        return self._schedule.plan

    def hint_backward(self, micro_batch: int) -> None:
        """Says that backward of a micro-batch comes next, so that its last tensors are reloaded in time.

        Never needed: the order is learned. For pipeline schedules that know it before it happens the first time.

        Args:
            micro_batch: number of the forward pass, counted from 0 among those whose tensors are alive together.
        """
        self._prefetch(self._schedule.hinted(micro_batch))

    def on_step(self, callback: Callback) -> None:
        """Calls `callback(number, stats)` after every step, counted from 1: for loggers, see `ssdtrain.loggers`.

        A step is over when the next one begins. A callback that raises is noted and not called again. Not after close.
        """
        self._check_open()
        self._observers.call(callback)

    @property
    def stats(self) -> Stats:
        """What it did and what it cost so far."""
        return Stats.of(self._store.engine_totals())

    # -- pack ----------------------------------------------------------------------------------------------------

    def _pack(self, tensor: torch.Tensor) -> Resident | Handle:
        self._counters.num_saved += 1
        try:
            nbytes = tensor.nbytes
        except RuntimeError:  # sparse and other layouts have no bytes to count
            return self._stay(tensor, why_not(tensor) or "not strided", 0)
        if nbytes < self.policy.min_nbytes and tensor._base is None:
            return self._stay(tensor, _SMALL, nbytes)
        if is_parameter(tensor):
            return self._stay_weight(tensor, nbytes)
        return self._pack_large(tensor, nbytes)

    def _stay(self, tensor: torch.Tensor, reason: str, nbytes: int) -> Resident:
        counters = self._counters
        counters.skip(reason, nbytes)
        counters.hold(nbytes)
        counters.resident_nbytes += nbytes
        return Resident(tensor, nbytes, counters)

    def _stay_weight(self, tensor: torch.Tensor, nbytes: int) -> Resident:
        """A weight is in memory anyway: it costs nothing to save it."""
        self._counters.skip("weight", nbytes)
        if tensor.layout is torch.strided:
            self._index.mark_weight(tensor.untyped_storage())
        return Resident(tensor, 0, self._counters)

    def _pack_large(self, tensor: torch.Tensor, nbytes: int) -> Resident | Handle:
        reason = why_not(tensor)
        if reason == "weight":
            return self._stay_weight(tensor, nbytes)
        if reason is not None or nbytes == 0:
            return self._stay(tensor, reason or "empty", nbytes)
        storage = tensor.untyped_storage()
        if storage.nbytes() < self.policy.min_nbytes:
            return self._stay(tensor, _SMALL, storage.nbytes())
        if self._index.is_weight(storage._cdata) or is_weight(tensor):
            return self._stay_weight(tensor, nbytes)
        device = self._devices.of(tensor)
        if isinstance(device, str):
            return self._stay(tensor, device, nbytes)
        if _graph_task() != -1:
            return self._stay(tensor, "saved during backward", nbytes)
        if self._left_alone and is_made_by(tensor, self._left_alone):
            self._counters.skip("refilled by its owner", nbytes)  # autograd holds next to nothing
            return Resident(tensor, 0, self._counters)
        reason = self._store.why_not(device)
        if reason is not None:
            return self._stay(tensor, reason, nbytes)
        self._start_due()
        span = byte_range(tensor, nbytes)
        if not has_bytes(storage, span[1]):
            return self._stay(tensor, "no memory of its own", 0)
        if not tensor.requires_grad and tensor.__dict__:  # what backward may ask for, of this very object
            return self._stay(tensor, "carries attributes", nbytes)
        if device.driver is not None and span[1] - span[0] > nbytes and tensor._base is None:
            # Rows of other tensors lie between its own, with version counters of their own (see `widen`): a device
            # would copy what another stream may be changing.
            return self._stay(tensor, "interleaved with other tensors", nbytes)
        return self._pack_travelling(tensor, storage, span, device)

    def _pack_travelling(
        self, tensor: torch.Tensor, storage: torch.UntypedStorage, span: tuple[int, int], device: Device
    ) -> Resident | Handle:
        spec, probe = view_spec(tensor), version_probe(tensor)
        with self._store.lock.mutex, self._store.lock:
            version = tensor._version  # under the lock, as `shares_version_counter` asks
            record = self._index.find(storage._cdata, tensor, *span)
            if record is not None:
                self._counters.deduplicated_nbytes += span[1] - span[0]
                if device.driver is not None and device.current_stream() != record.stream:
                    device.share(storage, device.current_stream())  # the memory may go before this stream has used it
            else:
                span = widen(span, storage.nbytes() if tensor._base is not None else 0)
                reason = self._why_keep(storage, span)
                if reason is None:
                    record = self._new_record(storage, span, device)
                    record.version, record.probe = version, probe
                    record.spec, record.where = spec, self._names.where()
                    self._adopt(record)
            handle = None
            if record is not None:
                record.num_handles += 1
                handle = Handle(record, tensor, spec, probe, version, self._store.release_later)
        self._store.process_releases()
        self._prefetch(self._schedule.due())
        if handle is None:
            assert reason is not None
            return self._stay(tensor, reason, span[1] - span[0])
        return handle

    def _why_keep(self, storage: torch.UntypedStorage, span: tuple[int, int]) -> str | None:
        if span[1] - span[0] < self.policy.min_nbytes:
            return _SMALL
        if self.policy.mode == "auto" and self._index.outlives_graphs(storage._cdata):
            return "outlives its graph"
        return None

    def _new_record(self, storage: torch.UntypedStorage, span: tuple[int, int], device: Device) -> SavedRecord:
        thread = self._thread
        if thread.pass_ is None or not thread.pass_.is_open:
            thread.pass_ = self._schedule.new_pass()
        return SavedRecord(storage, StorageWeakRef(storage), span, device, thread.pass_)

    def _adopt(self, record: SavedRecord) -> None:
        self._store.adopt(record)
        self._schedule.note_saved(record)
        if record.device.driver is not None:
            record.prefers_host = self._schedule.goes_to_host(record, self.policy.host_nbytes)
        self._thread.pending.append(record)

    def _start_due(self) -> None:
        """Starts what earlier operators of this thread saved: see [Note: when a store may start]."""
        thread = self._thread
        number = _sequence_number()
        if number != thread.sequence_number:
            thread.sequence_number = number
            if self._schedule.has_news:
                self._observers.review()
            if thread.pending:
                due, thread.pending = thread.pending, []
                self._send([record for record in due if not is_resized(record)])

    def _send(self, due: list[SavedRecord]) -> None:
        """Sends what the plan does not keep."""
        kept = [record for record in due if self._schedule.keeps(record)]
        if kept:
            self._store.keep(kept, "planned to stay")
        leaving = [record for record in due if record not in kept] if kept else due
        self._store.offload(leaving, is_planned=self._schedule.is_planned)

    def _prefetch(self, upcoming: Iterator[SavedRecord]) -> None:
        for record in upcoming:
            if not self._store.prefetch(record):
                break

    # -- unpack --------------------------------------------------------------------------------------------------

    def _unpack(self, handle: Resident | Handle) -> torch.Tensor:
        if type(handle) is Resident:
            if handle.tensor._version != handle.version:
                self._check_version(handle.tensor, handle.version, handle.tensor)
            return handle.tensor
        assert isinstance(handle, Handle)
        if handle.probe._version != handle.version:
            self._check_version(handle.probe, handle.version, handle.spec)
        return self._unpack_record(handle)

    def _check_version(self, probe: torch.Tensor, version: int, what: object) -> None:
        """Under the lock no other thread is just asking whose counter this is, see `shares_version_counter`."""
        with self._store.lock.mutex:
            current = probe._version
        if current != version:
            raise modified(what, current, version)

    def _unpack_record(self, handle: Handle) -> torch.Tensor:
        record, store = handle.record, self._store
        is_first, record.is_unpacked = not record.is_unpacked, True
        # An accelerator waits in its streams, from here to where the bytes are handed over.
        event = record.pass_.step.mark() if record.device.driver is not None and record.storage is None else None
        handed_out, is_miss = store.request(record, handle.epoch)
        self._schedule.note_unpacked(record, is_first=is_first, is_miss=is_miss, event=event)
        if event is not None and handed_out is not None and record.queued_reads:
            record.pass_.step.note_wait(event, is_for_reload=True)
        self._prefetch(self._schedule.upcoming(record.pass_))
        if handed_out is None:
            handed_out = store.wait(record, handle.epoch)
            if event is not None:
                record.pass_.step.note_wait(event, is_for_reload=True)
        storage, shift, handle.epoch = handed_out
        store.process_releases()
        return rebuild(storage, handle.spec, shift, handle.probe, handle.source)
