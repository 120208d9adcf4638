"""Tensors and files through the engine, with the faces of DeepSpeed's `aio_handle` and TensorNVMe's `DiskOffloader`.

Knows tensors and whose face it is; how bytes move is for `ssdtrain.io` to know.
"""

from ssdtrain.integrations.tensor_io.aio_handle import AioHandle
from ssdtrain.integrations.tensor_io.disk_offloader import DiskOffloader

__all__ = ["AioHandle", "DiskOffloader"]
