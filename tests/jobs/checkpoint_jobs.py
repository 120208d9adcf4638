"""Processes that save a checkpoint and are killed while they do; `tests/laws/test_saving_checkpoints.py` runs them.

    python checkpoint_jobs.py JOB FOLDER [nameless|named]

PyTorch is imported once, each process is a fork. Prints one JSON line.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import ssdtrain

_FILES = ("replacing.py", "safetensors.py", "safetensors_format.py")


def model_of(value: float) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.full(p.shape, value))
    return model


def save(path: Path, value: float) -> None:
    ssdtrain.save_safetensors(model_of(value), path, {"value": str(value)})


def in_child(work: Callable[[], Any]) -> int:
    """The process id of a fork that does this."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return child


def ending(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_line(number: int, act: Callable[[], Any]) -> None:
    """Does something before the given line that is executed in the files that save."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if os.path.basename(frame.f_code.co_filename) not in _FILES:
            return None
        if event == "line":
            count += 1
            if count == number:
                act()
        return trace

    sys.settrace(trace)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_everywhere(folder: Path) -> dict[str, Any]:
    """One process for each line of a save, which dies there; then what is at the path."""
    path = folder / "model.safetensors"
    save(path, 1.0)
    old = path.read_bytes()
    save(path, 2.0)
    new = path.read_bytes()
    seen: dict[str, Any] = {"old": 0, "new": 0, "torn": 0, "left": 0, "most_left": 0}
    number, is_over = 0, False
    while not is_over:
        number += 1
        path.write_bytes(old)

        def work(number: int = number) -> None:
            model = model_of(2.0)
            at_line(number, die)
            ssdtrain.save_safetensors(model, path, {"value": "2.0"})

        is_over = ending(in_child(work)) == 0
        data = path.read_bytes()
        seen["old" if data == old else "new" if data == new else "torn"] += 1
        left = [other for other in folder.iterdir() if other != path]
        seen["left"] += len(left)
        seen["most_left"] = max(seen["most_left"], len(left))
        for other in left:
            other.unlink()
    return seen


def killed_beside_another(folder: Path) -> dict[str, Any]:
    """One process stops at some line of its save, another saves to the same path, the first dies there or goes on."""
    path = folder / "model.safetensors"
    outcomes = []
    for number in range(5, 140, 9):
        for dies in (False, True):
            save(path, 1.0)
            stopped, resumed = os.pipe(), os.pipe()

            def pause(stopped: Any = stopped, resumed: Any = resumed, dies: bool = dies) -> None:
                os.write(stopped[1], b".")
                os.read(resumed[0], 1)
                if dies:
                    die()

            def work(number: int = number, pause: Any = pause, stopped: Any = stopped) -> None:
                model = model_of(2.0)
                at_line(number, pause)
                ssdtrain.save_safetensors(model, path)
                sys.settrace(None)
                os.write(stopped[1], b".")

            first = in_child(work)
            os.read(stopped[0], 1)
            second = ending(in_child(lambda: save(path, 3.0)))
            os.write(resumed[1], b".")
            ended = ending(first)
            for fd in (*stopped, *resumed):
                os.close(fd)
            outcomes.append([number, dies, second, ended, value_of(path)])
    return {"outcomes": outcomes}


def value_of(path: Path) -> float | None:
    """What a whole checkpoint has everywhere; None of a torn one."""
    model = model_of(0.0)
    try:
        ssdtrain.load_safetensors(model, path)
    except ValueError:
        return None
    values = {float(v) for p in model.parameters() for v in p.detach().flatten()}
    return values.pop() if len(values) == 1 else None


def together(folder: Path) -> dict[str, Any]:
    """Sixteen processes save to one path, each a few times."""
    path = folder / "model.safetensors"
    begin = os.pipe()

    def work(value: float) -> None:
        logging.disable(logging.WARNING)
        os.read(begin[0], 1)
        for _ in range(5):
            save(path, value)

    children = [in_child(lambda value=value: work(float(value))) for value in range(16)]
    os.write(begin[1], b"." * 16)
    endings = [ending(child) for child in children]
    return {"endings": endings, "value": value_of(path), "files": os.listdir(folder)}


def full(folder: Path) -> dict[str, Any]:
    """A limit of the size of files stands for a full drive."""
    path = folder / "model.safetensors"
    save(path, 1.0)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    error = None
    try:
        save(path, 2.0)
    except OSError as raised:
        error = raised
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return {
        "error": [error.errno, str(error.filename)] if error else None,
        "value": value_of(path),
        "files": os.listdir(folder),
    }


if __name__ == "__main__":
    job, folder, kind = sys.argv[1:]
    if kind == "named":  # as on a file system that has no files without a name: then a directory cannot be opened so
        os.O_TMPFILE = 0
    print(json.dumps(globals()[job](Path(folder))))
