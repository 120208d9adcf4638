"""Bytes, files and requests: engines, which try again and report what failed, and spill files. Knows no tensors.

Training uses spill files. The names here are for whoever has files of their own:

    >>> with FileEngine() as engine, engine.open("/mnt/nvme/weights.bin") as file:
    ...     file.read(buffer, offset=4096).result()
"""

from ssdtrain.io.named.files import File, FileEngine
from ssdtrain.io.named.memory import PinnedBuffer
from ssdtrain.io.named.request import Request

__all__ = ["File", "FileEngine", "PinnedBuffer", "Request"]
