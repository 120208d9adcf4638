"""`Tensor.copy_` to, from and on the stand-in: by the driver's copies, as PyTorch does it. Nobody waits with the GIL.

Layouts and dtypes are changed on the side where CUDA would do it: in the stream, before a copy out, after a copy in.
"""

from __future__ import annotations

import ctypes
import warnings

import torch

from standin_gpu.streams import check, enqueue, library, raise_earlier_error, synchronize
from standin_gpu.views import CPU, host

_ANY_KIND = 4  # cudaMemcpyDefault


def install_copies(aten: torch.library.Library) -> None:
    """Overrides `copy_`."""
    original = torch.library.get_kernel("aten::copy_", "CUDA")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def copy_(self: torch.Tensor, src: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        raise_earlier_error()
        with torch._C.DisableTorchFunction():
            if self.numel() == 0 or (self.data_ptr() == src.data_ptr() and _is_same_layout(self, src)):
                return self
            src = src.expand(self.size())
            if self.is_cuda and src.is_cuda:
                return _copy_on_device(self, src)
            on_host = self if src.is_cuda else src
            if _is_same_layout(self, src) and non_blocking and on_host.is_pinned():
                return original.call_boxed(keys, self, src, True)  # which the pinned memory's allocator hears of
            return _copy_in(self, src) if self.is_cuda else _copy_out(self, src)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there was a kernel
        aten.impl("copy_", copy_, "CUDA", allow_override=True)


def _is_same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the bytes of one, from first to last, are those of the other."""
    is_same = (a.dtype, a.size(), a.stride()) == (b.dtype, b.size(), b.stride())
    is_same = is_same and (a.is_conj(), a.is_neg()) == (b.is_conj(), b.is_neg())
    return is_same and torch.ops.aten.is_non_overlapping_and_dense(a)


def _copy_on_device(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """In the source's stream; the target's is waited for before and waits after."""
    streams = [torch.cuda.current_stream(t.device) for t in (source, target)]
    if target.device != source.device:
        streams[0].wait_stream(streams[1])
    to, from_ = host(target), host(source)
    enqueue(lambda: to.copy_(from_), streams[0].cuda_stream)
    if target.device != source.device:
        streams[1].wait_stream(streams[0])
    return target


def _copy_in(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    stream = torch.cuda.current_stream(target.device).cuda_stream
    if _is_same_layout(target, source):
        _copy_bytes(target, source, stream)
        return target
    there = torch.empty(target.size(), dtype=target.dtype, device=target.device)
    _copy_bytes(there, source.to(target.dtype).resolve_conj().resolve_neg().contiguous(), stream)
    return _copy_on_device(target, there)


def _copy_out(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    stream = torch.cuda.current_stream(source.device).cuda_stream
    if _is_same_layout(target, source):
        _copy_bytes(target, source, stream)
        return target
    there = torch.empty(target.size(), dtype=target.dtype, device=source.device)
    _copy_on_device(there, source)
    here = torch.empty(target.size(), dtype=target.dtype, device=CPU)
    _copy_bytes(here, there, stream)
    return target.copy_(here)


def _copy_bytes(target: torch.Tensor, source: torch.Tensor, stream: int) -> None:
    pointers = ctypes.c_void_p(target.data_ptr()), ctypes.c_void_p(source.data_ptr())
    nbytes = ctypes.c_size_t(target.nbytes)
    check(library.cudaMemcpyAsync(*pointers, nbytes, _ANY_KIND, ctypes.c_void_p(stream)))
    synchronize(stream)
