"""Which storages are known: those with records, those of weights, and those that outlive every graph.

Everything here is filed under the address of a `StorageImpl`, and a weak reference to the impl is kept as long as the
entry exists: the address cannot become another storage's meanwhile. Guarded by the store's lock.

[Note: what outlives a graph]
A storage that is alive when its graph lets go of it is not held by somebody else for that: a compiled backward lets go
of what is saved before it computes with it. So it is looked at again when the next forward begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ssdtrain.activations.saved.subclasses import inner_tensors
from ssdtrain.store.identity import shares_version_counter
from ssdtrain.store.record import Residency, SavedRecord
from ssdtrain.tracing.pass_trace import Spot

_PURGE_AT = 256
_NUM_SEEN = 2  # steps, before what outlives its graph is left alone
_TRY_AGAIN_AFTER = 256  # of them


class Index:
    """Finds the record of a saved tensor by storage, version and byte range."""

    def __init__(self) -> None:
        """Empty."""
        self._records: dict[int, list[SavedRecord]] = {}
        self.weights: dict[int, StorageWeakRef] = {}
        """Storages of marked parameters and buffers, by address."""
        self._lasting: dict[int, StorageWeakRef] = {}
        self._lasting_spots: dict[Spot, int] = {}  # how often in a row
        self._alive: list[tuple[Spot, StorageWeakRef]] = []  # when the graph let go: see [Note: what outlives a graph]
        self._purge_weights_at = _PURGE_AT

    def find(self, key: int, tensor: torch.Tensor, start: int, end: int) -> SavedRecord | None:
        """The record that holds bytes [start, end) of this storage as `tensor` sees them now."""
        for record in self._records.get(key, ()):
            is_inside = record.start <= start and end <= record.start + record.nbytes
            if is_inside and record.version == tensor._version and shares_version_counter(tensor, record.probe):
                return record
        return None

    def add(self, record: SavedRecord) -> None:
        """Files a new record."""
        self._records.setdefault(record.identity.cdata, []).append(record)

    def forget(self, record: SavedRecord, *, is_source: bool) -> None:
        """Takes a released record out, and remembers a storage that lives on although its graph is gone.

        Not while it is the source of a write, or another graph's too: then nothing is known.
        """
        assert record.residency is Residency.RELEASED
        key = record.identity.cdata
        siblings = self._records[key]
        siblings.remove(record)
        if not siblings:
            del self._records[key]
        is_lasting = not record.identity.expired()
        if is_lasting and (siblings or is_source):
            return
        if is_lasting:
            self._alive.append((record.spot, record.identity))
        else:
            self._note_lasting(record.spot, is_lasting=False)

    def note_forward(self) -> None:
        """A forward begins: what outlived its graph until now is somebody else's."""
        for spot, identity in self._alive:
            is_lasting = not identity.expired()
            self._note_lasting(spot, is_lasting=is_lasting)
            if is_lasting:
                self._lasting[identity.cdata] = identity
        self._alive.clear()
        self._purge()

    def all_records(self) -> Iterator[SavedRecord]:
        """Those that are alive, about in the order they were saved."""
        for siblings in self._records.values():
            yield from siblings

    def forget_records(self) -> None:
        """No record is known any more; weights are."""
        self._records = {}
        self._alive.clear()

    def mark_weights(self, tensors: Iterable[torch.Tensor]) -> None:
        """Marks the storages of a model's parameters and buffers, whatever these are made of."""
        with torch._C.DisableTorchFunctionSubclass():  # not to have offloaded ones read
            for tensor in tensors:
                for part in inner_tensors(tensor):
                    if part.layout is torch.strided:
                        self.mark_weight(part.untyped_storage())

    def mark_weight(self, storage: torch.UntypedStorage) -> None:
        """Marks a storage that was seen to be a weight's, so that other tensors on it are recognised too."""
        if storage._cdata not in self.weights:
            if len(self.weights) >= self._purge_weights_at:
                self.weights = {key: ref for key, ref in self.weights.items() if not ref.expired()}
                self._purge_weights_at = max(_PURGE_AT, 2 * len(self.weights))
            ref = StorageWeakRef(storage)
            self.weights[ref.cdata] = ref

    def outlives_graphs(self, key: int) -> bool:
        """Whether the storage at `key` was still held by somebody when a graph that saved it was gone."""
        return key in self._lasting

    def is_kept_by_others(self, spot: Spot, storage: torch.UntypedStorage) -> bool:
        """Whether what was saved at this spot outlived its graph in the last steps: then `storage` will, too.

        Now and then it is tried again.
        """
        num = self._lasting_spots.get(spot, 0)
        if num < _NUM_SEEN:
            return False
        self._lasting_spots[spot] = num + 1 if num < _TRY_AGAIN_AFTER else _NUM_SEEN - 1
        if num < _TRY_AGAIN_AFTER:
            ref = StorageWeakRef(storage)
            self._lasting[ref.cdata] = ref
            self._purge()
        return num < _TRY_AGAIN_AFTER

    def _note_lasting(self, spot: Spot, *, is_lasting: bool) -> None:
        if is_lasting:
            if len(self._lasting_spots) > _PURGE_AT * _PURGE_AT:  # of sizes that do not come again
                self._lasting_spots.clear()
            self._lasting_spots[spot] = self._lasting_spots.get(spot, 0) + 1
        elif self._lasting_spots:
            self._lasting_spots.pop(spot, None)

    def _purge(self) -> None:
        if len(self._lasting) > _PURGE_AT:
            self._lasting = {key: ref for key, ref in self._lasting.items() if not ref.expired()}
