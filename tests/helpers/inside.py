"""What tests look at inside the package: every private name of it that several tests need stands here, once.

Of an `ActivationOffload`: `store`, `counters`, `schedule`, `devices`, `names`, `item_by_item`, `index`, `thread` (of
this thread), `pack` and `unpack` (a tensor, its handle), and what those have inside: `transport` (None while no engine
is open), `source` (where the engine comes from), `put_off` (records that have not set out), `reloads`, `drive`, `step`
(the one under way), `replanner`. Of a store of parameters or optimizer state: `space`. Of an offloaded optimizer:
`cpu_updates`. Of a parameter offload: `working_set`.
"""

from __future__ import annotations

from typing import Any

from ssdtrain import ActivationOffload


def store(offload: Any) -> Any:
    return offload._store


def counters(offload: ActivationOffload) -> Any:
    return offload._counters


def schedule(offload: ActivationOffload) -> Any:
    return offload._schedule


def devices(offload: ActivationOffload) -> Any:
    return offload._devices


def item_by_item(offload: ActivationOffload) -> Any:
    return offload._item_by_item


def names(offload: ActivationOffload) -> Any:
    return offload._names


def index(offload: ActivationOffload) -> Any:
    return offload._index


def thread(offload: ActivationOffload) -> Any:
    return offload._thread


def pack(offload: ActivationOffload, tensor: Any) -> Any:
    return offload._pack(tensor)


def unpack(offload: ActivationOffload, handle: Any) -> Any:
    return offload._unpack(handle)


def put_off(offload: ActivationOffload) -> Any:
    return store(offload).writeback.put_off_records


def plan_at_once(replanner: Any) -> None:
    """However long the last plan took to make, on a busy machine perhaps."""
    replanner._no_plan_before = 0.0


def transport(offload: ActivationOffload) -> Any:
    return transport_of(store(offload))


def transport_of(activations: Any) -> Any:
    return activations.source.store


def source(offload: ActivationOffload) -> Any:
    return store(offload).source


def reloads(offload: ActivationOffload) -> Any:
    return store(offload).reloads


def drive(offload: ActivationOffload) -> Any:
    return transport(offload).drive


def step(offload: ActivationOffload) -> Any:
    return schedule(offload)._step


def replanner(offload: ActivationOffload) -> Any:
    return schedule(offload)._replanner


def space(state: Any) -> Any:
    return state._space


def cpu_updates(optimizer: Any) -> Any:
    return optimizer._cpu_updates


def working_set(parameters: Any) -> Any:
    return parameters._working_set
