"""Whatever device PyTorch makes tensors on by default: host memory stays host memory."""

from __future__ import annotations

from pathlib import Path

import torch

from ssdtrain.store.file_backed import mapped_copy
from ssdtrain.store.identity import ViewSpec


def test_a_mapped_copy_is_in_host_memory(tmp_path: Path) -> None:
    """It was made on the default device, which a storage in host memory does not fit."""
    tensor = torch.arange(4096.0)
    spec = ViewSpec(tensor.dtype, tensor.size(), tensor.stride(), 0)
    for directory in (None, str(tmp_path)):
        with torch.device("meta"):
            copy = mapped_copy(tensor, spec, directory)
        assert copy.is_cpu and torch.equal(copy, tensor)
