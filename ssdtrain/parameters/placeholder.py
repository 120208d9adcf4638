"""What an offloaded parameter is while nobody holds it: whoever computes with it gets its values.

Knows tensors and the owner that a parameter names; neither files nor blocks.

[Note: how a parameter is reached]
While a block runs, and for whoever has gathered it, a parameter is a plain `torch.nn.Parameter`: no operator costs
more. In between its class is `OffloadedParameter`, the same object: every operator of PyTorch that is given it asks
here first, and its owner has its bytes in memory while the operator runs. So what loops over `parameters()` (averages,
norms, penalties, casts, broadcasts) reads and writes values, one parameter after the other. What needs no value
(`shape`, `grad`, hooks) reloads nothing.

Code that takes tensors past PyTorch's Python functions finds the placeholder: NaN through a single element expanded to
its shape. Zeros would pass unnoticed, and an empty storage would crash the process when read. What writes to it raises.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, Protocol

import torch
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

OWNER = "_ssdtrain_owner"
SHARDED = (
    "Expected a module whose parameters are in memory for FSDP, fully_shard() or replicate(), which put others in "
    "their place, got one whose parameters are offloaded: use one of the two, or DistributedDataParallel"
)


_SHARED = (
    "Expected parameters in memory for share_memory(), got one that is offloaded: what other processes write to its "
    "memory would be lost when it leaves. Call parameter_offload(model).close() first"
)


class Owner(Protocol):
    """Who has the bytes of a parameter."""

    def accessed(
        self, parameters: Iterable[torch.Tensor], *, to_change: bool, stays: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """Inside, these are in memory and plain parameters. `to_change`: perhaps behind version counters.

        `stays`: they are in memory for some time after it, too.
        """

    def assign(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        """`parameter.data = value`."""

    def values(self, parameter: torch.Tensor) -> torch.nn.Parameter:
        """A plain copy of a parameter."""


class OffloadedParameter(torch.nn.Parameter):
    """A parameter whose bytes its owner has, see [Note: how a parameter is reached]."""

    is_plain = True  # for those who know tensor subclasses by what they hold

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Has the values of those among the arguments in memory while `func` runs."""
        kwargs = kwargs or {}
        if func not in _WITHOUT_VALUES:
            if func is torch.autograd.grad:
                args, kwargs = _with_edges(args, kwargs)
            found = [t for t in tree_leaves((args, kwargs)) if type(t) is OffloadedParameter]
            owners: dict[int, Owner] = {id(o): o for t in found if (o := vars(t).get(OWNER)) is not None}
            if func == _SET_DATA and OWNER in vars(args[0]) and type(args[1]) in (torch.Tensor, torch.nn.Parameter):
                return vars(args[0])[OWNER].assign(*args)
            is_collective = str(getattr(func, "__module__", "")).startswith("torch.distributed")
            if owners and is_collective and kwargs.get("async_op"):
                raise ValueError(
                    f"Expected async_op=False, or parameters inside parameter_offload(model).gathered(), got "
                    f"{func.__name__} of one that is offloaded: its memory may leave before others have answered"
                )
            if owners or not found:
                if owners and func is torch.Tensor.share_memory_:
                    raise RuntimeError(_SHARED)
                to_change, stays = is_collective or func in _PAST_COUNTERS, func in _ADDRESSES
                with contextlib.ExitStack() as stack:
                    for owner in owners.values():
                        stack.enter_context(owner.accessed(found, to_change=to_change, stays=stays))
                    return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.nn.Parameter:
        """A plain parameter with the values."""
        if id(self) not in memo:
            memo[id(self)] = vars(self)[OWNER].values(self)
        found: torch.nn.Parameter = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as a plain parameter with the values."""
        return torch.nn.Parameter.__reduce_ex__(vars(self)[OWNER].values(self), protocol)

    @property
    def _fsdp_flattened(self) -> NoReturn:
        """FullyShardedDataParallel looks at this before it takes a parameter."""
        raise ValueError(SHARDED)


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Tensors made inside are plain ones: no wrappers of a `torch.func` transform, and with version counters."""
    with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableFuncTorch(), torch.inference_mode(mode=False):
        yield


def is_differentiated() -> bool:
    """Whether `torch.func.grad` or one of its kin runs, which keep a parameter itself and allow no hooks."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    return any(i.key() == torch._C._functorch.TransformType.Grad for i in torch._C._functorch.get_interpreter_stack())


def placeholder_of(dtype: torch.dtype, size: torch.Size, device: torch.device) -> tuple[torch.Tensor, int]:
    """A placeholder and its address: all bits set, NaN in every floating point format, -1 or the largest integer."""
    if dtype is torch.bool:
        placeholder = torch.ones((), dtype=dtype, device=device).expand(size)
    else:
        placeholder = torch.full((dtype.itemsize,), 255, dtype=torch.uint8, device=device).view(dtype)[0].expand(size)
    address = placeholder.data_ptr()
    _refuse_writes(placeholder)
    return placeholder, address


_refuse_writes: Callable[[torch.Tensor], object] = getattr(
    torch._C, "_set_throw_on_mutable_data_ptr", lambda tensor: None
)


def is_placeholder(value: torch.Tensor) -> bool:
    """Whether a value was computed from placeholders: nothing but NaN."""
    is_float = value.is_floating_point() or value.is_complex()
    return is_float and value.numel() > 0 and bool(value.isnan().all())


def is_intact(address: int, dtype: torch.dtype) -> bool:
    """Whether nobody has written to a placeholder in host memory."""
    return ctypes.string_at(address, dtype.itemsize) == _bits(dtype)


def _bits(dtype: torch.dtype) -> bytes:
    return b"\1" if dtype is torch.bool else b"\xff" * dtype.itemsize


def _with_edges(args: Any, kwargs: Any) -> Any:
    """`torch.autograd.grad` needs no values of its inputs."""
    if "inputs" not in kwargs:
        args, kwargs = args[:1] + args[2:], kwargs | {"inputs": args[1]}
    inputs = kwargs["inputs"]

    def edge(tensor: Any) -> Any:
        if type(tensor) is not OffloadedParameter or not tensor.requires_grad:
            return tensor
        with torch._C.DisableTorchFunctionSubclass():
            return get_gradient_edge(tensor)

    return args, kwargs | {"inputs": tuple(map(edge, inputs)) if isinstance(inputs, tuple | list) else inputs}


def _properties(names: str, kind: str) -> set[Any]:
    return {getattr(getattr(torch.Tensor, name), kind) for name in names.split() if hasattr(torch.Tensor, name)}


_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_ADDRESSES = {getattr(torch.Tensor, name) for name in ("data_ptr", "untyped_storage", "storage")}
"""What gives out addresses: two parameters that are looked at one after the other have two."""
_PAST_COUNTERS = {
    torch.Tensor.data.__get__,  # type: ignore[attr-defined]
    *_ADDRESSES,
    torch.Tensor.numpy,
    torch.Tensor.__dlpack__,
}
"""What is given out by these can be changed without a version counter."""
_WITHOUT_VALUES = {
    *_properties(
        "shape dtype device grad requires_grad is_leaf grad_fn layout is_cuda is_cpu is_meta is_sparse is_sparse_csr "
        "is_quantized is_nested is_mkldnn is_mps is_xpu is_xla is_ipu is_maia is_mtia is_vulkan ndim names _version "
        "output_nr retains_grad itemsize nbytes name volatile _grad _grad_fn grad_dtype _backward_hooks "
        "_post_accumulate_grad_hooks",
        "__get__",
    ),
    *_properties(
        "grad requires_grad _grad grad_dtype _backward_hooks _post_accumulate_grad_hooks names",
        "__set__",
    ),
    *_properties("grad", "__delete__"),
    *(
        getattr(torch.Tensor, name)
        for name in (
            "size dim ndimension numel nelement element_size get_device is_floating_point is_complex is_signed "
            "is_inference is_conj is_neg is_same_size has_names register_hook retain_grad "
            "register_post_accumulate_grad_hook requires_grad_ __len__ __hash__ new_empty new_zeros new_ones new_full"
        ).split()
        if hasattr(torch.Tensor, name)
    ),
    torch.numel, torch.is_floating_point, torch.is_complex, torch.is_signed, torch.is_inference, torch.is_same_size,
    torch.is_tensor,
}  # fmt: skip
"""What asks for no value."""
