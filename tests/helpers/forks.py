"""Children that import nothing twice: forks of a process that has imported what takes seconds.

`serve` runs in that process. A child is a fork of it that runs a script as `python script.py ...` would, with arguments
and an environment of its own, and that ends like any script: exit handlers run, the interpreter shuts down.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

LIMIT_SECONDS = 900
PEERS_SECONDS = 20  # that the others of a job have when one of it has failed: some would wait for it for ever


# -- in the test's process ---------------------------------------------------------------------------------------------


class Forks:
    """The process that children are forked from."""

    def __init__(self, folder: Path, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-W", "ignore", __file__, *modules]
        self._environment = os.environ | dict(environment)
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment
        )
        self._folder, self._num_jobs = folder, 0

    def run(
        self,
        command: Sequence[str | Path],
        environments: Sequence[Mapping[str, str]] = ({},),
        cwd: Path | None = None,
        seconds: float = LIMIT_SECONDS,
    ) -> list[CompletedProcess[str]]:
        """Runs `python *command` beside one another in each of `environments`, which add to that of the server."""
        self._num_jobs += 1
        folder = self._folder / str(self._num_jobs)
        folder.mkdir()
        words, whole = list(map(str, command)), [self._environment | dict(own) for own in environments]
        question = {"command": words, "environments": whole, "cwd": str(cwd or os.getcwd())}
        codes = self._ask(question | {"folder": str(folder), "seconds": seconds})
        texts = [[(folder / f"{i}.{end}").read_text() for end in ("stdout", "stderr")] for i in range(len(whole))]
        return [CompletedProcess(words, code, *own) for code, own in zip(codes, texts, strict=True)]

    def _ask(self, question: dict[str, Any]) -> list[int]:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, f"the process to fork ended with {self._server.wait()}"
        return list(json.loads(answer))

    def close(self) -> None:
        self._server.communicate(timeout=LIMIT_SECONDS)


def ranks(num: int) -> list[dict[str, str]]:
    """The environments of a job's ranks, as torchrun makes them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    common |= {"WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num)]


# -- in the process that forks -----------------------------------------------------------------------------------------


def serve(modules: Sequence[str]) -> None:
    """Answers the test until its pipe closes; in a child, runs the script and returns, which ends the child."""
    added = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [folder for folder in sys.path[1:] if folder not in added]
    answers = os.dup(1)
    os.dup2(2, 1)  # what modules print is no answer
    for module in modules:
        importlib.import_module(module)
    for line in sys.stdin:
        job = json.loads(line)
        gc.freeze()  # a child that collects, and each does at its end, copies only memory of its own
        pids = []
        for number in range(len(job["environments"])):
            pids.append(os.fork())
            if pids[-1] == 0:
                os.close(answers)
                _become(job, number, path)
                _run(job["command"])
                return
        os.write(answers, f"{json.dumps(_codes(pids, job['seconds']))}\n".encode())


def _codes(pids: Sequence[int], seconds: float) -> list[int]:
    """How each ended; all end soon after one that failed."""
    left = {os.pidfd_open(pid): pid for pid in pids}
    codes, deadline = {}, time.monotonic() + seconds
    while left:
        ended, _, _ = select.select(list(left), [], [], max(0.0, deadline - time.monotonic()))
        for handle in ended or list(left):
            if not ended:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            pid = left.pop(handle)
            codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.close(handle)
            if codes[pid] != 0:
                deadline = min(deadline, time.monotonic() + PEERS_SECONDS)
    return [codes[pid] for pid in pids]


# -- in the child ------------------------------------------------------------------------------------------------------


def _become(job: dict[str, Any], number: int, path: Sequence[str]) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # dies with its parent
    files = (os.devnull, f"{job['folder']}/{number}.stdout", f"{job['folder']}/{number}.stderr")
    for target, name in enumerate(files):
        fd = os.open(name, os.O_RDWR | os.O_CREAT)
        os.dup2(fd, target)
        os.close(fd)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environments"][number])
    added = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = [*added, *path]


def _run(command: Sequence[str]) -> None:
    if command[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(command[0]).parent))
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1:])
