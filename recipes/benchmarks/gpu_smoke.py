"""The first minute on a GPU: facts about this machine and this driver that decide how ssdtrain behaves on it.

    python recipes/benchmarks/gpu_smoke.py RESULT.json [--toy]

Every part stands alone: one that fails leaves its error in its place, and the file is written anew after each, so that
whatever ends the run leaves what was found. `--toy`: small copies, for rehearsals.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

MIB = 1 << 20
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE
LIBRARY = Path(__file__).parents[2] / "csrc/cuda_library.cpp"


class Smoke:
    """Runs the parts and keeps what they found."""

    def __init__(self, result: Path, *, is_toy: bool) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.copy_nbytes = MIB if is_toy else 256 * MIB
        self.sequence = 16 if is_toy else 512
        self._result = result
        self._found: dict[str, Any] = {}

    def run(self, part: Callable[[Smoke], Any]) -> None:
        """One part; what it raises is what it found."""
        begin = time.monotonic()
        try:
            found = part(self)
        except Exception as error:
            found = f"{type(error).__name__}: {str(error)[:300]}"
        self._found[part.__name__] = {"found": found, "seconds": round(time.monotonic() - begin, 2)}
        print(part.__name__, found, flush=True)
        self._result.write_text(json.dumps(self._found, indent=1))

    def copy_out(self, host: int, device: int, nbytes: int, stream: int = 0) -> int:
        """Queues a copy to host memory; the driver's code."""
        arguments = ctypes.c_void_p(host), ctypes.c_uint64(device), ctypes.c_size_t(nbytes), ctypes.c_void_p(stream)
        return int(self.cuda.cuMemcpyDtoHAsync_v2(*arguments))

    def copy_in(self, host: int, device: int, nbytes: int, stream: int = 0) -> int:
        """Queues a copy from host memory; the driver's code."""
        arguments = ctypes.c_uint64(device), ctypes.c_void_p(host), ctypes.c_size_t(nbytes), ctypes.c_void_p(stream)
        return int(self.cuda.cuMemcpyHtoDAsync_v2(*arguments))

    def register(self, address: int, nbytes: int) -> int:
        """Pins host memory; the driver's code."""
        arguments = ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_uint(PORTABLE)
        return int(self.cuda.cuMemHostRegister_v2(*arguments))


def _region(nbytes: int) -> tuple[mmap.mmap, int]:
    """As the host tier has it: private, and room for it is not reserved."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    region = mmap.mmap(-1, nbytes, flags=flags)
    return region, ctypes.addressof(ctypes.c_char.from_buffer(region))


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError as error:
        return str(error)


def facts(smoke: Smoke) -> dict[str, Any]:
    """Memory and its limits, file systems, the driver."""
    memory = {line.split(":")[0]: line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines()}
    return {
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
        "memory_kib": {name: int(memory[name]) for name in ("MemTotal", "MemAvailable")},
        "overcommit": _text("/proc/sys/vm/overcommit_memory"),
        "cgroup_limit": _text("/sys/fs/cgroup/memory.max"),
        "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK),
        "huge_pages": _text("/sys/kernel/mm/transparent_hugepage/enabled"),
        "kernel": os.uname().release,
        "cores": os.cpu_count(),
        "file_systems": _output("df", "-hT", "/tmp", "."),
        "nvidia_smi": _output("nvidia-smi"),
    }


def driver_functions(smoke: Smoke) -> dict[str, Any]:
    """Whether the driver has every function that the extension looks up by name, and its version."""
    version = ctypes.c_int()
    smoke.cuda.cuDriverGetVersion(ctypes.byref(version))
    names = re.findall(r'find\(library, "(\w+)"', LIBRARY.read_text())
    return {
        "version": version.value,
        "looked_up": len(names),
        "missing": [n for n in names if not hasattr(smoke.cuda, n)],
    }


def gpudirect(smoke: Smoke) -> dict[str, Any]:
    """What GPUDirect Storage would need: cuFile, its kernel module, and udev's data."""
    paths = ("/proc/driver/nvidia-fs/version", "/etc/cufile.json", "/run/udev/data")
    found: dict[str, Any] = {path: Path(path).exists() for path in paths}
    try:
        ctypes.CDLL("libcufile.so.0")
        found["libcufile"] = "on the loader's path"
    except OSError as error:
        found["libcufile"] = str(error)
    return found


def host_memory_that_grows(smoke: Smoke) -> dict[str, int]:
    """Whether available memory falls by what is touched, or grows meanwhile."""

    def available_kib() -> int:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))

    before = available_kib()
    region, _ = _region(4 * smoke.copy_nbytes)
    for at in range(0, len(region), 4096):
        region[at] = 1
    return {"touched_kib": len(region) >> 10, "before_kib": before, "after_kib": available_kib()}


def copy_across_two_registrations(smoke: Smoke) -> dict[str, Any]:
    """Host memory pinned in steps: may one copy cross two of them?"""
    nbytes = 8 * MIB
    region, address = _region(nbytes)
    source = torch.ones(nbytes, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    codes = [smoke.register(address, nbytes // 2), smoke.register(address + nbytes // 2, nbytes // 2)]
    code = smoke.copy_out(address + nbytes // 4, source.data_ptr(), nbytes // 2)
    torch.cuda.synchronize()
    arrived = region[nbytes // 2] == 1
    return {"register": codes, "copy": code, "arrived": arrived, "meaning": "1: CUDA_ERROR_INVALID_VALUE, split copies"}


def event_query_of_another_thread_in_capture(smoke: Smoke) -> dict[str, Any]:
    """Does a thread that asks for an event break the capture of another one, and does the relaxed mode cure it?

    The last part: a capture that broke leaves PyTorch on the stream of it.
    """
    event = torch.cuda.Event()
    event.record()
    torch.cuda.synchronize()
    handle = ctypes.c_void_p(event.cuda_event)
    x = torch.zeros(8, device="cuda")
    found: dict[str, Any] = {}
    for is_relaxed in (True, False):
        codes: list[int] = []

        def ask(is_relaxed: bool = is_relaxed, codes: list[int] = codes) -> None:
            if is_relaxed:
                smoke.cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(RELAXED)))
            context = ctypes.c_void_p()
            smoke.cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
            smoke.cuda.cuCtxPushCurrent_v2(context)
            codes += [smoke.cuda.cuEventQuery(handle), smoke.cuda.cuEventSynchronize(handle)]

        outcome = "fine"
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                x.add_(1)
                other = threading.Thread(target=ask)
                other.start()
                other.join()
                x.add_(1)
        except RuntimeError as error:
            outcome = str(error).splitlines()[0]
        found["relaxed" if is_relaxed else "global"] = {"codes": codes, "capture": outcome}
    return found


def attention_backward_twice(smoke: Smoke) -> dict[str, list[bool]]:
    """Whether backward of attention gives the same bits again, as it is and with deterministic algorithms."""
    q = torch.randn(8, 8, smoke.sequence, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def once() -> torch.Tensor:
        q.grad = None
        F.scaled_dot_product_attention(q, q, q, is_causal=True).float().square().mean().backward()
        assert q.grad is not None
        return q.grad.clone()

    found = {}
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for name, is_strict in (("plain", False), ("strict", True)):
        torch.use_deterministic_algorithms(is_strict)
        try:
            first = once()
            found[name] = [torch.equal(once(), first) for _ in range(8)]
        finally:
            torch.use_deterministic_algorithms(False)
    return found


def external_stream_0(smoke: Smoke) -> str:
    """What `torch.cuda.ExternalStream(0)` is: the default stream has handle 0."""
    return hex(torch.cuda.ExternalStream(0).cuda_stream)


def link(smoke: Smoke) -> dict[str, Any]:
    """GB/s to host memory that PyTorch pinned and that was registered, at several sizes of copies."""
    nbytes = smoke.copy_nbytes
    source = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    _keep, address = _region(nbytes)
    begin = time.perf_counter()
    code = smoke.register(address, nbytes)
    found: dict[str, Any] = {"register": code, "register_gbs": nbytes / (time.perf_counter() - begin) / 1e9}
    stream = torch.cuda.current_stream().cuda_stream
    for name, host in (("pinned", pinned.data_ptr()), ("registered", address)):
        for chunk in (4 * MIB, 32 * MIB, nbytes):
            for way, copy in (("out", smoke.copy_out), ("in", smoke.copy_in)):
                for _ in range(2):  # the first one warms up
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    for at in range(0, nbytes, chunk):
                        copy(host + at, source.data_ptr() + at, min(chunk, nbytes - at), stream)
                    torch.cuda.synchronize()
                    seconds = time.perf_counter() - begin
                found[f"{name}, {chunk // MIB} MiB, {way}, GB/s"] = nbytes / seconds / 1e9
    return found


PARTS = (
    facts,
    driver_functions,
    gpudirect,
    host_memory_that_grows,
    copy_across_two_registrations,
    attention_backward_twice,
    external_stream_0,
    link,
    event_query_of_another_thread_in_capture,
)


def main() -> None:
    """Runs all parts."""
    torch.ones(1, device="cuda")  # a context
    smoke = Smoke(Path(sys.argv[1]), is_toy="--toy" in sys.argv)
    for part in PARTS:
        smoke.run(part)


if __name__ == "__main__":
    main()
