"""Every aten kernel that is registered for CUDA, overridden by the CPU's kernel in the current stream.

Shapes of results come from the same operator on the meta device. Where that does not know them (they depend on values),
or refuses, the stream is waited for and the operator runs at once: it then also raises what it would on the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from standin_gpu.own_kernels import OWN
from standin_gpu.streams import enqueue, raise_earlier_error, synchronize
from standin_gpu.views import CPU, host, on_host, on_meta

# What launches nothing, or only copies.
KEPT = {"empty", "empty_strided", "set_", "resize_", "record_stream", "_local_scalar_dense", "is_set_to", "is_pinned"}
KEPT |= {"_pin_memory", "_resize_output_", "_copy_from"}

# Whose results have other shapes on the CPU than on the meta device.
AT_ONCE = {"aten::_embedding_bag", "aten::_embedding_bag_forward_only"}


def install_kernels(library: torch.library.Library) -> None:
    """Overrides all of them."""
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        if namespace != "aten" or base in KEPT or not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
            continue
        op = getattr(getattr(torch.ops.aten, base), overload or "default")
        if any(a.alias_info is not None and not a.alias_info.is_write for a in op._schema.arguments):
            continue  # views
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there was a kernel
            library.impl(rest, Kernel(op, OWN.get(rest, op)), "CUDA", allow_override=True)


class Kernel:
    """One operator on the stand-in."""

    def __init__(self, op: torch._ops.OpOverload, compute: Callable[..., Any]) -> None:
        """`compute` does on CPU tensors what `op` does."""
        arguments = op._schema.arguments
        takes_numbers = torch._C._should_allow_numbers_as_tensors(op._schema.name.partition("::")[2])
        self.compute = (
            compute if takes_numbers else _with_tensors(compute, [str(a.type) == "Tensor" for a in arguments])
        )
        self.written = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
        self.names = [a.name for a in arguments]
        self.has_out = any(w and a.kwarg_only for w, a in zip(self.written, arguments, strict=True))
        self.is_random = "generator" in self.names or getattr(compute, "is_random", False)
        self.is_list = op._schema.name.startswith(("aten::_foreach", "aten::_fused", "aten::_amp_foreach"))
        self.num_returns = len(op._schema.returns)
        self.__name__ = op._schema.name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise_earlier_error()
        with torch._C.DisableTorchFunction():
            flat, spec = tree_flatten((args, kwargs))
            device = _device_of(flat)
            stream = torch.cuda.current_stream(device).cuda_stream
            if self.is_random:
                generator = kwargs.get("generator")
                own = torch.cuda.default_generators[device.index] if generator is None else generator
                kwargs = kwargs | {"generator": _host_generator(own)}
                flat, spec = tree_flatten((args, kwargs))
            if not any(self.written):
                return self._make(flat, spec, device, stream)
            writes = [a for a, w in zip(args, self.written, strict=False) if w]
            writes += [v for name, v in kwargs.items() if self.written[self.names.index(name)]]
            if self.has_out:
                return self._fill(flat, spec, stream, writes)
            return self._change(flat, spec, stream, writes)

    def _make(self, flat: list[Any], spec: TreeSpec, device: torch.device, stream: int) -> Any:
        """New tensors."""
        if self.__name__ in AT_ONCE:
            return self._make_now(flat, spec, device, stream)
        try:
            args, kwargs = tree_unflatten([on_meta(x) for x in flat], spec)
            shapes = self.compute(*args, **kwargs)
        except Exception:
            return self._make_now(flat, spec, device, stream)
        results = tree_map(lambda m: _like(m, device), shapes)
        args, kwargs = tree_unflatten([on_host(x) for x in flat], spec)
        targets = [host(r) if isinstance(r, torch.Tensor) else None for r in tree_flatten(results)[0]]

        def job() -> None:
            for target, value in zip(targets, tree_flatten(self.compute(*args, **kwargs))[0], strict=True):
                if target is not None:
                    target.copy_(value)

        enqueue(job, stream, self.__name__)
        return results

    def _make_now(self, flat: list[Any], spec: TreeSpec, device: torch.device, stream: int) -> Any:
        synchronize(stream)
        args, kwargs = tree_unflatten([on_host(x) for x in flat], spec)
        with torch.no_grad():
            results = self.compute(*args, **kwargs)
        return tree_map(lambda r: r.to(device) if isinstance(r, torch.Tensor) else r, results)

    def _change(self, flat: list[Any], spec: TreeSpec, stream: int, writes: list[Any]) -> Any:
        """Arguments in their place."""
        is_refused = False
        if not self.is_list:
            try:
                args, kwargs = tree_unflatten([on_meta(x) for x in flat], spec)
                self.compute(*args, **kwargs)
            except Exception:
                is_refused = True
        args, kwargs = tree_unflatten([on_host(x) for x in flat], spec)
        if is_refused:
            synchronize(stream)
            with torch.no_grad():
                self.compute(*args, **kwargs)
        else:
            enqueue(lambda: self.compute(*args, **kwargs), stream, self.__name__)
        return self._returned(writes)

    def _fill(self, flat: list[Any], spec: TreeSpec, stream: int, writes: list[Any]) -> Any:
        """`out=`: resized where it has to be, which takes knowing how."""
        outs, _ = tree_flatten(writes)
        args, kwargs = tree_unflatten([on_host(x) for x in flat], spec)
        if all(out.numel() for out in outs):
            enqueue(lambda: self.compute(*args, **kwargs), stream, self.__name__)
            return self._returned(writes)
        synchronize(stream)
        args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, (args, kwargs))
        with torch.no_grad():
            values, _ = tree_flatten(self.compute(*args, **kwargs))
        for out, value in zip(outs, values, strict=True):
            out.resize_(value.shape)
            out.copy_(value)
        return self._returned(writes)

    def _returned(self, writes: list[Any]) -> Any:
        if self.num_returns == 0:
            return None
        return writes[0] if self.num_returns == 1 else tuple(writes)


def _with_tensors(compute: Callable[..., Any], are_tensors: list[bool]) -> Callable[..., Any]:
    """A number that was wrapped for a kernel comes to Python as a number: not every operator takes it back."""

    def with_tensors(*args: Any, **kwargs: Any) -> Any:
        numbers = zip(args, are_tensors, strict=False)
        wrapped = [torch.tensor(a, device=CPU) if t and isinstance(a, int | float) else a for a, t in numbers]
        return compute(*wrapped, **kwargs)

    return with_tensors if any(are_tensors) else compute


def _device_of(flat: list[Any]) -> torch.device:
    for value in flat:
        if isinstance(value, torch.Tensor) and value.is_cuda:
            return value.device
    return torch.device("cuda", torch.cuda.current_device())


def _like(value: Any, device: torch.device) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)


def _host_generator(generator: torch.Generator) -> torch.Generator:
    """Numbers that follow from seed and offset alone, as Philox's do; the offset moves on."""
    if generator.device == CPU:
        return generator
    seed, offset = generator.initial_seed(), generator.get_offset()
    generator.set_offset(offset + 4)
    return torch.Generator(CPU).manual_seed((seed * 1000003 + offset) % (1 << 62))
