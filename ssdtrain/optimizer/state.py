"""Tensors of optimizer state on the drive: reloaded into a state dictionary, and offloaded from there.

Knows parameters as keys and the store; not when an optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ssdtrain.devices.base import Device
from ssdtrain.state_stats import StateCounters
from ssdtrain.store.file_backed import Copies
from ssdtrain.store.identity import ViewSpec, view_of, view_spec, whole, why_not
from ssdtrain.store.pending import PendingRead
from ssdtrain.store.record import Record
from ssdtrain.store.state_store import StateLostError, StateStore
from ssdtrain.store.value_frames import has_gaps, nbytes_of, put_together, take_apart


@dataclass(eq=False)
class _Leaf:
    """One tensor of a value."""

    record: Record
    spec: ViewSpec
    device: Device
    pending: PendingRead | None = None


_Stay = tuple[str, int]  # why a tensor stays in memory, and its bytes


@dataclass(eq=False)
class _StateValue:
    """One value of a parameter's state: a tensor, or what has tensors inside."""

    frame: Any = None
    leaves: list[_Leaf] = field(default_factory=list)


class OffloadedState:
    """The state of all parameters of one optimizer, as far as it is on the drive."""

    def __init__(self, store: StateStore, counters: StateCounters, min_nbytes: int) -> None:
        """No state is on the drive yet."""
        self._store, self._counters, self._min_nbytes = store, counters, min_nbytes
        self._devices = store.devices()
        self._entries: dict[torch.Tensor, dict[str, _StateValue]] = {}
        self._stays: dict[torch.Tensor, dict[str, list[_Stay]]] = {}
        self._copies = Copies[_Leaf](
            lambda leaf: (leaf.record.segments, leaf.record.storage), lambda leaf: leaf.record.name
        )
        self.handed_out: dict[torch.Tensor, int] = {}  # parameters whose state is in use, and its bytes

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Parameters with state on the drive."""
        return iter(list(self._entries))

    def __contains__(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter has state on the drive."""
        return parameter in self._entries

    def _leaves(self, parameter: torch.Tensor) -> list[_Leaf]:
        return [leaf for entry in self._entries.get(parameter, {}).values() for leaf in entry.leaves]

    def nbytes(self, parameter: torch.Tensor) -> int:
        """Bytes of a parameter's state on the drive; while there is none a guess, twice the parameter."""
        return sum([leaf.record.nbytes for leaf in self._leaves(parameter)]) or 2 * nbytes_of(parameter)

    def prefetch(self, parameter: torch.Tensor, device: Device | None = None) -> int:
        """Begins to read a parameter's state, to where they came from or to another device; how many reads."""
        self.take_over_copies()
        num_begun = 0
        for leaf in self._leaves(parameter):
            to = device or leaf.device
            if leaf.pending is not None and leaf.pending.device is not to:
                leaf.pending = None
            if leaf.pending is None and leaf.record.is_filled:
                leaf.pending = self._store.read(leaf.record, to)
                num_begun += 1
        return num_begun

    def reload(self, parameter: torch.Tensor, state: dict[str, Any], device: Device | None = None) -> None:
        """Puts a parameter's state where the optimizer looks for it, in memory as `prefetch` says.

        Raises:
            StateLostError: the drive does not have one any more.
        """
        self._counters.num_demand_reads += self.prefetch(parameter, device)
        lost: StateLostError | None = None
        for key, entry in self._entries.get(parameter, {}).items():
            reads = [leaf.pending for leaf in entry.leaves]
            for leaf in entry.leaves:
                leaf.pending = None
            try:
                storages = [self._store.wait(pending) for pending in reads if pending is not None]
            except StateLostError as error:
                lost = lost or error
                continue
            if len(storages) == len(reads):
                tensors = [view_of(s, leaf.spec) for s, leaf in zip(storages, entry.leaves, strict=True)]
                state[key] = put_together(entry.frame, tensors)
        if lost is not None:
            raise lost

    def offload(
        self,
        parameter: torch.Tensor,
        name: str,
        state: dict[str, Any],
        host: Device | None = None,
    ) -> None:
        """Begins to write a parameter's state, which is all in `state`, and takes it out of there.

        Unless it is handed out. `host`: the device of host memory, where all of it is by then, whatever the
        parameter's own is.
        """
        if parameter in self.handed_out:
            return
        for key in self._keys(parameter) - state.keys():
            self._forget(parameter, key)  # the optimizer has done away with it
        for key in list(state):
            if not self._offload_value(parameter, key, name, state[key], host):
                self._discard(parameter, key)
            else:
                del state[key]

    def _offload_value(self, parameter: torch.Tensor, key: str, name: str, value: Any, host: Device | None) -> bool:
        sources: list[tuple[torch.Tensor, Device, str]] = []
        stays: list[_Stay] = []

        def leave(tensor: torch.Tensor, where: str) -> int | None:
            device = self._device_of(tensor, f"{key}{where}", host)
            if isinstance(device, str):
                stays.append((device, nbytes_of(tensor)))
                return None
            sources.append((whole(tensor), device, f"{key}{where} of {name}"))
            return len(sources) - 1

        frame = take_apart(value, leave)
        self._note_stays(parameter, key, stays)
        if not has_gaps(frame):
            return False
        entry = self._entries.setdefault(parameter, {}).setdefault(key, _StateValue())
        entry.frame = frame
        while len(entry.leaves) > len(sources):
            self._drop(entry.leaves.pop())
        for i, (source, device, record_name) in enumerate(sources):
            if i == len(entry.leaves):
                entry.leaves.append(_Leaf(Record(record_name), view_spec(source), device))
                self._counters.offload(0)
            leaf = entry.leaves[i]
            self._counters.offload(source.untyped_storage().nbytes() - leaf.record.nbytes, 0)
            leaf.spec, leaf.device = view_spec(source), device
            self._store.write(leaf.record, source.untyped_storage(), device, prefers_host=host is not None)
        return True

    def _note_stays(self, parameter: torch.Tensor, key: str, stays: list[_Stay]) -> None:
        """Counts what stays of a value, in the place of what did before."""
        noted = self._stays.setdefault(parameter, {})
        for reason, nbytes in noted.pop(key, ()):
            self._counters.keep(reason, -nbytes, -1)
        for reason, nbytes in stays:
            self._counters.keep(reason, nbytes)
        if stays:
            noted[key] = stays

    def _device_of(self, tensor: torch.Tensor, what: str, host: Device | None) -> Device | str:
        """Where a tensor leaves from, or why it stays, which is said unless it is small."""
        if tensor.layout is torch.strided and tensor.nbytes < max(1, self._min_nbytes):
            return "smaller than min_nbytes"
        is_special = tensor.requires_grad or isinstance(tensor, torch.nn.Parameter)
        reason = why_not(tensor) or ("a parameter or part of a graph" if is_special else None)
        device = reason or host or self._devices.of(tensor)
        if isinstance(device, str):
            self._store.note(f"{what} of a parameter stays in memory: {device}")
        return device

    def hand_out(self, parameter: torch.Tensor, state: dict[str, Any]) -> None:
        """Puts a parameter's state in memory, where it stays while it is in `handed_out`, the only place it is then."""
        self.reload(parameter, state)
        self._release(parameter)
        self.handed_out[parameter] = nbytes_of(state)

    def copies(self, parameter: torch.Tensor) -> dict[str, Any]:
        """A parameter's state on the drive, as copies in memory."""
        return self._read(parameter, lambda tensor, _: tensor.clone())

    def take_over_copies(self) -> None:
        """Takes over what was written to values of state dicts.

        Raises:
            RuntimeError: it cannot be, as the state has changed since they were taken.
        """
        self._copies.take_over(self._write_copy)

    def _write_copy(self, leaf: _Leaf, value: torch.Tensor) -> None:
        self._store.write(leaf.record, value.untyped_storage(), self._store.host, prefers_host=True)
        leaf.pending = None  # of the old value

    def mapped(self, parameter: torch.Tensor) -> dict[str, Any]:
        """A parameter's state on the drive, in files that are mapped to memory, for state dicts."""
        return self._read(parameter, self._mapped_copy)

    def _mapped_copy(self, tensor: torch.Tensor, leaf: _Leaf) -> torch.Tensor:
        copy = self._store.mapped_copy(tensor, leaf.spec)
        self._copies.note(copy, leaf)
        return copy

    def _read(self, parameter: torch.Tensor, copied: Callable[[torch.Tensor, _Leaf], torch.Tensor]) -> dict[str, Any]:
        self.take_over_copies()
        store, found = self._store, {}
        for key, entry in self._entries.get(parameter, {}).items():
            tensors = [
                copied(view_of(store.wait(store.read(leaf.record, leaf.device)), leaf.spec), leaf)
                for leaf in entry.leaves
            ]
            found[key] = put_together(entry.frame, tensors)
        return found

    def drop(self, parameter: torch.Tensor) -> None:
        """Frees the space of a parameter's state, which is none any more."""
        self._copies.forget(self._leaves(parameter))
        self._release(parameter)

    def _release(self, parameter: torch.Tensor) -> None:
        for key in self._keys(parameter):
            self._forget(parameter, key)
        self._entries.pop(parameter, None)
        self._stays.pop(parameter, None)

    def _keys(self, parameter: torch.Tensor) -> set[str]:
        return {*self._entries.get(parameter, {}), *self._stays.get(parameter, {})}

    def _forget(self, parameter: torch.Tensor, key: str) -> None:
        self._discard(parameter, key)
        self._note_stays(parameter, key, [])

    def _discard(self, parameter: torch.Tensor, key: str) -> None:
        entry = self._entries.get(parameter, {}).pop(key, None)
        for leaf in entry.leaves if entry is not None else ():
            self._drop(leaf)

    def _drop(self, leaf: _Leaf) -> None:
        self._store.release(leaf.record)
        self._counters.offload(-leaf.record.nbytes, -1)

    def forget(self) -> None:
        """Frees the space of all state."""
        self.handed_out.clear()
        for parameter in {**self._entries, **self._stays}:
            self.drop(parameter)
