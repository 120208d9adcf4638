"""Tensors of optimizer state on the drive: a page per parameter and key, brought to a state dictionary and sent away.

Knows parameters as keys and the vault; not when an optimizer steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ssdtrain.devices.base import Device
from ssdtrain.state_stats import StateCounters
from ssdtrain.store.identity import ViewSpec, view_of, view_spec, whole
from ssdtrain.store.mapped import mapped_copy
from ssdtrain.store.slots import Arrival, Slot
from ssdtrain.store.tensor_store import StateLostError, Vault


@dataclass(eq=False)
class _Page:
    """One tensor of a parameter's state."""

    slot: Slot
    spec: ViewSpec
    device: Device
    arrival: Arrival | None = None


class Pages:
    """The state of all parameters of one optimizer, as far as it is on the drive."""

    def __init__(self, vault: Vault, counters: StateCounters, min_nbytes: int) -> None:
        """There is none yet."""
        self._vault, self._counters, self._min_nbytes = vault, counters, min_nbytes
        self._devices = vault.devices()
        self._pages: dict[torch.Tensor, dict[str, _Page]] = {}

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Parameters with state on the drive."""
        return iter(list(self._pages))

    def __contains__(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter has state on the drive."""
        return parameter in self._pages

    def nbytes(self, parameter: torch.Tensor) -> int:
        """Bytes of a parameter's pages; a guess, twice the parameter, while there are none."""
        return sum(page.slot.nbytes for page in self._pages.get(parameter, {}).values()) or 2 * parameter.nbytes

    def fetch(self, parameter: torch.Tensor, device: Device | None = None) -> int:
        """Begins to read a parameter's pages, to where they came from or to another device; how many."""
        num_begun = 0
        for page in self._pages.get(parameter, {}).values():
            to = device or page.device
            if page.arrival is not None and page.arrival.device is not to:
                page.arrival = None
            if page.arrival is None and page.slot.is_filled:
                page.arrival = self._vault.read(page.slot, to)
                num_begun += 1
        return num_begun

    def is_kept(self, parameter: torch.Tensor) -> bool:
        """Whether the drive had no room for some of it, which is where it came from."""
        return any(page.slot.kept is not None for page in self._pages.get(parameter, {}).values())

    def bring(self, parameter: torch.Tensor, state: dict[str, Any], device: Device | None = None) -> None:
        """Puts a parameter's pages where the optimizer looks for its state, in memory as `fetch` says.

        Raises:
            StateLostError: the drive does not have one any more.
        """
        self._counters.num_demand_reads += self.fetch(parameter, device)
        lost: StateLostError | None = None
        for key, page in self._pages.get(parameter, {}).items():
            arrival, page.arrival = page.arrival, None
            if arrival is not None:
                try:
                    state[key] = view_of(self._vault.take(arrival), page.spec)
                except StateLostError as error:
                    lost = lost or error
        if lost is not None:
            raise lost

    def send_away(self, parameter: torch.Tensor, name: str, state: dict[str, Any], host: Device | None = None) -> None:
        """Begins to write a parameter's state, which is all in `state`, and takes it out of there.

        `host`: the device of host memory, where all of it is by then, whatever the parameter's own is.
        """
        for key in [key for key in self._pages.get(parameter, {}) if not _may_leave(state.get(key), self._min_nbytes)]:
            self._drop(self._pages[parameter].pop(key))  # the optimizer has done away with it
        for key, value in list(state.items()):
            device = (host or self._devices.of(value)) if _may_leave(value, self._min_nbytes) else ""
            if isinstance(device, str):
                continue
            source = whole(value)
            pages = self._pages.setdefault(parameter, {})
            if key not in pages:
                pages[key] = _Page(Slot(f"{key} of {name}"), view_spec(source), device)
                self._counters.go(source.nbytes)
            pages[key].spec, pages[key].device = view_spec(source), device
            self._vault.write(pages[key].slot, source.untyped_storage(), device, prefers_host=host is not None)
            del state[key]

    def copies(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """A parameter's pages, in memory of their own."""
        vault = self._vault
        return {
            key: view_of(vault.take(vault.read(page.slot, page.device)), page.spec).clone()
            for key, page in self._pages.get(parameter, {}).items()
        }

    def mapped(self, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """A parameter's pages in files that are mapped to memory, for state dicts."""
        for key, page in self._pages.get(parameter, {}).items():
            tensor = view_of(self._vault.take(self._vault.read(page.slot, page.device)), page.spec)
            yield key, mapped_copy(tensor, page.spec, self._vault.directory)

    def drop(self, parameter: torch.Tensor) -> None:
        """Frees a parameter's pages."""
        for page in self._pages.pop(parameter, {}).values():
            self._drop(page)

    def _drop(self, page: _Page) -> None:
        self._vault.free(page.slot)
        self._counters.go(-page.slot.nbytes, -1)

    def forget(self) -> None:
        """Frees all of them."""
        for parameter in self:
            self.drop(parameter)


def _may_leave(value: Any, min_nbytes: int) -> bool:
    is_plain = type(value) is torch.Tensor and value.layout is torch.strided and not value.is_quantized
    return is_plain and value.nbytes >= max(1, min_nbytes)
