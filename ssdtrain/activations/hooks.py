"""The hooks autograd calls: pack turns a saved tensor into a handle that autograd owns, unpack turns it back.

What is offloaded and when that may start is decided here; the store moves the bytes, and the schedule says what to
prefetch.

[Note: when a store may start]
An operator may save a tensor before its kernel has filled it, without bumping its version. A saved tensor is therefore
only copied once autograd's sequence number has moved on, which happens when the next operator makes its node: by then
the saving one is over. What the very last operator saved is needed first by backward, and simply stays.

[Note: version checks]
PyTorch does not check for in-place changes of saved tensors that went through hooks. Every handle remembers the version
at save time and shares the counter, so that unpack can raise what autograd would have raised.

[Note: graphs made in backward]
Backward of backward, and a forward in a hook of backward, make graphs that are walked later: what they save is
offloaded. What a reentrant checkpoint computes again is walked at once and stays. Its node says so: PyTorch's,
DeepSpeed's and Megatron's are all of a class with that word in its name.

[Note: compiled functions]
While a compiled function runs, Dynamo looks at every Python frame that begins in its thread, ours too when autograd
calls them from what runs uncompiled. There is nothing in them to compile: a hook that is being traced calls itself
`aside`, which breaks its own trace and no graph of the user's, and runs as always. PyTorch traces a hook once.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ssdtrain.activations.activation_store import ActivationStore
from ssdtrain.activations.budget import Budget
from ssdtrain.activations.reporting.observers import StepObservers
from ssdtrain.activations.saved.module_names import ModuleNames
from ssdtrain.activations.saved.storage_index import Index
from ssdtrain.activations.saved.subclasses import (
    Subclassed,
    Wrapped,
    hollow,
    inner_tensors,
    is_only_named,
    is_wrapper,
    parts_of,
    settle,
)
from ssdtrain.activations.writeback import Batch
from ssdtrain.devices.base import Device
from ssdtrain.devices.registry import Devices
from ssdtrain.policy import ActivationPolicy
from ssdtrain.scheduling.schedule import Schedule
from ssdtrain.stats import Counters, nbytes_text
from ssdtrain.store.identity import (
    SUBCLASS,
    byte_range,
    has_bytes,
    has_own_attributes,
    is_made_by,
    is_weight,
    rebuild,
    version_probe,
    view_spec,
    why_not,
    why_not_layout,
)
from ssdtrain.store.record import Handle, Resident, SavedRecord
from ssdtrain.store.saved_tensors import ItemByItem, is_computed_again, is_resized, modified, widen
from ssdtrain.tracing.pass_trace import PassTrace

_sequence_number = torch._C._autograd._get_sequence_nr
_graph_task = torch._C._current_graph_task_id
_is_traced = torch.compiler.is_compiling

_SMALL = "smaller than min_nbytes"
_MANY = 16  # tensors saved by one operator: no operator of PyTorch's own does
_MOST = 0.75  # of the bytes of a pass
_OUTLIVES = "outlives its graph"

Saved = Resident | Handle | Subclassed | Wrapped
"""What autograd holds for a saved tensor."""


class ForwardThread(threading.local):
    """What belongs to one forward thread."""

    def __init__(self) -> None:
        self.saved: list[SavedRecord] = []  # by an operator that may not be over
        self.sequence_number = -1
        self.pass_: PassTrace | None = None
        self.many: tuple[PassTrace, int, int] | None = None  # bytes and number of what one operator saved in it
        self.entered: list[contextlib.ExitStack] = []  # what undoes each `__enter__`, the latest last


class SavedTensorHooks:
    """Pack and unpack of one offload context."""

    def __init__(
        self,
        policy: ActivationPolicy,
        counters: Counters,
        index: Index,
        schedule: Schedule,
        devices: Devices,
        store: ActivationStore,
        observers: StepObservers,
        names: ModuleNames,
    ) -> None:
        """Installs nothing."""
        self.policy, self._is_auto = policy, policy.mode == "auto"
        self._counters, self._index, self._schedule = counters, index, schedule
        self._devices, self._store, self._observers, self._names = devices, store, observers, names
        self._thread = ForwardThread()
        self._left_alone: frozenset[str] = frozenset()
        self._item_by_item = ItemByItem()
        self._budget = Budget.of(policy.memory_budget, store, schedule)

    # -- pack ----------------------------------------------------------------------------------------------------

    def _pack(self, tensor: torch.Tensor, is_aside: bool = False) -> Saved:
        if _is_traced() and not is_aside:  # see [Note: compiled functions]
            from ssdtrain.store.not_compiled import aside

            return aside(self._pack, tensor, True)  # type: ignore[no-any-return]
        self._counters.num_saved += 1
        try:
            nbytes = tensor.nbytes
        except RuntimeError:  # sparse and other layouts have no bytes to count
            return self._stay(tensor, why_not(tensor) or "not strided", 0)
        if nbytes < self.policy.min_nbytes and tensor._base is None:
            return self._stay(tensor, _SMALL, nbytes)
        if type(tensor if tensor._base is None else tensor._base) is torch.nn.Parameter:  # most weights end here
            return self._stay_weight(tensor, nbytes)
        return self._pack_large(tensor, nbytes)

    def _stay(self, tensor: torch.Tensor, reason: str, nbytes: int) -> Resident:
        self._counters.skip(reason, nbytes)
        nbytes = 0 if reason == _OUTLIVES else nbytes  # in memory anyway
        (self._budget or self._counters).stay(nbytes)
        return Resident(tensor, nbytes, self._counters)

    def _stay_weight(self, tensor: torch.Tensor, nbytes: int) -> Resident:
        """A weight is in memory anyway: it costs nothing to save it."""
        self._counters.skip("weight", nbytes)
        if tensor.layout is torch.strided:
            self._index.mark_weight(tensor.untyped_storage())
        return Resident(tensor, 0, self._counters)

    def _pack_large(self, tensor: torch.Tensor, nbytes: int) -> Saved:
        reason = why_not(tensor)
        if reason == "weight":
            self._index.mark_weights([tensor])
            return self._stay_weight(tensor, nbytes)
        if reason == SUBCLASS:
            return self._pack_subclass(tensor, nbytes)
        if reason is not None or nbytes == 0:
            return self._stay(tensor, reason or "empty", nbytes)
        return self._pack_plain(tensor, nbytes)

    def _pack_subclass(self, tensor: torch.Tensor, nbytes: int) -> Saved:
        if is_wrapper(tensor):
            return self._pack_wrapper(tensor)
        if not is_only_named(tensor):
            return self._stay(tensor, SUBCLASS, nbytes)
        with torch._C.DisableTorchFunctionSubclass():
            reason = why_not_layout(tensor)
            if reason is not None or nbytes == 0:
                return self._stay(tensor, reason or "empty", nbytes)
            handle = self._pack_plain(tensor, nbytes)
        return Subclassed(handle, type(tensor)) if isinstance(handle, Handle) else handle

    def _pack_wrapper(self, tensor: torch.Tensor) -> Saved:
        """Sends what it is made of; without a part that may be offloaded it stays, the same object."""
        settle(tensor)
        parts, context = parts_of(tensor)
        nbytes = sum([part.nbytes for part in inner_tensors(tensor) if part.layout is torch.strided])
        if is_weight(tensor):
            return self._stay_weight(tensor, nbytes)
        probe = hollow(tensor) if nbytes >= self.policy.min_nbytes else None
        if probe is None:
            return self._stay(tensor, _SMALL if nbytes < self.policy.min_nbytes else SUBCLASS, nbytes)
        handles = {name: self._pack_part(part, tensor, probe) for name, part in parts.items()}
        if any([isinstance(handle, Handle | Wrapped) for handle in handles.values()]):
            return Wrapped(tensor, handles, context, probe)
        (self._budget or self._counters).stay(nbytes)
        return Resident(tensor, nbytes, self._counters)

    def _pack_part(self, part: Any, outer: torch.Tensor, probe: torch.Tensor) -> Any:
        """The handle of an inner tensor; anything else is itself."""
        if not isinstance(part, torch.Tensor):
            return part
        if is_wrapper(part):
            return self._pack_wrapper(part)
        reason = why_not(part)
        nbytes = part.nbytes if reason is None else 0
        if reason is not None or nbytes < max(1, self.policy.min_nbytes):
            return self._stay(part, reason or _SMALL, nbytes)
        return self._pack_plain(part, nbytes, outer, probe)

    def _pack_plain(
        self,
        tensor: torch.Tensor,
        nbytes: int,
        outer: torch.Tensor | None = None,
        probe: torch.Tensor | None = None,
    ) -> Resident | Handle:
        """What has a storage of its own. `outer` is what it is a part of, see [Note: whose version counts]."""
        outer = tensor if outer is None else outer
        storage = tensor.untyped_storage()
        if storage.nbytes() < self.policy.min_nbytes:
            return self._stay(tensor, _SMALL, storage.nbytes())
        if storage._cdata in self._index.weights or is_weight(tensor):
            return self._stay_weight(tensor, nbytes)
        device = self._devices.of(tensor)
        if isinstance(device, str):
            return self._stay(tensor, device, nbytes)
        if _graph_task() != -1 and is_computed_again():
            return self._stay(tensor, "saved during backward", nbytes)
        if self._left_alone and is_made_by(outer, self._left_alone):
            self._counters.skip("refilled by its owner", nbytes)  # autograd holds next to nothing
            return Resident(tensor, 0, self._counters)
        if self._store.source.store is None or device.driver is not None:
            reason = self._store.why_not(device)
            if reason is not None:
                return self._stay(tensor, reason, nbytes)
        span = byte_range(tensor, nbytes)
        if not has_bytes(storage, span[1]):
            return self._stay(tensor, "no memory of its own", 0)
        if not tensor.requires_grad and tensor.__dict__ and has_own_attributes(tensor):
            return self._stay(tensor, "carries attributes", nbytes)
        if device.driver is not None and span[1] - span[0] > nbytes and outer._base is None:
            # Rows of other tensors lie between its own, with version counters of their own (see `widen`): a device
            # would copy what another stream may be changing.
            return self._stay(tensor, "interleaved with other tensors", nbytes)
        probe = version_probe(tensor) if probe is None else probe
        return self._pack_offloaded(tensor, (outer, probe), storage, span, device)

    def _pack_offloaded(
        self,
        tensor: torch.Tensor,
        counted: tuple[torch.Tensor, torch.Tensor],
        storage: torch.UntypedStorage,
        span: tuple[int, int],
        device: Device,
    ) -> Resident | Handle:
        spec, (outer, probe), handle, reason = view_spec(tensor), counted, None, ""
        store, due, is_planned = self._store, self._take_due(), self._schedule.is_planned
        if device.driver is not None:
            store.prepare(due)
        with store.lock.mutex, store.lock:
            blocked = self._start(due, is_planned=is_planned) if due else None
            version = outer._version  # under the lock, as `shares_version_counter` asks
            record = self._index.find(storage._cdata, outer, *span)
            if record is not None:
                self._counters.deduplicated_nbytes += span[1] - span[0]
                if record.pass_ is self._thread.pass_:
                    record.pass_.saves.append(record.index)
                if device.driver is not None and device.current_stream() != record.stream:
                    device.share(storage, device.current_stream())  # the memory may go before this stream has used it
            else:
                if outer._base is not None or span[0]:
                    span = widen(span, storage.nbytes() if outer._base is not None else 0)
                if span[1] - span[0] < self.policy.min_nbytes:
                    reason = _SMALL
                elif self._is_auto and self._is_held(storage, span[1] - span[0]):
                    reason = _OUTLIVES
                else:
                    record = self._new_record(storage, span, device)
                    record.version, record.probe, record.spec = version, probe, spec
            if record is not None:
                record.num_handles += 1
                handle = Handle(record, tensor, spec, probe, version, store.releases, store.look_after)
            if is_planned:
                store.reloads.prefetch_all(self._schedule.due())
        if blocked:
            store.finish(blocked, is_planned=is_planned)
        if self._budget is not None and record is not None:
            self._budget.make_room(record)
        if store.is_release_urgent or store.releases.interruptions:
            store.work_off()
        return self._stay(tensor, reason, span[1] - span[0]) if handle is None else handle

    def _is_held(self, storage: torch.UntypedStorage, nbytes: int) -> bool:
        """Whether somebody keeps these bytes in memory longer than the graph."""
        index, pass_ = self._index, self._open_pass()
        if index.outlives_graphs(storage._cdata):
            return True
        return index.is_kept_by_others(pass_.next_spot(nbytes), storage)

    def _open_pass(self) -> PassTrace:
        pass_ = self._thread.pass_
        if pass_ is None or pass_.is_closed or pass_.step.is_abandoned:
            self._index.note_forward()
            pass_ = self._thread.pass_ = self._schedule.new_pass()
        return pass_

    def _new_record(self, storage: torch.UntypedStorage, span: tuple[int, int], device: Device) -> SavedRecord:
        thread = self._thread
        record = SavedRecord(storage, StorageWeakRef(storage), span, device, self._open_pass())
        record.where = self._names.where()
        self._store.adopt(record)
        self._schedule.note_saved(record)
        if device.driver is not None:
            record.prefers_host = self._schedule.goes_to_host(record, self.policy.host_nbytes)
        thread.saved.append(record)
        return record

    def _take_due(self, *, is_over: bool = False) -> list[SavedRecord]:
        """What earlier operators of this thread saved, or, if it is over, this one: [Note: when a store may start]."""
        thread, number = self._thread, _sequence_number()
        if number == thread.sequence_number and not is_over:
            return []
        thread.sequence_number = number
        if thread.pass_ is not None:
            thread.pass_.starts.append(len(thread.pass_.saves))
        if self._schedule.has_news:
            self._observers.review()
        due, thread.saved = thread.saved, []
        if len(due) >= _MANY:
            self._note_many(due)
        return due

    def _note_many(self, due: list[SavedRecord]) -> None:
        """One operator has saved `due`. If that was most of the last such pass, all of it comes back at once."""
        thread, pass_, nbytes = self._thread, due[0].pass_, sum([record.nbytes for record in due])
        last, thread.many = thread.many, (pass_, nbytes, len(due))
        if last is None:
            return
        if last[0] is pass_:
            thread.many = max(last, thread.many, key=lambda many: many[1])
        elif last[1] > _MOST * sum(last[0].sizes):
            self._store.note_fallback(
                f"one operator saves {last[2]} of the {len(last[0].sizes)} tensors that are offloaded, "
                f"{nbytes_text(last[1])}, and needs them all at once in backward: the peak of memory is not lower than "
                "that. If it is a compiled model, compile every block, or with integrations.compiler.compile_backend"
            )

    def _start(self, due: list[SavedRecord], *, is_planned: bool) -> list[Batch]:
        """Sends what the plan does not keep; what has to wait first."""
        due = [record for record in due if not is_resized(record)]
        if is_planned:
            kept = [record for record in due if self._schedule.keeps(record)]
            self._store.writeback.keep_as_planned(kept)
            due = [record for record in due if record not in kept]
        return self._store.start(due, is_planned=is_planned)

    # -- unpack --------------------------------------------------------------------------------------------------

    def _unpack(self, handle: Saved, is_aside: bool = False) -> torch.Tensor:
        if _is_traced() and not is_aside:
            from ssdtrain.store.not_compiled import aside

            return aside(self._unpack, handle, True)  # type: ignore[no-any-return]
        if type(handle) is Resident:
            if handle.tensor._version != handle.version:
                self._check_version(handle.tensor, handle.version, handle.tensor)
            return handle.tensor
        if type(handle) is Handle:
            if handle.probe._version != handle.version:
                self._check_version(handle.probe, handle.version, handle.spec)
            return rebuild(*self._bring(handle), handle.spec, handle.probe, handle.source)
        if type(handle) is Subclassed:
            with torch._C.DisableTorchFunctionSubclass():
                tensor = self._unpack(handle.handle)
                return tensor if type(tensor) is handle.kind else tensor.as_subclass(handle.kind)
        assert isinstance(handle, Wrapped)
        return self._unpack_wrapper(handle)

    def _unpack_wrapper(self, wrapped: Wrapped) -> torch.Tensor:
        if wrapped.probe._version != wrapped.version:
            self._check_version(wrapped.probe, wrapped.version, wrapped.probe)
        tensor = wrapped.living()
        if tensor is None:
            with torch.no_grad():
                tensor = wrapped.made_of({name: self._unpack_part(part) for name, part in wrapped.parts.items()})
        return tensor

    def _unpack_part(self, part: Any) -> Any:
        if isinstance(part, Handle):
            return rebuild(*self._bring(part), part.spec, None, part.source)
        return self._unpack(part) if isinstance(part, Resident | Wrapped) else part

    def _check_version(self, probe: torch.Tensor, version: int, what: object) -> None:
        """Under the lock no other thread is just asking whose counter this is, see `shares_version_counter`."""
        with self._store.lock.mutex:
            current = probe._version
        if current != version:
            raise modified(what, current, version)

    def _bring(self, handle: Handle) -> tuple[torch.UntypedStorage, int]:
        """The bytes of a record, and how many of the source's bytes come before."""
        record, store, schedule = handle.record, self._store, self._schedule
        pass_ = record.pass_
        if self._budget is not None:
            self._budget.make_room_for(record)
        # An accelerator waits in its streams, from here to where the bytes are handed over.
        event = pass_.step.mark() if record.device.driver is not None and record.storage is None else None
        with store.lock.mutex, store.lock:
            is_first, record.is_unpacked = not record.is_unpacked, True
            store.settle()
            handed_out, is_miss = store.reloads.request(record, handle.epoch)
            schedule.note_unpacked(record, is_first=is_first, is_miss=is_miss, event=event)
            if event is not None and handed_out is not None and record.queued_reads:
                pass_.step.note_wait(event, is_for_reload=True)
            store.reloads.prefetch_all(schedule.upcoming(pass_))
        if handed_out is None:
            handed_out = store.wait(record, handle.epoch)
            if event is not None:
                pass_.step.note_wait(event, is_for_reload=True)
        if store.is_release_urgent or store.releases.interruptions:
            store.work_off()
        storage, shift, handle.epoch = handed_out
        task = _graph_task()
        if task != -1 and (task == handle.task or self._item_by_item.kinds):
            self._item_by_item.hold(storage, is_again=task == handle.task)
        handle.task = record.task = task
        return storage, shift
