"""Tensors and files through the engine, by the calls of DeepSpeed's `aio_handle` and TensorNVMe's `DiskOffloader`.

The scenarios are those that the two try their own engines with; DeepSpeed's swapping and checkpoint writer use ours.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from drives import Drive
from engine_tools import descriptors, random_bytes

from ssdtrain.integrations.tensor_io import AioHandle, DiskOffloader

BLOCK, DEPTH, PARALLEL = 1024, 2, 2
NBYTES = 4 * BLOCK
JOBS = Path(__file__).parent


def tensor_of(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


@pytest.fixture(params=["io_uring", "threads"])
def handle(request: pytest.FixtureRequest) -> AioHandle:
    return AioHandle(BLOCK, DEPTH, True, False, PARALLEL, engine=request.param)


def buffers_of(handle: AioHandle, kind: str, num: int, nbytes: int = NBYTES) -> list[torch.Tensor]:
    if kind == "plain":
        return [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(num)]
    return [handle.new_cpu_locked_tensor(nbytes, torch.empty(0, dtype=torch.uint8)) for _ in range(num)]


# -- the handle --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("single_submit", [True, False])
@pytest.mark.parametrize("overlap_events", [True, False])
def test_it_says_what_it_was_made_with(single_submit: bool, overlap_events: bool) -> None:
    handle = AioHandle(BLOCK, DEPTH, single_submit, overlap_events, PARALLEL)
    assert handle.get_block_size() == BLOCK and handle.get_queue_depth() == DEPTH
    assert handle.get_single_submit() == single_submit and handle.get_overlap_events() == overlap_events
    assert handle.get_intra_op_parallelism() == PARALLEL and handle.get_alignment() == 512 * PARALLEL
    default = AioHandle()
    assert (default.get_block_size(), default.get_queue_depth(), default.get_intra_op_parallelism()) == (
        1 << 20,
        128,
        1,
    )


@pytest.mark.parametrize("kind", ["plain", "locked"])
@pytest.mark.parametrize("num", [1, 2, 3])
def test_reads(handle: AioHandle, tmp_path: Path, kind: str, num: int) -> None:
    """At once, or begun one after the other and waited for together."""
    contents = [random_bytes(NBYTES, i) for i in range(num)]
    for i, content in enumerate(contents):
        (tmp_path / str(i)).write_bytes(content)
    buffers = buffers_of(handle, kind, num)
    assert handle.sync_pread(buffers[0], str(tmp_path / "0"), 0) == 1
    assert bytes(buffers[0].tolist()) == contents[0]
    for i, buffer in enumerate(buffers):
        assert handle.async_pread(buffer.fill_(0), str(tmp_path / str(i)), 0) == 0
    assert handle.wait() == num
    assert [bytes(buffer.tolist()) for buffer in buffers] == contents
    assert [handle.free_cpu_locked_tensor(buffer) for buffer in buffers] == [kind == "locked"] * num


@pytest.mark.parametrize("kind", ["plain", "locked"])
@pytest.mark.parametrize("num", [1, 2, 3])
def test_writes(handle: AioHandle, tmp_path: Path, kind: str, num: int) -> None:
    buffers = buffers_of(handle, kind, num)
    for i, buffer in enumerate(buffers):
        buffer.copy_(tensor_of(random_bytes(NBYTES, i)))
    assert handle.sync_pwrite(buffers[0], str(tmp_path / "sync"), 0) == 1
    for i, buffer in enumerate(buffers):
        assert handle.async_pwrite(buffer, str(tmp_path / str(i)), 0) == 0
    assert handle.wait() == num
    for i, name in enumerate(["sync", *map(str, range(num))]):
        assert (tmp_path / name).read_bytes() == random_bytes(NBYTES, max(i - 1, 0))
    assert (tmp_path / "sync").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("partitions", [[1, 1, 1], [1, 1, 2], [1, 2, 1], [2, 1, 1]])
@pytest.mark.parametrize("by", ["name", "descriptor"])
def test_writes_at_an_offset(handle: AioHandle, tmp_path: Path, partitions: list[int], by: str) -> None:
    """The file is as long as what was written so far, after every wait."""
    path = tmp_path / "file"
    (buffer,) = buffers_of(handle, "locked", 1, sum(partitions) * BLOCK)
    buffer.copy_(tensor_of(random_bytes(len(buffer))))
    at = 0
    for blocks in partitions:
        source = torch.narrow(buffer, 0, at, blocks * BLOCK)
        if by == "name":
            assert handle.async_pwrite(buffer=source, filename=path, file_offset=at) == 0
            assert handle.wait() == 1
        else:
            fd = os.open(path, os.O_DIRECT | os.O_CREAT | os.O_WRONLY)
            assert handle.async_pwrite(buffer=source, fd=fd, file_offset=at) == 0
            assert handle.wait() == 1
            os.close(fd)
        at += blocks * BLOCK
        assert path.read_bytes() == random_bytes(len(buffer))[:at]


@pytest.mark.parametrize("partitions", [[1, 1, 1], [1, 2, 1], [2, 1, 1]])
def test_reads_at_an_offset(handle: AioHandle, tmp_path: Path, partitions: list[int]) -> None:
    path = tmp_path / "file"
    path.write_bytes(random_bytes(sum(partitions) * BLOCK))
    (buffer,) = buffers_of(handle, "locked", 1, sum(partitions) * BLOCK)
    at = 0
    for blocks in partitions:
        target = torch.narrow(buffer, 0, 0, blocks * BLOCK)
        assert handle.sync_pread(target, path, at) == 1
        assert bytes(target.tolist()) == path.read_bytes()[at : at + blocks * BLOCK]
        at += blocks * BLOCK


@pytest.mark.parametrize("nbytes", [0, 1, 513, 4099, 70_001])
def test_lengths_that_are_multiples_of_nothing(handle: AioHandle, tmp_path: Path, nbytes: int) -> None:
    """DeepSpeed's reports success for them and writes nothing."""
    path = tmp_path / "file"
    for call in (handle.sync_pwrite, lambda *a: handle.write(a[0], a[1], True)):
        call(tensor_of(random_bytes(nbytes)) if nbytes else torch.empty(0), path)
        assert path.read_bytes() == random_bytes(nbytes)
    back = torch.zeros(nbytes, dtype=torch.uint8)
    assert handle.read(back, path, True) == 0 and bytes(back.tolist()) == random_bytes(nbytes)
    assert handle.pread(back.fill_(1), path, True, True) == 0 and handle.wait() == 1
    assert bytes(back.tolist()) == random_bytes(nbytes)


def test_tensors_with_gaps_and_gradients(handle: AioHandle, tmp_path: Path) -> None:
    source = torch.randn(60, 50).t().requires_grad_()
    target = torch.zeros(60, 50).t().requires_grad_()
    handle.sync_pwrite(source, tmp_path / "file")
    handle.sync_pread(target, tmp_path / "file")
    assert torch.equal(source, target) and not target.is_contiguous()


def test_every_error_is_told(handle: AioHandle, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """DeepSpeed's ignores what the kernel answers. All operations are over when one has failed."""
    before = descriptors()
    (tmp_path / "short").write_bytes(random_bytes(5000))
    (tmp_path / "whole").write_bytes(random_bytes(NBYTES))
    with pytest.raises(FileNotFoundError):
        handle.sync_pread(torch.zeros(1), tmp_path / "missing")
    good = torch.zeros(NBYTES, dtype=torch.uint8)
    handle.async_pread(torch.zeros(6000, dtype=torch.uint8), tmp_path / "short", 100)
    handle.async_pread(torch.zeros(9000, dtype=torch.uint8), tmp_path / "short")
    handle.async_pread(good, tmp_path / "whole")
    with (
        caplog.at_level(logging.WARNING, "ssdtrain"),
        pytest.raises(OSError, match="6000 bytes at offset 100, got 4900"),
    ):
        handle.wait()
    assert "9000 bytes at offset 0, got 5000" in caplog.text
    assert bytes(good.tolist()) == random_bytes(NBYTES)
    assert handle.wait() == 0 and descriptors() <= before
    with pytest.raises(TypeError, match="Expected filename or fd"):
        handle.async_pwrite(good)


def test_a_full_drive(handle: AioHandle, small_tmpfs: Drive) -> None:
    handle.async_pwrite(torch.zeros(7 << 20, dtype=torch.uint8), small_tmpfs.directory / "file")
    with pytest.raises(OSError, match="No space") as caught:
        handle.wait()
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(small_tmpfs.directory / "file")


def test_locked_memory(handle: AioHandle) -> None:
    tensor = handle.new_cpu_locked_tensor(1000, torch.empty(0, dtype=torch.bfloat16))
    assert (tensor.numel(), tensor.dtype) == (1000, torch.bfloat16)
    assert handle.is_pinned(tensor) and handle.is_pinned(tensor[10:20]) and not handle.is_pinned(torch.zeros(10))
    assert handle.free_cpu_locked_tensor(tensor) and not handle.free_cpu_locked_tensor(tensor)
    assert not handle.is_pinned(tensor) and tensor.fill_(1).sum() == 1000  # its memory is whoever's that has it
    assert handle.new_cpu_locked_tensor(0, tensor).numel() == 0


# -- what DeepSpeed does with a handle ---------------------------------------------------------------------------------


@pytest.mark.needs_package("deepspeed")
def test_deepspeed_swaps_and_writes_checkpoints_with_it(tmp_path: Path) -> None:
    path = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", JOBS / "aio_worker.py", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and result.stdout.endswith("all is equal\n"), result.stderr


# -- the offloader -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["uring", "aio", "pthread"])
def offloader(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DiskOffloader]:
    yield DiskOffloader(tmp_path / "new", backend=request.param)
    assert not list((tmp_path / "new").iterdir())


def nbytes_of(*tensors: torch.Tensor) -> list[int]:
    return [tensor.untyped_storage().nbytes() for tensor in tensors]


def test_one_tensor(offloader: DiskOffloader) -> None:
    x = torch.rand(2, 2)
    copy = x.clone()
    for read in (offloader.sync_read, offloader.async_read):
        with pytest.raises(RuntimeError, match="written together"):
            read(x)
    for _ in range(2):
        offloader.sync_write(x)
        assert nbytes_of(x) == [0]
        offloader.sync_read(x)
        assert torch.equal(x, copy)
        offloader.async_write(x)
        offloader.sync_write_events()
        assert nbytes_of(x) == [0]
        offloader.async_read(x)
        offloader.sync_read_events()
        assert torch.equal(x, copy)


def test_several_as_one(offloader: DiskOffloader) -> None:
    x, y = torch.rand(2, 2), torch.rand(100, 200, 2)
    copies = x.clone(), y.clone()
    with pytest.raises(RuntimeError):
        offloader.sync_readv([x, y])
    offloader.sync_writev([x, y])
    assert nbytes_of(x, y) == [0, 0]
    for wrong in ([y, x], [x], [y]):
        for read in (offloader.sync_readv, offloader.async_readv):
            with pytest.raises(RuntimeError, match="in this order"):
                read(wrong)
    assert nbytes_of(x, y) == [0, 0]
    offloader.sync_readv([x, y])
    assert torch.equal(x, copies[0]) and torch.equal(y, copies[1])
    offloader.async_writev([x, y])
    offloader.async_readv([x, y])
    offloader.synchronize()
    assert torch.equal(x, copies[0]) and torch.equal(y, copies[1])


def test_callbacks_come_when_bytes_are_there(offloader: DiskOffloader) -> None:
    events: list[object] = []
    x = torch.rand(300_000)
    copy = x.clone()
    offloader.async_write(x, lambda: events.append(nbytes_of(x)))
    offloader.sync_write_events()
    offloader.async_read(x, lambda: events.append(torch.equal(x, copy)))
    offloader.sync_read_events()
    assert events == [[0], True]


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("is_vector", [False, True])
def test_an_optimizer_whose_state_is_away(offloader: DiskOffloader, prefetch: int, is_vector: bool) -> None:
    """Moments of Adam are read before each parameter's update and written after it, or some parameters ahead."""
    torch.manual_seed(0)
    sizes = [3, 1000, 17, 5000, 256, 40_000, 1]
    weights = [torch.randn(n) for n in sizes]
    plain = [w.clone() for w in weights]
    moments = [(torch.zeros(n), torch.zeros(n)) for n in sizes]
    plain_moments = [(torch.zeros(n), torch.zeros(n)) for n in sizes]

    def update(w: torch.Tensor, own: tuple[torch.Tensor, torch.Tensor]) -> None:
        own[0].mul_(0.9).add_(w, alpha=0.1)
        own[1].mul_(0.999).addcmul_(w, w, value=0.001)
        w.addcdiv_(own[0], own[1].sqrt().add_(1e-8), value=-1e-3)

    def move(own: tuple[torch.Tensor, ...], one: Any, vector: Any) -> None:
        vector(list(own)) if is_vector else [one(tensor) for tensor in own]

    for own in moments:
        move(own, offloader.sync_write, offloader.sync_writev)
    for _ in range(3):
        for own in moments[:prefetch]:
            move(own, offloader.sync_read, offloader.sync_readv)
        for i, own in enumerate(moments):
            if not prefetch:
                move(own, offloader.sync_read, offloader.sync_readv)
            elif i % prefetch == 0:
                offloader.sync_read_events()
                for ahead in moments[i + prefetch : i + 2 * prefetch]:
                    move(ahead, offloader.async_read, offloader.async_readv)
            update(weights[i], own)
            update(plain[i], plain_moments[i])
            move(own, offloader.async_write, offloader.async_writev)
        offloader.synchronize()
        assert all(nbytes_of(*own) == [0, 0] for own in moments)
    assert all(torch.equal(a, b) for a, b in zip(weights, plain, strict=True))


def test_tensors_that_cannot_go(offloader: DiskOffloader) -> None:
    for tensor, words in (
        (torch.rand(10)[2:], "got a view"),
        (torch.rand(10)[:5], "got a view"),
        (torch.empty(0), "got one without"),
        (tensor_of(b"abc"), "memory is PyTorch's"),
        (torch.rand(3, device="meta"), "in host memory, got one on meta"),
    ):
        with pytest.raises(ValueError, match=words):
            offloader.sync_write(tensor)
    x = torch.rand(1 << 20)
    with pytest.raises(RuntimeError, match="on their way"):
        offloader.async_writev([x, x])
    offloader.sync_write(x)
    with pytest.raises(ValueError, match="got one without"):
        offloader.sync_write(x)
    with pytest.raises(ValueError, match="Expected a backend among"):
        DiskOffloader(".", backend="mmap")


def test_parameter_and_data_are_one(offloader: DiskOffloader) -> None:
    parameter = torch.nn.Parameter(torch.rand(50, 60).t())
    copy = parameter.detach().clone()
    offloader.sync_write(parameter.data)
    gc.collect()
    offloader.sync_read(parameter)
    assert torch.equal(parameter, copy)


def test_what_cannot_be_written_stays(small_tmpfs: Drive) -> None:
    """A full drive costs an error and no byte; room of tensors that died is used again."""
    offloader = DiskOffloader(small_tmpfs.directory)
    small, large = torch.rand(1 << 18), torch.rand(7 << 18)
    copies = small.clone(), large.clone()
    called: list[int] = []

    def write() -> None:
        """Fails in whichever is called when it is known."""
        offloader.async_write(large, lambda: called.append(1))
        offloader.sync_write_events()

    with pytest.raises(OSError, match="No space"):
        write()
    assert torch.equal(large, copies[1]) and not called
    for _ in range(10):
        dying = torch.rand(1 << 20)
        offloader.sync_write(dying)
        del dying
    offloader.sync_write(small)
    offloader.sync_read(small)
    assert torch.equal(small, copies[0])
