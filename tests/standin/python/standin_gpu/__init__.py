"""Kernels for the stand-in GPU: what PyTorch asks of a CUDA device is computed by host callbacks in its streams.

Installed by `sitecustomize.py` as soon as `torch` is imported. Tests use:

    enqueue(gate.wait)   lets the current stream do something, or hold still
    host(tensor)         a CPU tensor on the bytes of a CUDA tensor
    counts()             what the driver saw: copies, copies refused, calls that broke a capture
    errors               what callbacks raised; the next kernel raises it too
"""

from __future__ import annotations

import torch

from standin_gpu.copies import install_copies
from standin_gpu.kernels import install_kernels
from standin_gpu.streams import counts, enqueue, errors, install_emptying, synchronize
from standin_gpu.views import host

__all__ = ["counts", "enqueue", "errors", "host", "install", "synchronize"]


def install() -> None:
    """Overrides PyTorch's kernels. Libraries that bring kernels of their own are switched off."""
    torch.backends.cudnn.enabled = False
    for switch in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{switch}_sdp")(False)  # what is left is made of plain operators
    library = torch.library.Library("aten", "IMPL", "CUDA")
    install_kernels(library)
    install_copies(library)
    install_emptying()
    _installed.append(library)  # which would take its kernels along


_installed: list[torch.library.Library] = []
