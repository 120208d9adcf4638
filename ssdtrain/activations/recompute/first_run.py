"""The first run of a block that is to run a second time in backward: what it saved, and whether it may.

Works inside PyTorch's checkpoint, in front of its hooks. It knows tensors, and nothing of records or models' layers.

[Note: kept until the block is over]
The checkpoint keeps nothing of what a block saves. Whether the block may run again is known when it is over: until then
all it saved is held. That is as much as the second run will hold in backward, so the peak of memory does not rise.

[Note: versions]
The checkpoint does not look at versions: what was changed in place in the block after it was saved is changed again in
the second run, and backward computes with it. A probe remembers the version of every strided tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ssdtrain.stats import Counters
from ssdtrain.store.identity import version_probe, view_spec, why_not
from ssdtrain.store.record import Resident
from ssdtrain.store.saved_tensors import innermost_hooks, take_off, unpack_resident

_MAX_COPIED_NBYTES = 1 << 20  # of one buffer: statistics are small

CheckVersion = Callable[[torch.Tensor, int, object], None]
"""Raises if a tensor's version is no longer the given one; the last argument says of what, for the message."""


class State:
    """What a block might change although its result does not show it, as it was before the block ran."""

    def __init__(self, block: torch.nn.Module, arguments: Iterable[torch.Tensor], *, with_values: bool) -> None:
        """`with_values`: looks at the buffers' values too, as `F.batch_norm` changes statistics without a version."""
        self._block = block
        self._buffers = [*block.buffers()]
        own = (*self._buffers, *block.parameters())
        self._own = [(tensor, tensor._version) for tensor in own if not tensor.is_inference()]
        self._arguments = [(version_probe(a), a._version) for a in arguments if _has_version(a)]
        compared = [b for b in self._buffers if _is_small(b)] if with_values else []
        self._values = [(buffer, buffer.detach().clone()) for buffer in compared]

    def change(self) -> str | None:
        """What was changed since, or None."""
        buffers = [*self._block.buffers()]
        if len(buffers) != len(self._buffers) or any(a is not b for a, b in zip(buffers, self._buffers, strict=True)):
            return "its buffers"
        if any(tensor._version != version for tensor, version in self._own):
            return "its buffers or parameters"
        if not all(_equal(buffer, value) for buffer, value in self._values):
            return "its buffers"
        return "an argument in place" if any(probe._version != v for probe, v in self._arguments) else None


class FirstRun:
    """Hooks in front of a checkpoint's own while the block runs for the first time. One for every call."""

    def __init__(self, check: CheckVersion) -> None:
        """To be made where the block is called: the hooks that are on here get what is to be kept after all."""
        counters = Counters()
        self._outer = innermost_hooks() or (lambda tensor: Resident(tensor, 0, counters), unpack_resident)
        self._checkpoint: tuple[Any, Any] | None = None
        self._check = check
        self._saved: list[_Saved] = []

    def __enter__(self) -> None:
        """Called by the checkpoint, whose hooks are on."""
        self._checkpoint = innermost_hooks()
        torch._C._autograd._push_saved_tensors_default_hooks(self._pack, self._unpack)

    def __exit__(self, *error: object) -> None:
        """The hooks are off; what was saved is held until `end`."""
        take_off(self._pack)

    def end(self, *, keeps: bool) -> None:
        """The block is over. `keeps`: what it saved is kept, and it does not run again."""
        saved, self._saved = self._saved, []
        with torch.no_grad():
            for each in saved:
                assert each.tensor is not None
                if keeps:
                    each.holder, each.is_kept = self._outer[0](each.tensor), True
                each.tensor = None

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        assert self._checkpoint is not None
        saved = _Saved(tensor, self._checkpoint[0](tensor))
        self._saved.append(saved)
        return saved

    def _unpack(self, saved: _Saved) -> torch.Tensor:
        assert self._checkpoint is not None
        if saved.probe is not None and saved.probe._version != saved.version:
            self._check(saved.probe, saved.version, saved.spec)
        if saved.tensor is not None:  # the block differentiates in its forward
            return saved.tensor
        unpack = self._outer[1] if saved.is_kept else self._checkpoint[1]
        tensor: torch.Tensor = unpack(saved.holder)
        return tensor


class SecondRun:
    """Refuses to run a block again with weights that were changed in place since, also those that nothing had saved."""

    def __init__(self, block: torch.nn.Module, check: CheckVersion) -> None:
        """To be made before the first run."""
        self._weights = [(p, p._version) for p in block.parameters() if not p.is_inference()]
        self._check = check

    def __enter__(self) -> None:
        """Called by the checkpoint, for every run again."""
        for parameter, version in self._weights:
            if parameter._version != version:
                self._check(parameter, version, parameter)

    def __exit__(self, *error: object) -> None:
        """Nothing is to be undone."""


class _Saved:
    """What autograd holds for a tensor that a block saved."""

    __slots__ = ("holder", "is_kept", "probe", "spec", "tensor", "version")

    def __init__(self, tensor: torch.Tensor, holder: Any) -> None:
        """`holder`: what the checkpoint made of it, later perhaps what the hooks around made."""
        is_strided = _has_version(tensor)
        self.tensor: torch.Tensor | None = tensor
        self.holder = holder
        self.is_kept = False
        self.probe = version_probe(tensor) if is_strided else None
        self.version = tensor._version if is_strided else 0
        self.spec = view_spec(tensor) if is_strided else None


def _has_version(tensor: torch.Tensor) -> bool:
    return why_not(tensor) is None and not tensor.is_inference()


def _is_small(buffer: torch.Tensor) -> bool:
    return why_not(buffer) is None and not buffer.is_meta and buffer.nbytes <= _MAX_COPIED_NBYTES


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bool(((left == right) | ((left != left) & (right != right))).all())
