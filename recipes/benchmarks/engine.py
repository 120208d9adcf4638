"""How much of the drive's bandwidth the engines reach, with fio on the same directory as the ceiling.

    python recipes/benchmarks/engine.py /mnt/nvme
    python recipes/benchmarks/engine.py /mnt/nvme --request-mib 1 4 8 --depth 8 32 --repeats 7

Same file, request size and depth on both sides, direct I/O, huge pages for the buffers (a drive behind a hypervisor
may read at half the speed into small pages), everything written once before. The runs of one comparison alternate (fio,
io_uring, threads, fio, ...); speeds are medians, and the fraction is the median over the repeats of a run against the
fio run of the same repeat, as drives drift. fio writes from and reads to a few buffers of its own, registered with the
kernel; the engines copy the source into a slab first, as in training, and read into as much memory as they wrote from.
Seconds of processor time per GB stand beside: on a busy machine they matter as much.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ssdtrain.io.engine import Read
from ssdtrain.io.open_engine import EngineChoice, open_engine

MIB = 1 << 20


@dataclass(frozen=True)
class Run:
    """One pass over the file."""

    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Row:
    """One engine, direction, request size and depth."""

    direction: str
    request_mib: float
    depth: int
    engine: str
    gb_per_second: float
    cpu_seconds_per_gb: float
    fraction_of_fio: float


class Memory:
    """Page-aligned memory that is really there."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_HUGEPAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.fill()

    def fill(self) -> None:
        """Bytes that no drive compresses."""
        pattern = os.urandom(MIB)
        for start in range(0, len(self._map), MIB):
            stop = min(start + MIB, len(self._map))
            self._map[start:stop] = pattern[: stop - start]


class Bench:
    """An engine on a spill file, ready to write all of `memory` to it and read it back in requests of one size."""

    def __init__(self, choice: EngineChoice, memory: Memory, request_nbytes: int, depth: int) -> None:
        self.engine = choice.engine
        self.depth = depth
        self.nbytes = memory.nbytes
        self.pieces = [
            (memory.address + at, min(request_nbytes, memory.nbytes - at), at)
            for at in range(0, memory.nbytes, request_nbytes)
        ]
        self.last = self.engine.write(0, 0, self.nbytes, self.pieces)
        self.last.wait()

    def write(self) -> Run:
        """From memory to the file; at most `depth` requests in flight."""

        def body() -> None:
            self.last = self.engine.write(0, 0, self.nbytes, self.pieces)
            self.last.wait()
            if self.last.error is not None:
                raise OSError(self.last.error[0], os.strerror(self.last.error[0]))

        return timed(body)

    def read(self) -> Run:
        """From the file to memory, `depth` requests in flight."""

        def body() -> None:
            pending: deque[Read] = deque()
            for index, (address, nbytes, _) in enumerate(self.pieces):
                if len(pending) == self.depth:
                    finish(pending.popleft())
                pending.append(self.engine.read(self.last, index, address, nbytes))
            while pending:
                finish(pending.popleft())

        return timed(body)


def finish(read: Read) -> None:
    """Waits, and raises when it failed."""
    read.wait()
    if read.error is not None:
        raise OSError(read.error[0], read.error[3])


def timed(body: Callable[[], object]) -> Run:
    """Wall and processor time of this process, its threads included."""
    start, cpu = time.perf_counter(), time.process_time()
    body()
    return Run(time.perf_counter() - start, time.process_time() - cpu)


def run_fio(path: Path, direction: str, nbytes: int, request_nbytes: int, depth: int) -> Run:
    """One pass of fio over its file."""
    command = ["fio", "--name=ceiling", f"--filename={path}", f"--rw={direction}", f"--size={nbytes}"]
    command += [f"--bs={request_nbytes}", f"--iodepth={depth}", "--ioengine=io_uring", "--direct=1"]
    command += ["--fixedbufs=1", "--registerfiles=1", "--fallocate=native", "--output-format=json", "--thread"]
    command += ["--invalidate=0"]
    huge_pages = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=huge_pages)
    job = json.loads(result.stdout[result.stdout.index("{") :])["jobs"][0]
    seconds = job[direction]["io_bytes"] / job[direction]["bw_bytes"]
    return Run(seconds, seconds * (job["usr_cpu"] + job["sys_cpu"]) / 100)


def open_all(
    kinds: list[str], directory: str, nbytes: int, request_nbytes: int, depth: int
) -> tuple[list[EngineChoice], Path]:
    """Engines that share one spill file, and the path by which fio finds it."""
    staging_nbytes = (depth + 1) * request_nbytes  # one slab more than `depth`: the one being filled
    choices = [open_engine(kinds[0], [directory], staging_nbytes, request_nbytes)]
    file = choices[0].files[0]
    file.grow(nbytes)
    choices += [open_engine(kind, [file], staging_nbytes, request_nbytes) for kind in kinds[1:]]
    return choices, Path(f"/proc/{os.getpid()}/fd/{file.fd}")


def compare(arguments: argparse.Namespace, directory: str, request_nbytes: int, depth: int) -> list[Row]:
    """Alternating runs of fio and of every engine, both directions."""
    nbytes = arguments.file_mib * MIB // request_nbytes * request_nbytes
    choices, path = open_all(arguments.engines, directory, nbytes, request_nbytes, depth)
    memory = Memory(nbytes)
    benches = {choice.kind: Bench(choice, memory, request_nbytes, depth) for choice in choices}
    runs: dict[tuple[str, str], list[Run]] = {}
    for repeat in range(arguments.repeats):
        for direction in ("write", "read"):
            tasks: list[tuple[str, Callable[[], Run]]] = [
                ("fio", partial(run_fio, path, direction, nbytes, request_nbytes, depth))
            ]
            tasks += [(kind, getattr(bench, direction)) for kind, bench in benches.items()]
            for name, task in tasks[repeat % len(tasks) :] + tasks[: repeat % len(tasks)]:
                runs.setdefault((direction, name), []).append(task())
    for choice in choices:
        choice.engine.close()
    choices[0].files[0].close()
    return [row_of(runs, key, nbytes, request_nbytes, depth) for key in sorted(runs, key=lambda key: key[0] == "read")]


def row_of(
    runs: dict[tuple[str, str], list[Run]], key: tuple[str, str], nbytes: int, request_nbytes: int, depth: int
) -> Row:
    """Medians, and the median fraction of fio's speed in the same repeat."""
    direction, name = key
    seconds = statistics.median(run.seconds for run in runs[key])
    cpu = statistics.median(run.cpu_seconds for run in runs[key])
    pairs = zip(runs[direction, "fio"], runs[key], strict=True)
    fraction = statistics.median(ceiling.seconds / run.seconds for ceiling, run in pairs)
    gb = nbytes / 1e9
    return Row(
        direction, request_nbytes / MIB, depth, name, round(gb / seconds, 3), round(cpu / gb, 3), round(fraction, 3)
    )


def memcpy_gb_per_second() -> float:
    """What one copy in memory costs on this machine."""
    source, target = Memory(64 * MIB), Memory(64 * MIB)
    runs = [timed(lambda: ctypes.memmove(target.address, source.address, 64 * MIB)) for _ in range(5)]
    return round(64 * MIB / 1e9 / statistics.median(run.seconds for run in runs), 1)


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def machine(directory: str) -> dict[str, object]:
    """Where the numbers were taken."""
    fio = subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    try:
        own = version("ssdtrain")
    except PackageNotFoundError:
        own = "not installed"
    file_system = subprocess.run(["stat", "-f", "-c", "%T", directory], capture_output=True, text=True).stdout.strip()
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "file_system": file_system,
        "python": platform.python_version(),
        "fio": fio,
        "ssdtrain": own,
        "memcpy_gb_per_second": memcpy_gb_per_second(),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Engines against fio on the same directory.")
    parser.add_argument("directory", help="a directory on the drive to measure")
    parser.add_argument("--engines", nargs="+", default=["io_uring", "threads"], help="io_uring, threads, python")
    parser.add_argument("--request-mib", nargs="+", type=float, default=[1, 4], help="request sizes")
    parser.add_argument("--depth", nargs="+", type=int, default=[8, 32], help="requests in flight")
    parser.add_argument("--file-mib", type=int, default=1024, help="bytes per pass")
    parser.add_argument("--repeats", type=int, default=5, help="passes per engine and direction")
    return parser.parse_args(arguments)


def main() -> None:
    """Prints the table; the last line is JSON."""
    arguments = parse()
    if shutil.which("fio") is None:
        sys.exit("Expected fio, the ceiling to compare with, got none; install it: apt-get install fio")
    place = machine(arguments.directory)
    print("\n".join(f"{name}: {value}" for name, value in place.items()))
    head = f"{'':6}{'request':>9}{'depth':>6}  {'engine':10}{'GB/s':>8}{'of fio':>8}{'CPU s/GB':>10}"
    print(f"\n{head}\n{'-' * len(head)}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        for request_mib in arguments.request_mib:
            for depth in arguments.depth:
                for row in compare(arguments, directory, int(request_mib * MIB), depth):
                    rows.append(row)
                    print(
                        f"{row.direction:6}{row.request_mib:>5g} MiB{row.depth:>6}  {row.engine:10}"
                        f"{row.gb_per_second:>8.2f}{row.fraction_of_fio:>8.1%}{row.cpu_seconds_per_gb:>10.3f}",
                        flush=True,
                    )
    print(json.dumps({"machine": place, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
