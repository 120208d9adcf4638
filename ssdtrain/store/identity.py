"""Which storage is this, may it be offloaded and why not, how is the view rebuilt.

Knows tensors, and neither records nor files. A storage is identified by its live `StorageImpl`, pinned through a weak
reference for as long as anything is filed under its address, so that an address can never be taken for another storage.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.multiprocessing.reductions import StorageWeakRef

_EMPTY = torch.empty(0, device="cpu")
_EMPTIES = {
    dtype: torch.empty(0, dtype=dtype, device="cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}
"""Another tensor of one of these is made faster than one from nothing."""

# Operators that give a weight another shape or precision and compute nothing new.
_RESHAPES = frozenset(
    f"{name}Backward0"
    for name in (
        "Alias AsStrided Expand Permute ReshapeAlias Select Slice Split SplitWithSizes Squeeze T ToCopy Transpose "
        "UnsafeView Unsqueeze View"
    ).split()
)
_COPY = "ToCopyBackward0"
_MAX_RESHAPES = 6

SUBCLASS = "tensor subclass"
"""Why one of a class that is not known stays."""


class ViewSpec(NamedTuple):
    """Enough to rebuild a saved tensor from a storage: dtype, sizes, strides and offset in elements."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    storage_offset: int

    def __str__(self) -> str:
        """``float32[8, 512]``."""
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.size)}"


def view_spec(tensor: torch.Tensor) -> ViewSpec:
    """The view a strided tensor is of its storage."""
    return ViewSpec(tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def spec_nbytes(spec: ViewSpec) -> int:
    """Bytes from the first element of a view to the end of its last."""
    if 0 in spec.size:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(spec.size, spec.stride, strict=True))
    return (last + 1) * spec.dtype.itemsize


def view_of(storage: torch.UntypedStorage, spec: ViewSpec) -> torch.Tensor:
    """A tensor on `storage`, with a version counter of its own."""
    empty = torch.empty(0, dtype=spec.dtype, device=storage.device)
    return empty.set_(storage, spec.storage_offset, spec.size, spec.stride)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it where it is only a part of its storage."""
    is_whole = tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == spec_nbytes(view_spec(tensor))
    return tensor if is_whole else tensor.clone()


def rebuild(
    storage: torch.UntypedStorage,
    shift_nbytes: int,
    spec: ViewSpec,
    probe: torch.Tensor | None,
    source: weakref.ref[torch.Tensor] | None,
) -> torch.Tensor:
    """The saved tensor again, on `storage`, which begins `shift_nbytes` into the original one.

    The object itself, if that is still the `source`. What is made anew shares the version counter of the tensor
    that was saved: a change made in backward is seen by the next unpack. A part of another tensor, whose counter is
    the other's, has no `probe`.
    """
    original = source() if source is not None else None
    if original is not None and _is_still(original, storage, spec):
        return original
    spec = spec._replace(storage_offset=spec.storage_offset - shift_nbytes // spec.dtype.itemsize)
    if probe is None:
        return view_of(storage, spec)
    tensor = probe.detach()
    empty = _EMPTIES.get(spec.dtype) if storage.device.type == "cpu" else None
    if empty is None:
        tensor.data = view_of(storage, spec)
    else:  # whose version counter all would share, is not seen through `data`
        tensor.data = empty.detach().set_(storage, spec.storage_offset, spec.size, spec.stride)
    return tensor


def _is_still(tensor: torch.Tensor, storage: torch.UntypedStorage, spec: ViewSpec) -> bool:
    """Whether a saved object is as it was; ``.data = ...`` may have made it another view, or of other memory."""
    if tensor.untyped_storage()._cdata != storage._cdata or view_spec(tensor) != spec:
        return False
    tensor._fix_weakref()  # type: ignore[attr-defined]  # PyTorch's own word for a reference that came out of a weak one
    return True


def has_bytes(storage: torch.UntypedStorage, end: int) -> bool:
    """Whether there is memory behind the first `end` bytes of a storage.

    Forward-mode AD has zeros that are nothing but a mark, functional tensors are wrappers, and whoever frees memory
    behind PyTorch's back leaves a storage that is too short.
    """
    try:
        return storage.data_ptr() != 0 and end <= storage.nbytes()
    except RuntimeError:  # no memory, and yet a size
        return False


def has_own_attributes(tensor: torch.Tensor) -> bool:
    """Whether backward may ask this very object for something; what the compiler notes on tensors is not asked for."""
    return any(not name.startswith("_dynamo_") for name in tensor.__dict__)


def byte_range(tensor: torch.Tensor, nbytes: int) -> tuple[int, int]:
    """First byte and end of what a strided, non-empty tensor touches in its storage."""
    itemsize = tensor.element_size()
    start = int(tensor.storage_offset()) * itemsize
    if tensor.is_contiguous():
        return start, start + nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return start, start + (last + 1) * itemsize


def version_probe(tensor: torch.Tensor) -> torch.Tensor:
    """An empty tensor that shares `tensor`'s version counter and keeps none of its memory alive.

    Autograd checks the counter itself only for tensors without hooks; with the probe we can check it when the saved
    bytes are long gone from memory.
    """
    probe = tensor.detach()
    probe.data = _EMPTY
    return probe


def shares_version_counter(tensor: torch.Tensor, probe: torch.Tensor) -> bool:
    """Whether a change in place of one counts as a change of the other, as for a tensor and its views.

    Aliases made by ``.data`` have counters of their own, whose numbers may be equal by chance. There is no way to ask,
    so the counter is moved and put back: the caller holds the lock under which versions are checked.
    """
    version = tensor._version
    if probe._version != version:
        return False
    with _unsafe_preserve_version_counter(tensor):
        torch.autograd.graph.increment_version(tensor)
        return probe._version != version


def why_not(tensor: torch.Tensor) -> str | None:
    """Why a tensor is not a plain strided tensor that may be offloaded, or None."""
    kind = type(tensor)
    if kind is not torch.Tensor and kind is not torch.nn.Parameter and not getattr(kind, "is_plain", False):
        return "weight" if _is_marked(tensor) else SUBCLASS
    return why_not_layout(tensor)


def why_not_layout(tensor: torch.Tensor) -> str | None:
    """The same, whatever its class."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout is not torch.strided:
        return "not strided"
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_conj() or tensor.is_neg():
        return "conjugate or negative view"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "functorch"
    return None


def is_weight(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a parameter or buffer, a view of one, or a low-precision copy that autocast keeps of one.

    A copy that nobody keeps but autograd, as of ``weight.to(torch.bfloat16)``, is memory like any other.
    """
    base = tensor._base
    is_plain = type(tensor) is torch.Tensor and "_is_buffer" not in tensor.__dict__
    if not is_plain and _is_marked(tensor):
        return True
    if base is not None and _is_marked(base):
        return True
    node = tensor.grad_fn
    for _ in range(_MAX_RESHAPES):
        if node is None or (name := node.name()) not in _RESHAPES:
            return False
        if name == _COPY and not _autocast_keeps_copies():
            return False
        node = next((n for n, _ in node.next_functions if n is not None), None)
        variable = getattr(node, "variable", None)
        if variable is not None:
            return _is_marked(variable)
    return False


def _autocast_keeps_copies() -> bool:
    """Inside an operator that it casts for, autocast says that it is off; only how deep it is nested tells."""
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return depth > 1 and torch.is_autocast_cache_enabled()


def is_made_by(tensor: torch.Tensor, names: frozenset[str]) -> bool:
    """Whether an autograd node of one of these names made a tensor, or what it is a view of."""
    base = tensor._base
    if base is not None and base.grad_fn is not None and base.grad_fn.name() in names:
        return True
    node = tensor.grad_fn
    for _ in range(_MAX_RESHAPES):
        if node is None or node.name() in names or node.name() not in _RESHAPES:
            break
        node = node.next_functions[0][0]
    return node is not None and node.name() in names


def _is_marked(tensor: torch.Tensor) -> bool:
    if type(tensor) is torch.Tensor:
        return "_is_buffer" in tensor.__dict__  # what torch.nn.Buffer leaves on a tensor
    return isinstance(tensor, torch.nn.Parameter | torch.nn.Buffer)


def live_storage(weak: StorageWeakRef) -> torch.UntypedStorage | None:
    """The storage a weak reference stands for, if anybody still holds it."""
    storage: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(weak.cdata)
    return storage
