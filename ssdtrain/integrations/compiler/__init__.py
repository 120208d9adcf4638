"""`torch.compile` with reloads inside the backward graph, so that a compiled model is more than one step to memory.

Knows PyTorch's compiler and what is saved in an offload context; neither drives nor when bytes move.

Example:
    >>> from ssdtrain.integrations.compiler import compile_backend
    >>> model = torch.compile(model, backend=compile_backend())
    >>> with ssdtrain.offload_activations("/mnt/nvme"):
    ...     model(batch).sum().backward()
"""

from ssdtrain.integrations.compiler.backend import compile_backend

__all__ = ["compile_backend"]
