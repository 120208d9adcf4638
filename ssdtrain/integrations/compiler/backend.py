"""`compile_backend`: PyTorch's own backends, with a partitioner that edits what its own has made.

Knows how backends are called, and which PyTorch has what they need; what is edited is in `partition`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from ssdtrain.policy.sizes import Size, parse_nbytes

Backend = Callable[..., Callable[..., Any]]

_BACKENDS = ("inductor", "aot_eager")


def compile_backend(name: str = "inductor", *, min_nbytes: Size = "1MiB") -> Backend:
    """A backend for `torch.compile` that has what the compiled model saves offloaded inside `offload_activations`.

    To autograd a compiled model is one operator: all that it has saved comes back at once in backward, and the peak of
    memory does not fall. Here each tensor comes back where the backward graph first uses it. Results are those of the
    same backend of PyTorch, to the bit. Outside a context nothing moves.

    Args:
        name: ``"inductor"``, PyTorch's default, or ``"aot_eager"``, which runs PyTorch's own kernels. Inductor takes
            `mode` and `options` of `torch.compile`, those without CUDA graphs, and reuses no memory in place.
        min_nbytes: what the compiled model saves that is smaller stays where it is. No smaller than the policy's, which
            counts too.

    Returns:
        What `torch.compile` takes as `backend`.

    Raises:
        ValueError: another backend, or no size.
        RuntimeError: this PyTorch lacks what the backend needs.

    Example:
        >>> model = torch.compile(model, backend=compile_backend())
        >>> with ssdtrain.offload_activations("/mnt/nvme"):
        ...     model(batch).sum().backward()
    """
    if name not in _BACKENDS:
        raise ValueError(f"Expected a backend among {', '.join(_BACKENDS)}, got {name!r}; compile blocks with others")
    number = parse_nbytes(min_nbytes)
    if not isinstance(number, int) or number < 0:
        raise ValueError(f"Expected a size such as 1048576 or '16MiB', got {min_nbytes!r}")
    try:
        return _backend(name, number)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            "Expected a PyTorch whose compiler lets a backend edit its graphs, as 2.9 to 2.14 do, got "
            f"{torch.__version__}: {error}. Compile every block instead: block.compile()"
        ) from error


def _backend(name: str, min_nbytes: int) -> Backend:
    if name == "inductor":
        from ssdtrain.integrations.compiler.inductor import Partitioner, inductor

        partitioner = Partitioner(min_nbytes)

        def ssdtrain_inductor(gm: fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
            return inductor(partitioner, gm, inputs, **options)

        return ssdtrain_inductor

    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop

    from ssdtrain.integrations.compiler.partition import partition

    def ssdtrain_aot_eager(gm: fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        backend = aot_autograd(
            fw_compiler=boxed_nop,
            bw_compiler=boxed_nop,
            partition_fn=partial(partition, min_nbytes=min_nbytes),
            keep_inference_input_mutations=True,
        )
        return backend(gm, inputs, **options)

    return ssdtrain_aot_eager
