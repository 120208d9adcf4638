"""Where faults are played: children of a process that has torch imported and `preload.c` preloaded.

`serve` runs in that process. Every child is a fork of it: it runs one function of a test module and then ends like any
script, with atexit handlers and interpreter shutdown, so that exits are real and cost no import of torch.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import gc
import importlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import inside
import torch
from engine_tools import eventually
from folders import code_folders

import ssdtrain

ENGINES = ("io_uring", "threads", "python")
KIB, MIB = 1024, 1024 * 1024
LIMIT_SECONDS = 60
TIMED_OUT = "timed out"

Hook = Callable[[], object]


# -- in the test's process ---------------------------------------------------------------------------------------------


class Child:
    """One process that runs one function."""

    def __init__(self, lab: Lab, folder: Path, job: dict[str, Any]) -> None:
        self._lab = lab
        self._folder = folder
        folder.mkdir()
        os.mkfifo(folder / "events")
        self._events = os.open(folder / "events", os.O_RDONLY | os.O_NONBLOCK)
        self.pid = int(lab.ask({"folder": str(folder)} | job))

    def next_event(self) -> str:
        """What the child tells next; empty when it ended without telling."""
        ready, _, _ = select.select([self._events], [], [], LIMIT_SECONDS)
        assert ready, f"the child told nothing: {self.stderr}"
        return os.read(self._events, 4096).decode().strip()

    def wait(self, seconds: float = LIMIT_SECONDS) -> int | str:
        """The exit code, negative for a signal; TIMED_OUT when it had to be killed."""
        answer = self._lab.ask({"wait": self.pid, "seconds": seconds})
        os.close(self._events)
        return answer if answer == TIMED_OUT else int(answer)

    @property
    def stderr(self) -> str:
        return (self._folder / "stderr").read_text()


class Lab:
    """The process that children are forked from."""

    def __init__(self, library: Path, folder: Path) -> None:
        environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            "-c",
            f"import sys; sys.path[:0] = {code_folders()!r}; import fault_tools as f; f.serve()",
        ]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._folder = folder
        self._num_children = 0

    def start(self, body: Callable[..., object], *arguments: object) -> Child:
        """Begins `body(*arguments)` in a child; arguments must be JSON."""
        self._num_children += 1
        job = {"module": body.__module__, "function": body.__name__, "arguments": [_plain(a) for a in arguments]}
        return Child(self, self._folder / str(self._num_children), job)

    def run(self, body: Callable[..., object], *arguments: object, seconds: float = LIMIT_SECONDS) -> None:
        """Runs `body(*arguments)` to the end: exit code 0, nothing on stderr, in time."""
        child = self.start(body, *arguments)
        code = child.wait(seconds)
        assert (code, child.stderr) == (0, ""), f"exit code {code}\n{child.stderr}"

    def ask(self, question: dict[str, Any]) -> str:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        return self._server.stdout.readline().strip()

    def close(self) -> None:
        self._server.communicate(timeout=LIMIT_SECONDS)


def _plain(argument: object) -> object:
    return str(argument) if isinstance(argument, Path) else argument


# -- in the process that forks -----------------------------------------------------------------------------------------


def serve() -> None:
    """Answers the lab until its pipe closes; in a child, runs the job and returns, which ends the child."""
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer = str(_wait(question["wait"], question["seconds"]))
        else:
            module = importlib.import_module(question["module"])
            gc.freeze()  # a child that collects, and each does at its end, copies only memory of its own
            pid = os.fork()
            if pid == 0:
                _become(question)
                getattr(module, question["function"])(*question["arguments"])
                return
            answer = str(pid)
        print(answer, flush=True)


def _wait(pid: int, seconds: float) -> int | str:
    handle = os.pidfd_open(pid)
    is_over = bool(select.select([handle], [], [], seconds)[0])
    if not is_over:
        os.kill(pid, signal.SIGABRT)  # its stacks go to stderr
        select.select([handle], [], [], 5)
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    os.close(handle)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if is_over else TIMED_OUT


def _become(job: dict[str, Any]) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # dies with its parent
    folder = Path(job["folder"])
    for target, path in enumerate((os.devnull, folder / "stdout", folder / "stderr")):
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(fd, target)
        os.close(fd)
    events.append(os.open(folder / "events", os.O_WRONLY))
    faulthandler.enable()
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    logger = logging.getLogger("ssdtrain")
    logger.propagate = False
    logger.addHandler(_Listener())


# -- in the child ------------------------------------------------------------------------------------------------------

events: list[int] = []
warned: list[str] = []


class _Listener(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warned.append(record.getMessage())


def tell(text: str) -> None:
    """Sends one event to the test."""
    os.write(events[0], f"{text}\n".encode())


def policy(engine: str = "auto", **fields: object) -> dict[str, object]:
    """Sends everything from 16 KiB on, in slabs of 64 KiB."""
    plain: dict[str, object] = {
        "min_nbytes": 16 * KIB,
        "mode": "all",
        "staging_nbytes": MIB,
        "prefetch_nbytes": 256 * KIB,
        "decline_below_nbytes": 0,
    }
    return plain | {"engine": engine} | fields


class Trainer:
    """A small model and its steps; two of the same age and history give the same bits."""

    def __init__(self, depth: int = 8, rows: int = 256) -> None:
        torch.manual_seed(0)
        layers = [m for _ in range(depth) for m in (torch.nn.Linear(128, 128), torch.nn.GELU())]
        self.model = torch.nn.Sequential(*layers)
        self.generator = torch.Generator().manual_seed(1)
        self.rows = rows

    def forward(self) -> torch.Tensor:
        x = torch.randn(self.rows, 128, generator=self.generator)
        return self.model(x).square().mean()  # type: ignore[no-any-return]

    def finish(self, loss: torch.Tensor) -> list[torch.Tensor]:
        """Backward and a step of plain gradient descent; the loss and all gradients."""
        loss.backward()
        results = [loss.detach()]
        with torch.no_grad():
            for parameter in self.model.parameters():
                assert parameter.grad is not None
                results.append(parameter.grad)
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        return results

    def zero_grad(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def step(
        self, offload: ssdtrain.ActivationOffload | None = None, between: Hook | None = None
    ) -> list[torch.Tensor]:
        """One step; `between` runs after forward, when `offload` has been left."""
        if offload is None:
            return self.finish(self.forward())
        with offload:
            loss = self.forward()
        if between is not None:
            between()
        return self.finish(loss)


def plain_steps(num: int = 3, **options: int) -> list[list[torch.Tensor]]:
    """What each step gives without ssdtrain; to be called outside its contexts."""
    trainer = Trainer(**options)
    return [trainer.step() for _ in range(num)]


def plain_after_loss(num: int = 1) -> list[list[torch.Tensor]]:
    """What the steps after one whose backward failed give without ssdtrain."""
    trainer = Trainer()
    trainer.forward()
    return [trainer.step() for _ in range(num)]


def check_equal(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    assert len(actual) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), "not equal to the bit"


def check_steps(offload: ssdtrain.ActivationOffload, between: Hook | None = None, num: int = 3, **options: int) -> None:
    """Steps with `offload` equal those without; `between` runs in every step."""
    trainer = Trainer(**options)
    for expected in plain_steps(num, **options):
        check_equal(trainer.step(offload, between), expected)


def engine_of(offload: ssdtrain.ActivationOffload) -> Any:
    transport = inside.transport(offload)
    assert transport is not None
    return transport.engine


def drain(offload: ssdtrain.ActivationOffload) -> None:
    """Waits until everything under way is written, so that backward has to read it."""
    if inside.transport(offload) is not None:
        engine_of(offload).drain()
    offload.stats  # noqa: B018  takes note of what the engine did


def spill_fds(offload: ssdtrain.ActivationOffload) -> list[int]:
    transport = inside.transport(offload)
    assert transport is not None
    return [file.fd for file in transport.drive.files]


def holdings() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def check_holdings(before: tuple[int, int]) -> None:
    """No descriptor or thread more than `before`, in a moment: files of no use close in threads of their own, and a
    joined thread lingers in /proc, also in `before`."""
    assert eventually(lambda: holdings()[0] == before[0]), f"{holdings()} instead of {before}"
    assert eventually(lambda: holdings()[1] <= before[1]), f"{holdings()} instead of {before}"


def check_no_record(offload: ssdtrain.ActivationOffload) -> None:
    gc.collect()
    assert offload.stats.num_live_records == 0, str(offload.stats)


def check_nothing_left(offload: ssdtrain.ActivationOffload, before: tuple[int, int]) -> None:
    """After the last graph nothing is held, although `offload` is alive and was not closed."""
    gc.collect()
    counters = inside.counters(offload)
    assert offload.stats.num_live_records == counters.held_nbytes == counters.prefetched_nbytes == 0, str(offload.stats)
    assert not inside.store(offload).index._records
    assert inside.transport(offload) is None, "the engine is open"
    check_holdings((before[0] + num_kept_files(offload), before[1]))


def num_kept_files(offload: ssdtrain.ActivationOffload) -> int:
    """Spill files that wait, empty, for the context to be entered again."""
    inside.source(offload).settle()
    files = inside.source(offload)._kept._empty
    assert all(file.nbytes == os.fstat(file.fd).st_size == 0 for file in files)
    return len(files)


def check_one_warning_per_kind(offload: ssdtrain.ActivationOffload) -> None:
    assert len(set(warned)) == len(warned), warned
    assert set(offload.stats.fallbacks) <= set(warned), (offload.stats.fallbacks, warned)


def check_error(error: OSError, directory: str, *numbers: int) -> None:
    """The one clear error: record, offset and length in the text, errno and directory as attributes."""
    assert error.errno in (numbers or (errno.EIO,)), error
    assert error.filename == directory, error
    for word in ("record ", "float32[", "bytes", "offset ", f"errno {error.errno}"):
        assert word in str(error), (word, str(error))
