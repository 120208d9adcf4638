"""Which blocks of a module are offloaded, which of their parameters, and whether they still are what they were.

Knows modules and parameters; moves nothing. What cannot be offloaded raises here, before anything is written.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ssdtrain.model_blocks import find_blocks
from ssdtrain.parameters.parameter import ParameterRecord
from ssdtrain.parameters.placeholder import OWNER
from ssdtrain.state_stats import StateCounters

_MAX_NAMES = 8


class Block:
    """One block of the module and its parameters."""

    def __init__(self, index: int, name: str, module: torch.nn.Module, records: list[ParameterRecord]) -> None:
        self.index, self.name, self.module, self.records = index, name, module, records
        self.num_running = 0  # forwards
        self.seen: list[tuple[Mapping[str, Any], str, Any]] = []

    def remember(self) -> None:
        """Remembers which parameters it has."""
        modules = list(self.module.modules())
        self.seen = [(m._parameters, key, value) for m in modules for key, value in m._parameters.items()]

    def check(self) -> None:
        """Raises when its parameters are other ones by now, or were moved or cast."""
        for register, key, value in self.seen:
            if register.get(key) is not value:
                raise RuntimeError(
                    f"Expected block {self.name} to have the parameters it had when it was offloaded, got another "
                    f"{key!r}: parametrise, quantise or replace it before offload_parameters()"
                )
        for r in self.records:
            p = r.parameter
            if p.dtype != r.spec.dtype or p.device != r.torch_device or p.shape != r.spec.size:
                raise RuntimeError(
                    f"Expected parameter {r.name} as it was offloaded, {r.spec} on {r.torch_device}, got {p.dtype} "
                    f"{list(p.shape)} on {p.device}: move or cast the module before offload_parameters()"
                )


def choose_blocks(module: torch.nn.Module, names: Sequence[str] | None) -> dict[str, torch.nn.Module]:
    """The repeated layers, else the layers of its ``Sequential``, or the modules that `names` (``"encoder.*"``) name.

    Raises:
        ValueError: there are none, a name fits none, or one is inside another.
    """
    if names is None:
        found = find_blocks(module) or _layers_in_sequence(module)
        if not found:
            raise _without_blocks(module)
        return found
    every = dict(module.named_modules())
    every.pop("", None)
    chosen: dict[str, torch.nn.Module] = {}
    for name in [names] if isinstance(names, str) else names:
        fitting = [known for known in every if fnmatch.fnmatchcase(known, name) and known.count(".") == name.count(".")]
        if not fitting:
            some = ", ".join(list(every)[:_MAX_NAMES])
            raise ValueError(f"Expected names of modules such as {some}, got {name!r}, which is none of them")
        chosen |= {known: every[known] for known in fitting if any(True for _ in every[known].parameters())}
    for outer in chosen:
        inner = next((other for other in chosen if other.startswith(f"{outer}.")), None)
        if inner is not None:
            raise ValueError(f"Expected blocks apart from each other, got {inner!r} inside {outer!r}: name one of them")
    return chosen


def _layers_in_sequence(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """What each ``Sequential`` of a module without repeated layers runs in turn, unless it has no parameters."""
    found: dict[str, torch.nn.Module] = {}
    inner = {id(m) for layer in module.modules() for m in _run_in_turn(layer)}
    for name, layer in module.named_modules():  # each object once
        if id(layer) in inner and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = layer
    return found


def _run_in_turn(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The layers of a ``Sequential`` that are none themselves and have parameters."""
    for layer in module.children() if isinstance(module, torch.nn.Sequential) else ():
        if not isinstance(layer, torch.nn.Sequential) and any(True for _ in layer.parameters()):
            yield layer


def _without_blocks(module: torch.nn.Module) -> ValueError:
    """With the line to write."""
    names = [name for name, child in module.named_children() if any(True for _ in child.parameters())]
    kind = type(module).__name__
    line = f"name its blocks: blocks={names[:_MAX_NAMES]}" if names else "one layer is in memory as a whole anyway"
    return ValueError(f"Expected a module with repeated layers or a Sequential, got {kind} without any: {line}")


def choose_parameters(
    module: torch.nn.Module, blocks: Mapping[str, torch.nn.Module], min_nbytes: int, counters: StateCounters
) -> dict[str, torch.nn.Parameter]:
    """The parameters that leave, by name. What stays in memory is counted with its reason.

    Raises:
        ValueError: one is of a kind that cannot be offloaded, or they are on several devices.
    """
    users = _users(module, blocks)
    sharing = Counter(_storage(tensor) for tensor in (*module.parameters(), *module.buffers()))
    leaving: dict[str, torch.nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                f"Expected parameters that nobody else moves, got {name} under DeepSpeed ZeRO-3: use its own "
                "offload_param"
            )
        owners = users[id(parameter)]
        reason = _why_stay(parameter, owners, min_nbytes)
        if reason is None and not parameter.is_meta and sharing[_storage(parameter)] > 1:
            reason = "shares its memory with another tensor"
        if reason is None:
            _check_kind(name, parameter)
            leaving[name] = parameter
        else:
            counters.keep(reason, _nbytes(parameter))
    devices = {str(parameter.device) for parameter in leaving.values()}
    if len(devices) > 1:
        raise ValueError(
            f"Expected all parameters on one device, got {', '.join(sorted(devices))}: move the module first"
        )
    return leaving


def _users(module: torch.nn.Module, blocks: Mapping[str, torch.nn.Module]) -> dict[int, set[str]]:
    """Names of the blocks that use each parameter; the empty name is for what is outside all of them."""
    users: dict[int, set[str]] = {}
    inside = {id(m): name for name, block in blocks.items() for m in block.modules()}
    for m in module.modules():
        for parameter in m._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), set()).add(inside.get(id(m), ""))
    return users


def _why_stay(parameter: torch.nn.Parameter, owners: set[str], min_nbytes: int) -> str | None:
    if owners == {""}:
        return "outside the blocks"
    if len(owners) > 1:
        return "shared between blocks"
    if _nbytes(parameter) < max(1, min_nbytes):
        return "smaller than min_nbytes"
    return None


def _check_kind(name: str, parameter: torch.nn.Parameter) -> None:
    if hasattr(parameter, OWNER):
        raise ValueError(f"Expected a module that is not offloaded yet, got {name}, which is: call close() first")
    kind, data = type(parameter), type(parameter.data)
    if kind is not torch.nn.Parameter or data is not torch.Tensor:
        raise ValueError(
            f"Expected plain parameters, got {name} of type {kind.__name__} ({data.__name__}), whose memory belongs to "
            "another framework: leave its block out with blocks=[...]"
        )
    if parameter.layout is not torch.strided or parameter.is_quantized:
        raise ValueError(f"Expected dense parameters, got {name} with layout {parameter.layout}: leave its block out")


def _storage(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # sparse, quantised, of another framework
        return id(tensor)


def _nbytes(parameter: torch.Tensor) -> int:
    return parameter.nbytes if parameter.layout is torch.strided else 0
