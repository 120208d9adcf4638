"""The parent's side of a worker: starts it, talks to it, and explains how it died.

It knows the protocol of `worker` and nothing of training. Every wait is bounded: a worker that does not
answer in `reply_seconds` is aborted, with the Python traceback of each of its threads in what is shown of its
stderr.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from ssdtrain.tools.demo.settings import DemoSettings

REPLY_SECONDS = 900.0
"""Longer than any step of a sensible demo."""

_EXIT_SECONDS = 10.0
"""For one that was aborted, before it is killed."""

_TAIL_LINES = 15

_MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
"""Makes glibc give freed tensors back at once; the resident size otherwise shows what it keeps."""

_START = (
    "import sys; num = int(sys.argv[1]); sys.path[:], sys.argv[:] = sys.argv[2 : 2 + num], sys.argv[2 + num :];"
    " from ssdtrain.tools.demo.worker import main; sys.exit(main())"
)
"""Starts a worker that imports from the folders in its arguments, and has those of this process, for its run record.
`python -m` would look into the current folder first."""

_PACKAGE_FOLDER = str(Path(__file__).parents[3])

_MEMORY_WORDS = ("bad_alloc", "Thread creation failed")
"""What C++ and OpenMP leave on stderr when they die of refused memory, where Python has nothing to catch."""

_SIGNALS = {
    signal.SIGKILL: "most often the kernel's out-of-memory killer",
    signal.SIGABRT: "the process gave itself up",
    signal.SIGSEGV: "an invalid memory access",
    signal.SIGBUS: "an invalid memory access, or a file that could not grow",
}


class WorkerError(RuntimeError):
    """A worker that could not go on."""

    def __init__(self, role: str, kind: str, message: str) -> None:
        super().__init__(message)
        self.role = role
        """Which run failed: `plain` or `ssdtrain`."""
        self.kind = kind
        """`usage`, `out_of_memory` or `failure`."""
        self.detail = ""
        """How the process ended and the last lines of its stderr."""
        self.measurements: dict[str, Any] = {}
        """What the run had measured until then."""


class WorkerProcess:
    """One child process that trains; leaving it as a context manager ends it, whatever it is doing."""

    def __init__(self, role: str, settings: DemoSettings) -> None:
        self.role = role
        self.reply_seconds = REPLY_SECONDS
        self._settings = settings
        with ExitStack() as stack:
            self._stderr = stack.enter_context(tempfile.TemporaryFile())
            self._process = self._spawn()
            self._stack = stack.pop_all()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._stack.close()

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    def start(self, *, memory_limit_nbytes: int | None = None, measures_private_memory: bool = False) -> None:
        """Sends the job; `receive()` then answers when the worker is ready for its first step."""
        self.send(
            role=self.role,
            settings=self._settings.to_dict(),
            memory_limit_nbytes=memory_limit_nbytes,
            measures_private_memory=measures_private_memory,
        )

    def send(self, **message: Any) -> None:
        """Sends one message; a worker that is gone is noticed by `receive()`."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Waits for the answer to the last message.

        Raises:
            WorkerError: The worker reported an error, died, or did not answer in time.
        """
        answer = self._read_answer()
        if answer is not None and answer["event"] != "error":
            return answer
        raise self._failure(answer)

    def end(self) -> None:
        """Waits for the end of a worker that has been told to finish; a drive takes time to close files.

        Raises:
            WorkerError: It did not, or not in time.
        """
        try:
            code = self._process.wait(self.reply_seconds)
        except subprocess.TimeoutExpired:
            raise self._abort(f"it did not end within {self.reply_seconds:.0f} s of its last step") from None
        if code:
            raise self._failure(None)

    def _spawn(self) -> subprocess.Popen[str]:
        # A session of its own keeps the terminal's Ctrl-C away: the parent alone decides the child's end.
        folders = _import_path()
        return subprocess.Popen(
            [sys.executable, "-c", _START, str(len(folders)), *folders, *sys.argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, **_MALLOC},
            text=True,
            start_new_session=True,
        )

    def _read_answer(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], self.reply_seconds)[0]:
            raise self._abort(f"no answer in {self.reply_seconds:.0f} s")
        line = self._process.stdout.readline()
        answer: dict[str, Any] | None = json.loads(line) if line.endswith("\n") else None
        return answer

    def _abort(self, message: str) -> WorkerError:
        self._process.send_signal(signal.SIGABRT)  # faulthandler in the worker writes its tracebacks
        return self._failure({"kind": "failure", "message": message})

    def _failure(self, answer: dict[str, Any] | None) -> WorkerError:
        code = self._wait()
        tail = self._stderr_tail()
        if answer is None:
            is_memory = code == -signal.SIGKILL or any(word in tail for word in _MEMORY_WORDS)
            answer = {"kind": "out_of_memory" if is_memory else "failure", "message": "the process died"}
        failure = WorkerError(self.role, answer["kind"], answer["message"])
        failure.detail = f"The process ended with {describe_exit(code)}; the end of its stderr:\n{tail}"
        failure.measurements = answer.get("measurements", {})
        return failure

    def _wait(self) -> int:
        try:
            return self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _stderr_tail(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").splitlines()
        return "\n".join(f"  | {line}" for line in lines[-_TAIL_LINES:]) or "  | (empty)"


def _import_path() -> list[str]:
    """Where this process imports from, without the current directory but for the package that runs here."""
    here = {"", os.getcwd()} - {_PACKAGE_FOLDER}
    return [_PACKAGE_FOLDER] * (_PACKAGE_FOLDER not in sys.path) + [path for path in sys.path if path not in here]


def describe_exit(code: int) -> str:
    """Says what an exit code means: `signal SIGKILL (most often the kernel's out-of-memory killer)`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        number = signal.Signals(-code)
    except ValueError:
        return f"signal {-code}"
    return f"signal {number.name}" + (f" ({_SIGNALS[number]})" if number in _SIGNALS else "")
