"""Where the bytes of each offloaded parameter are, and how they are offloaded and reloaded.

Knows parameters and the store, neither modules nor the order in which they are needed.

[Note: what a parameter is while it is away]
A parameter that is reloaded gets the memory it was read to; one that is evicted drops its memory, which lives on for as
long as anything else uses it: an operator that has just unpacked it, a write. In between it has a placeholder, see
[Note: how a parameter is reached]. Autograd sees nothing of this: setting `.data` does not touch version counters.

[Note: changed or not]
What has not changed since it was reloaded is evicted without a write. Changed is what has another version than at its
last write, or what somebody says has changed: `.data` bypasses version counters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ssdtrain.devices.base import Device
from ssdtrain.parameters.placeholder import (
    OWNER,
    OffloadedParameter,
    Owner,
    is_intact,
    is_placeholder,
    placeholder_of,
    plainly,
)
from ssdtrain.state_stats import StateCounters
from ssdtrain.store.file_backed import Copies
from ssdtrain.store.identity import ViewSpec, spec_nbytes, view_of, view_spec, whole
from ssdtrain.store.pending import PendingRead
from ssdtrain.store.record import Record
from ssdtrain.store.state_store import StateStore

_PAGE = 4096
_OWN_USES = 2  # of a storage: ours and the parameter's


class ParameterRecord:
    """One offloaded parameter: in memory with a `storage`, coming with a read `pending`, or away."""

    def __init__(self, name: str, parameter: torch.nn.Parameter, device: Device, owner: Owner) -> None:
        """It is in memory and has never been written; `guard` has those who use it ask `owner`.

        A parameter on the meta device becomes one on the CPU, away, without a value yet.
        """
        self.name, self.parameter, self.device = name, parameter, device
        data = parameter.data if parameter.is_meta else whole(parameter.data)
        self.spec: ViewSpec = view_spec(data)._replace(storage_offset=0)
        self.nbytes = spec_nbytes(self.spec)
        self.record = Record(name, self.nbytes)
        self.version = -1  # at the last write
        self.pending: PendingRead | None = None
        self.storage: torch.UntypedStorage | None = None
        self._reloaded_by: PendingRead | None = None  # the read that `storage` came from
        self._streams: set[int] = set()  # that are known to use it
        self.num_pins = 0  # it does not leave while somebody holds it
        self.num_changes = 0  # that somebody said there were
        self.is_gathered = False  # others may have its memory
        self.owner: Owner | None = owner  # None: its owner is closed
        self.is_valid = not parameter.is_meta  # false: without bytes until a checkpoint is loaded
        self._materialized: torch.UntypedStorage | None = None  # what the parameter was last given
        self._placeholder_address = 0
        self.torch_device = torch.device("cpu") if parameter.is_meta else parameter.device
        if self.is_valid:
            self.materialize(data.untyped_storage())
        else:
            empty = torch.nn.Parameter(self._take_placeholder(), requires_grad=parameter.requires_grad)
            torch.utils.swap_tensors(parameter, empty)

    def view(self, spec: ViewSpec) -> torch.Tensor:
        """A view of its memory, with a version counter of its own."""
        assert self.storage is not None, f"{self.name} is away"
        with plainly():
            return view_of(self.storage, spec)

    def materialize(self, storage: torch.UntypedStorage, reloaded_by: PendingRead | None = None) -> None:
        """The parameter has this memory from here on: new, or what a read has filled."""
        self.storage = self._materialized = storage
        self._reloaded_by, self._streams = reloaded_by, set()
        self.set_data(self.view(self.spec))

    def use(self) -> None:
        """The current stream uses its memory from here on, whichever allocated it, after the read that filled it."""
        if self.device.driver is None or self.storage is None:
            return
        stream = self.device.current_stream()
        if stream in self._streams:
            return
        self._streams.add(stream)
        if self._reloaded_by is not None and self._reloaded_by.has_left:
            self._reloaded_by.use()
        else:
            self.device.share(self.storage, stream)

    def evict(self) -> None:
        """The parameter has no memory, see [Note: what a parameter is while it is away]."""
        self.set_data(self._take_placeholder())
        self.storage = self._reloaded_by = None

    def set_data(self, data: torch.Tensor) -> None:
        """`parameter.data = data`, whatever class it has."""
        with plainly():
            self.parameter.data = data

    @property
    def is_replaced(self) -> bool:
        """Whether somebody has given the parameter other data (`parameter.data = ...`)."""
        if self._materialized is None:
            return False
        with torch._C.DisableTorchFunctionSubclass():
            return bool(self.parameter.untyped_storage()._cdata != self._materialized._cdata)

    @property
    def is_shared(self) -> bool:
        """Whether somebody else has its memory: leaving would free nothing, and what is written there would be lost."""
        return self.storage is not None and torch._C._storage_Use_Count(self.storage._cdata) > _OWN_USES

    def take_over(self, device_of: Callable[[torch.Tensor], Device | str], *, is_trusted: bool) -> None:
        """Makes the data that somebody gave it its own. Not trusted: it may have been computed from a placeholder.

        Raises:
            RuntimeError: it cannot be.
        """
        with torch._C.DisableTorchFunctionSubclass():
            data = self.parameter.data
        self.check_data(data, device_of)
        if not is_trusted and self.storage is None and is_placeholder(data):
            raise RuntimeError(
                f"Expected values for parameter {self.name}, got NaN computed while its own were on the drive: compute "
                "with it inside parameter_offload(model).gathered()"
            )
        device = device_of(data)
        assert not isinstance(device, str)
        data, self.device, self.torch_device = whole(data), device, data.device
        self.spec = view_spec(data)
        self.nbytes, self.version, self.pending, self.is_valid = spec_nbytes(self.spec), -1, None, True
        self.materialize(data.untyped_storage())

    def check_data(self, data: Any, device_of: Callable[[torch.Tensor], Device | str]) -> None:
        """Raises when it cannot have this data."""
        problem = f"of type {type(data).__name__}"
        if type(data) in (torch.Tensor, torch.nn.Parameter, OffloadedParameter):
            reason = "" if data.layout is torch.strided and not data.is_quantized else f"with layout {data.layout}"
            problem = reason or (f"of shape {list(data.shape)}" if data.shape != self.spec.size else "")
            device = device_of(data)
            problem = problem or (device if isinstance(device, str) else "")
        if problem:
            raise RuntimeError(
                f"Expected dense data of shape {list(self.spec.size)} in memory for parameter {self.name}, which is "
                f"offloaded, got {problem}: call parameter_offload(model).close() first"
            )

    def pin(self) -> None:
        """Until `unpin` it is a plain parameter whose memory is not evicted."""
        self.num_pins += 1
        self.parameter.__class__ = torch.nn.Parameter

    def unpin(self) -> None:
        """Undoes one `pin`; without any, it may be evicted."""
        self.num_pins -= 1
        self.guard()

    def guard(self) -> None:
        """Unless somebody holds it, those who use it ask its owner, if it has one."""
        if not self.num_pins:
            self.parameter.__class__ = torch.nn.Parameter if self.owner is None else OffloadedParameter
            if self.owner is not None:
                vars(self.parameter)[OWNER] = self.owner

    def note_gathered(self, *, is_gathered: bool) -> None:
        """Says whether others may have its memory."""
        self.is_gathered = is_gathered

    def disown(self) -> None:
        """Makes it a plain parameter for good, whoever has pinned it: its owner is closed."""
        self.owner, self.num_pins = None, 0
        self.guard()
        vars(self.parameter).pop(OWNER, None)

    def check_placeholder(self) -> None:
        """Raises when somebody has written to its placeholder; an accelerator would have to be waited for."""
        if self.storage is not None or self.device.driver is not None or self.is_replaced:
            return
        if not is_intact(self._placeholder_address, self.spec.dtype):
            raise RuntimeError(
                f"Expected nobody to write to parameter {self.name} while its values are on the drive, got other bytes "
                "in its placeholder: write to it inside parameter_offload(model).gathered()"
            )

    def _take_placeholder(self) -> torch.Tensor:
        with plainly():
            placeholder, self._placeholder_address = placeholder_of(self.spec.dtype, self.spec.size, self.torch_device)
        self._materialized = placeholder.untyped_storage()
        return placeholder


class ParameterRecords:
    """The offloaded parameters of one module."""

    def __init__(self, store: StateStore, counters: StateCounters) -> None:
        """No parameter yet. `by_storage` finds those in memory by the address of their storage object."""
        self.store = store
        self.by_storage: dict[int, ParameterRecord] = {}
        self.copies = Copies[ParameterRecord](lambda r: (r.parameter._version, r.num_changes), lambda r: r.name)
        self._counters = counters

    def prefetch(self, records: Iterable[ParameterRecord]) -> int:
        """Begins to read what is away; how many those are."""
        num_begun = 0
        for r in records:
            if r.storage is None and r.pending is None and r.is_valid and not r.is_replaced:
                r.pending = self.store.read(r.record, r.device)
                num_begun += 1
        return num_begun

    def forget(self, records: Iterable[ParameterRecord]) -> None:
        """Gives up reads under way: these are not needed after all."""
        for r in records:
            r.pending = None

    def reload(self, records: Iterable[ParameterRecord]) -> None:
        """Has all of them in memory, waiting for those that are not.

        Raises:
            StateLostError: the drive does not have the bytes any more.
            RuntimeError: one has never been given any.
        """
        records = list(records)
        self.copies.take_over(self._write_copy)
        for r in records:
            if r.is_replaced:
                self._adopt_replaced(r)
        missing = [r for r in records if r.storage is None]
        if missing:
            self._reload(missing)
        for r in records:
            r.use()

    def _reload(self, missing: list[ParameterRecord]) -> None:
        _check_real(missing[0])
        for r in missing:
            r.check_placeholder()
        self._counters.num_demand_reads += self.prefetch(missing)
        for r in missing:
            if r.pending is None:
                raise RuntimeError(
                    f"Expected parameter {r.name} to have a value, got one that was built on the meta device: load a "
                    "checkpoint first, with load_safetensors() or load_state_dict()"
                )
            pending, r.pending = r.pending, None
            self._materialize(r, self.store.wait(pending), pending)

    def adopt(self, r: ParameterRecord) -> None:
        """Takes one that is new, and in memory or without a value."""
        if r.storage is not None:
            self.by_storage[r.storage._cdata] = r

    def materialize_empty(self, r: ParameterRecord) -> None:
        """Has it in memory with any bytes: all of them are about to be written over."""
        if r.storage is None:
            self._materialize(r, r.device.allocate(r.nbytes, _PAGE, _PAGE).storage)
        r.pending, r.is_valid = None, True

    def _materialize(
        self, r: ParameterRecord, storage: torch.UntypedStorage, reloaded_by: PendingRead | None = None
    ) -> None:
        self.by_storage[storage._cdata] = r  # before the parameter has it: an entry too many does no harm
        r.materialize(storage, reloaded_by)

    def note_changed(self, records: Iterable[ParameterRecord]) -> None:
        """Says that they were changed, perhaps behind the version counter."""
        for r in records:
            r.version = -1
            r.num_changes += 1

    def _write_copy(self, r: ParameterRecord, value: torch.Tensor) -> None:
        """Gives one the value that was written to a copy of it, where it is."""
        if not r.is_valid or self.replace(r, value):
            return
        with plainly(), torch.no_grad():
            r.view(r.spec).copy_(value)
        torch.autograd.graph.increment_version(r.parameter)

    def assign(self, r: ParameterRecord, data: torch.Tensor) -> None:
        """`parameter.data = data`.

        Raises:
            RuntimeError: it cannot have that.
        """
        r.check_data(data, self.store.devices().of)
        r.set_data(data)
        if r.is_replaced:
            self._adopt_replaced(r, is_trusted=True)

    def _adopt_replaced(self, r: ParameterRecord, *, is_trusted: bool = False) -> None:
        old = r.storage
        r.take_over(self.store.devices().of, is_trusted=is_trusted)
        if old is not None:
            self.by_storage.pop(old._cdata, None)
        self.adopt(r)

    def read_to_host(self, r: ParameterRecord) -> Callable[[], torch.Tensor] | None:
        """Begins to read one that is away to host memory; what is returned waits for it, in any thread.

        None: it is in memory of its device now.

        Raises:
            RuntimeError: it has never been given any bytes.
        """
        self.copies.take_over(self._write_copy)
        pending = None
        if r.storage is None and r.is_valid and not r.is_replaced:
            pending = self.store.read(r.record, self.store.host)
        if pending is None or not pending.has_left:  # the drive had no room for it
            self.reload([r])
            return None
        return lambda: view_of(self.store.wait(pending), r.spec)

    def replace(self, r: ParameterRecord, value: torch.Tensor) -> bool:
        """Writes the new value of one that is away, from host memory; false: it is in memory of its device.

        The value's memory is the store's from here on.
        """
        is_whole = view_spec(value) == r.spec and value.untyped_storage().nbytes() == r.nbytes
        if r.storage is not None or r.is_replaced or not is_whole:
            self.reload([r])
            return False
        self.store.write(r.record, value.untyped_storage(), self.store.host, prefers_host=True)
        r.pending = None  # of the old value
        torch.autograd.graph.increment_version(r.parameter)  # a graph that has saved it learns of the change
        r.version = r.parameter._version
        return True

    def write(self, records: Iterable[ParameterRecord]) -> None:
        """Writes what has changed; it stays in memory, and may not change before it is copied."""
        self.copies.take_over(self._write_copy)
        for r in records:
            if r.is_replaced:
                self._adopt_replaced(r)
            if r.storage is None:
                r.check_placeholder()
                continue
            version = r.parameter._version
            if version != r.version or not r.record.is_filled:
                may_change = r.is_gathered and r.is_shared
                self.store.write(r.record, r.storage, r.device)
                r.version = -1 if may_change else version

    def offload(self, records: Iterable[ParameterRecord]) -> None:
        """Writes what has changed and evicts all of them; memory lives until its bytes are copied."""
        for r in records:
            if r.num_pins:
                continue
            self.write([r])
            if r.storage is None:
                continue
            self.by_storage.pop(r.storage._cdata, None)  # first: the address may be another storage's then
            r.evict()
            r.guard()


def _check_real(r: ParameterRecord) -> None:
    """Raises where tensors have no values or are recorded, as while a module is exported."""
    kinds = torch._C._TorchDispatchModeKey
    if any(torch._C._get_dispatch_mode(kind) is not None for kind in (kinds.FAKE, kinds.PROXY)):
        raise not_real(r)


def not_real(r: ParameterRecord) -> RuntimeError:
    """What is said where one is wanted as a tensor without a value."""
    return RuntimeError(
        f"Expected parameter {r.name} in memory where tensors are fake (torch.export), got one that is offloaded: "
        "export copy.deepcopy(model), which is all in memory, or call parameter_offload(model).close() first"
    )
