"""The ceiling: the same requests without us, by fio where it is installed, else by threads that do nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ssdtrain.tools.bench.memory import Memory


@contextmanager
def open_ceiling(directory: str, nbytes: int) -> Iterator[Ceiling]:
    """A file of its own, written once, so that reads find data and writes find blocks."""
    descriptor, path = tempfile.mkstemp(prefix="ssdtrain-bench-", dir=directory)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
        ceiling = Ceiling(path, nbytes)
        ceiling.seconds("write", min(nbytes, 4 << 20), 4)
        yield ceiling
    finally:
        os.close(descriptor)
        os.unlink(path)


class Ceiling:
    """One file."""

    def __init__(self, path: str, nbytes: int) -> None:
        """`tool` says who measures."""
        self._path, self._nbytes = path, nbytes
        self.tool = "fio" if shutil.which("fio") else "a loop of direct reads and writes"

    def seconds(self, direction: str, request_nbytes: int, depth: int) -> float:
        """One pass over the file, ``"read"`` or ``"write"``.

        Raises:
            OSError: the drive refused.
        """
        if self.tool == "fio":
            return self._fio(direction, request_nbytes, depth)
        return self._loop(direction, request_nbytes, depth)

    def _fio(self, direction: str, request_nbytes: int, depth: int) -> float:
        name = self._path.replace(":", "\\:")  # which is between names of several files
        command = ["fio", "--name=ceiling", f"--filename={name}", f"--rw={direction}", f"--size={self._nbytes}"]
        command += [f"--bs={request_nbytes}", f"--iodepth={depth}", "--ioengine=io_uring", "--direct=1", "--thread"]
        command += ["--fixedbufs=1", "--invalidate=0", "--output-format=json"]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if result.returncode:
            self.tool = "a loop of direct reads and writes (fio failed)"
            return self._loop(direction, request_nbytes, depth)
        job = json.loads(result.stdout[result.stdout.index("{") :])["jobs"][0][direction]
        return float(job["io_bytes"] / job["bw_bytes"])

    def _loop(self, direction: str, request_nbytes: int, depth: int) -> float:
        """`depth` threads take one request after the other."""
        flags = os.O_RDWR | getattr(os, "O_DIRECT", 0)
        try:
            descriptor = os.open(self._path, flags)
        except OSError:  # a file system without direct I/O
            descriptor = os.open(self._path, os.O_RDWR)
        offsets = iter(range(0, self._nbytes - request_nbytes + 1, request_nbytes))
        lock, errors = threading.Lock(), list[OSError]()

        def work(memory: Memory) -> None:
            while not errors:
                with lock:
                    offset = next(offsets, None)
                if offset is None:
                    return
                try:
                    if direction == "write":
                        os.pwritev(descriptor, [memory.map], offset)
                    else:
                        os.preadv(descriptor, [memory.map], offset)
                except OSError as error:
                    errors.append(error)

        try:
            threads = [threading.Thread(target=work, args=[Memory(request_nbytes)]) for _ in range(depth)]
            begin = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            seconds = time.perf_counter() - begin
        finally:
            os.close(descriptor)
        if errors:
            raise errors[0]
        return seconds
