"""What DeepSpeed does with an `aio_handle`, on ours: the swapping of ZeRO-Infinity, and its checkpoint writer."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from deepspeed.io import FastFileWriter, FastFileWriterConfig, fast_file_writer
from deepspeed.io.utils import tensor_to_bytes
from deepspeed.runtime.swap_tensor.async_swapper import AsyncTensorSwapper
from deepspeed.runtime.swap_tensor.utils import SwapBufferPool, swap_in_tensors, swap_out_tensors
from engine_tools import descriptors, random_bytes

from ssdtrain.integrations.tensor_io import AioHandle

NUMEL = 64 * 1024
BLOCK = 1024


def swap(folder: Path) -> None:
    """Gradients go out through two buffers, a pool brings them back, and takes them out again."""
    handle = AioHandle(64 * 1024, 8, False, True, 1)
    torch.manual_seed(0)
    tensors = [torch.randn(n) for n in (1000, 30_000, 7, 65_536, 20_000)]
    paths = [str(folder / f"{i}.tensor.swp") for i in range(len(tensors))]
    swapper = AsyncTensorSwapper(aio_handle=handle, numel_alignment=256, timers=None)
    swapper._report_statistics = lambda message: None  # asks a process group for its rank
    swapper.add_buffers([handle.new_cpu_locked_tensor(NUMEL, torch.empty(0)) for _ in range(2)])
    swapper.swap_out_tensors(tensors, paths)
    assert len(swapper.release_buffers()) == 2

    pool = SwapBufferPool([handle.new_cpu_locked_tensor(3 * NUMEL, torch.empty(0))], handle)
    found = [
        pool.allocate_tensor(tensor.numel(), path, -(-tensor.numel() // 256) * 256)
        for tensor, path in zip(tensors, paths, strict=True)
    ]
    swap_in_tensors(handle, [swapped for swapped, _ in found], paths)
    assert handle.wait() == len(tensors)
    assert all(torch.equal(own, tensor) for (_, own), tensor in zip(found, tensors, strict=True))
    swap_out_tensors(handle, [own.mul_(2) for _, own in found], paths)
    assert handle.wait() == len(tensors)
    for tensor, path in zip(tensors, paths, strict=True):
        assert torch.equal(torch.from_file(path, size=tensor.numel()), 2 * tensor)


def write_checkpoint(path: Path, nbytes: int) -> None:
    """By descriptor, through the halves of a pinned tensor; no descriptor is left."""
    # Casts lists of tensors, of which there are none here; DeepSpeed has none of it for the CPU.
    fast_file_writer.UtilsBuilder = lambda: SimpleNamespace(load=lambda: SimpleNamespace(cast_to_byte_tensor=None))
    handle = AioHandle(BLOCK, 2, False, False, 1)
    pinned = handle.new_cpu_locked_tensor(4 * BLOCK, torch.empty(0, dtype=torch.uint8))
    before = descriptors()
    config = FastFileWriterConfig(
        dnvme_handle=handle, pinned_tensor=pinned, double_buffer=True, num_parallel_writers=1, writer_rank=0
    )
    writer = FastFileWriter(file_path=str(path), config=config)
    content = random_bytes(nbytes)
    writer.write(tensor_to_bytes(torch.frombuffer(bytearray(content), dtype=torch.uint8)))
    writer.close()
    assert path.read_bytes() == content
    assert descriptors() == before


if __name__ == "__main__":
    swap(Path(sys.argv[1]))
    for size in (BLOCK, BLOCK + 7, 10 * BLOCK + 1):
        write_checkpoint(Path(sys.argv[1]) / f"checkpoint-{size}", size)
    print("all is equal")
