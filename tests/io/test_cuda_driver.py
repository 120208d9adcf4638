"""The CUDA driver of the engine, on a library that plays libcuda: what it asks for, in which order, and its errors.

The library's device memory kills whoever touches it as host memory; copies are done at once, so that order is read from
the library's log. Numbers on a real device are in `test_cuda.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ssdtrain._C", reason="the driver is in the extension")

PROGRAM = """
import ctypes, sys, tempfile
from ssdtrain import _C

cuda = ctypes.CDLL("libcuda.so.1")
cuda.stub_log.restype = ctypes.c_char_p
SLAB = 64 * 1024


def device_memory(content):
    address = ctypes.c_uint64()
    assert cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(len(content))) == 0
    to_device(address.value, content)
    return address.value


def to_device(address, content):
    assert cuda.cuMemcpyAsync(ctypes.c_uint64(address), ctypes.c_uint64(ctypes.cast(content, ctypes.c_void_p).value),
                              ctypes.c_size_t(len(content)), None) == 0


def from_device(address, nbytes):
    buffer = ctypes.create_string_buffer(nbytes)
    assert cuda.cuMemcpyAsync(ctypes.c_uint64(ctypes.addressof(buffer)), ctypes.c_uint64(address),
                              ctypes.c_size_t(nbytes), None) == 0
    return buffer.raw


driver = _C.CudaDriver(0)
file = _C.SpillFile(sys.argv[1])
file.grow(16 << 20)
engine = _C.Engine("threads", [file], 8 * SLAB, SLAB, checksum=True, host_nbytes=1 << 20)
COMPUTE = 7  # the stream that computes, by its handle
"""

ROUND_TRIP = """
assert engine.add_device(driver) == ""
engine.grow_host(1 << 20)
content = bytes(range(256)) * 1100 + b"the end"
source = device_memory(content)
for place in (0, 1):  # the file, the host tier
    block = -(-len(content) // 4096) * 4096
    write = engine.write(place, 0, block, [(source, len(content), 0)], _C.Fence(driver, COMPUTE))
    write.wait()
    assert write.error is None and write.is_issued and not write.is_lost
    target = device_memory(bytes(len(content)))
    read = engine.read(write, 0, target, len(content), _C.Fence(driver, COMPUTE))
    assert read.wait_issued(30)
    read.make_wait(COMPUTE)
    assert read.wait(30) and read.error is None, read.error
    assert from_device(target, len(content)) == content
engine.close()
log = [line.split() for line in cuda.stub_log().decode().splitlines()]
"""

ORDER = """
# Every stream that copies has waited for an event of the compute stream, since its last copy was begun for a request;
# every copy is followed by an event that the compute stream waits for in the end.
recorded = {line[2]: line[1] for line in log if line[0] == "record"}
copying = {line[1] for line in log if line[0] in ("out", "in")}
assert len(copying) == 2 and all(line[1] in copying for line in log if line[0] in ("out", "in"))
for stream in copying:
    told = [line for line in log if line[1] == stream]
    assert told[0][0] == "wait", told[:3]
    for before, after in zip(told, told[1:]):
        assert after[0] != "in" or before[0] == "wait", "a copy in waits for its destination"
        assert before[0] not in ("out", "in") or after[0] in ("record", "out"), "a copy is followed by an event"
last = [line for line in log if line[0] == "wait" and int(line[1], 16) == COMPUTE]
assert len(last) == 2, "the compute stream waits for each reload"
print("right")
"""

FAILING_COPY = """
assert engine.add_device(driver) == ""
source = 1 << 40  # never touched: every copy fails
write = engine.write(0, 0, 4096, [(source, 4096, 0)], _C.Fence(driver, COMPUTE))
write.wait()
assert write.is_lost and write.error is not None
read = engine.read(write, 0, source, 4096, _C.Fence(driver, COMPUTE))
assert read.wait(30)
assert "could not be copied from the device" in read.error[3], read.error
engine.close()
print("right")
"""

UNPINNED = """
assert "cuMemHostRegister: CUDA_ERROR_STUB" in engine.add_device(driver)
engine.close()
print("right")
"""


def run(libcuda_stub: Path, tmp_path: Path, program: str, **environment: str) -> None:
    path = os.pathsep.join(part for part in sys.path if part)
    own = {"LD_LIBRARY_PATH": str(libcuda_stub.parent), "PYTHONPATH": path} | environment
    command = [sys.executable, "-c", PROGRAM + program, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "right\n", done.stderr


def test_bytes_and_order(libcuda_stub: Path, tmp_path: Path) -> None:
    """Law 8: a copy out waits for the producer, a copy in for the allocation, the consumer for the copy."""
    run(libcuda_stub, tmp_path, ROUND_TRIP + ORDER)


def test_a_copy_that_fails(libcuda_stub: Path, tmp_path: Path) -> None:
    run(libcuda_stub, tmp_path, FAILING_COPY, STUB_COPY_ERROR="700")


def test_memory_that_cannot_be_pinned(libcuda_stub: Path, tmp_path: Path) -> None:
    run(libcuda_stub, tmp_path, UNPINNED, STUB_REGISTER_ERROR="2")


def test_no_cuda_here() -> None:
    """The extension imports without CUDA, and says what is missing when asked for it."""
    program = "from ssdtrain.io.open_engine import cuda_driver\ntry: cuda_driver(0)\nexcept RuntimeError as e: print(e)"
    environment = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
    path = os.pathsep.join(part for part in sys.path if part)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Expected the CUDA driver, got: libcuda.so.1" in done.stdout or done.stdout == ""
