"""Where each offloaded parameter is, and how it comes and goes: the storage is emptied and filled again.

Knows parameters and the vault, neither modules nor the order in which they are needed.

[Note: one storage for life]
A parameter keeps its storage object, so that views autograd saved of it (`weight.t()`) are valid once the storage is
filled again. While the storage is empty the parameter itself shows NaN through one shared element of its shape: a read
of an empty storage would crash the process, and zeros would pass unnoticed. Nothing of this is seen by autograd:
setting `.data` and filling a storage do not touch version counters.

[Note: changed or not]
What comes back clean goes without a write. Changed is what has another version than at its last write, or what
somebody says has changed: `.data` bypasses version counters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum

import torch

from ssdtrain.device import Device
from ssdtrain.identity import ViewSpec, spec_nbytes, view_spec
from ssdtrain.state_stats import StateCounters
from ssdtrain.vault import Arrival, Slot, Vault


class Whereabouts(Enum):
    """IN and LEAVING: the storage is full. COMING: it is being read to memory beside the storage."""

    IN = "in memory"
    LEAVING = "being written"
    AWAY = "on the drive"
    COMING = "being read"


class Residence:
    """One offloaded parameter."""

    def __init__(self, name: str, parameter: torch.nn.Parameter, device: Device) -> None:
        """It is in memory and has never been written. Its storage must be its own, and resizable.

        A parameter on the meta device becomes one on the CPU, away, without a value yet.
        """
        self.name, self.parameter, self.device = name, parameter, device
        self.is_valid = not parameter.is_meta  # false: without bytes until a checkpoint is loaded
        self.spec: ViewSpec = view_spec(parameter)._replace(storage_offset=0)
        self.nbytes = spec_nbytes(self.spec)
        self.where = Whereabouts.IN
        self.slot = Slot(name, self.nbytes)
        self.version = -1  # at the last write
        self.arrival: Arrival | None = None
        self.num_pins = 0  # it does not leave while somebody holds it
        self.is_settled = False  # stays in memory from now on
        if self.is_valid:
            self.storage = parameter.untyped_storage()
        else:
            self.storage = torch.UntypedStorage(0)
            empty = _poison(self.spec.dtype, self.storage.device).expand(self.spec.size)
            torch.utils.swap_tensors(parameter, torch.nn.Parameter(empty, requires_grad=parameter.requires_grad))
            self.where = Whereabouts.AWAY

    @property
    def is_full(self) -> bool:
        """Whether its storage has its bytes."""
        return self.where in (Whereabouts.IN, Whereabouts.LEAVING)

    def view(self, spec: ViewSpec) -> torch.Tensor:
        """A view of its storage, with a version counter of its own."""
        empty = torch.empty(0, dtype=spec.dtype, device=self.storage.device)
        return empty.set_(self.storage, spec.storage_offset, spec.size, spec.stride)

    def show(self) -> None:
        """The parameter shows its storage."""
        self.parameter.data = self.view(self.spec)

    def hide(self) -> None:
        """The parameter shows NaN, see [Note: one storage for life]."""
        self.parameter.data = _poison(self.spec.dtype, self.storage.device).expand(self.spec.size)


def _poison(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    value: float = float("nan") if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).max
    return torch.full((), value, dtype=dtype, device=device)


class Residences:
    """The offloaded parameters of one module."""

    def __init__(self, vault: Vault, counters: StateCounters) -> None:
        """None yet."""
        self.vault = vault
        self._counters = counters
        self._leaving: list[Residence] = []

    def fetch(self, residences: Iterable[Residence]) -> int:
        """Begins to read what is away; how many those are."""
        num_begun = 0
        for r in residences:
            if r.where is Whereabouts.AWAY and r.is_valid:
                num_begun += 1
                r.arrival = self.vault.read(r.slot, r.device)
                r.where = Whereabouts.COMING
        return num_begun

    def forget(self, residences: Iterable[Residence]) -> None:
        """Those that are coming are not needed after all."""
        for r in residences:
            if r.where is Whereabouts.COMING:
                r.arrival, r.where = None, Whereabouts.AWAY

    def bring(self, residences: Sequence[Residence]) -> None:
        """Has all of them in memory, waiting for those that are not.

        Raises:
            StateLostError: the drive does not have the bytes any more.
            RuntimeError: one has never been given any.
        """
        missing = [r for r in residences if r.where is not Whereabouts.IN]
        if not missing:
            return
        self._counters.num_demand_reads += sum(r.where is Whereabouts.AWAY for r in missing)
        self.fetch(missing)
        for r in missing:
            self._fill(r)

    def _fill(self, r: Residence) -> None:
        if r.where is Whereabouts.LEAVING:  # its bytes never left; the write goes on
            self._leaving.remove(r)
            r.where = Whereabouts.IN
            return
        if not r.is_valid:
            raise RuntimeError(
                f"Expected parameter {r.name} to have a value, got one that was built on the meta device: load a "
                "checkpoint first, with checkpoint=... or load_state_dict()"
            )
        assert r.arrival is not None
        source = self.vault.take(r.arrival)
        r.storage.resize_(r.nbytes)
        raw = torch.empty(0, dtype=torch.uint8, device=r.storage.device)
        with torch.no_grad():
            raw.set_(r.storage).copy_(raw.new_empty(0).set_(source, 0, (r.nbytes,), (1,)))
        r.show()
        r.arrival, r.where = None, Whereabouts.IN

    def accept(self, r: Residence) -> None:
        """Has it in memory with any bytes: all of them are about to be written over."""
        if r.where is Whereabouts.LEAVING:
            self._fill(r)
        if r.where is not Whereabouts.IN:
            r.storage.resize_(r.nbytes)
            r.show()
            r.arrival, r.where, r.is_valid = None, Whereabouts.IN, True

    def note_changed(self, residences: Iterable[Residence]) -> None:
        """Says that they were changed, perhaps behind the version counter."""
        for r in residences:
            r.version = -1

    def leave(self, residences: Iterable[Residence]) -> None:
        """Sends them away: written if they have changed, and freed as soon as that is safe."""
        for r in residences:
            if r.where is not Whereabouts.IN or r.is_settled or r.num_pins:
                continue
            version = r.parameter._version
            if version != r.version or not r.slot.is_filled:
                self.vault.write(r.slot, r.storage, r.device)
                r.version = version
            r.where = Whereabouts.LEAVING
            self._leaving.append(r)
        self.settle()

    def settle(self) -> None:
        """Frees what has been written meanwhile."""
        still: list[Residence] = []
        for r in self._leaving:
            if r.slot.is_copied:
                r.hide()
                r.storage.resize_(0)
                r.where = Whereabouts.AWAY
            else:
                still.append(r)
        self._leaving = still

    def give_up(self, residences: Iterable[Residence]) -> None:
        """They are in memory for good; the drive forgets them."""
        for r in residences:
            r.is_settled = True
            self.vault.free(r.slot)
