"""No file of ours has a name that anybody could find, open or be left with, whatever happens to the process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fault_tools import Lab, tell

import ssdtrain

_OPENED, _MOVED_IN, _CREATED, _DELETED = 0x20, 0x80, 0x100, 0x200
STATE = {"min_nbytes": 0, "staging_nbytes": "1MiB"}


@contextlib.contextmanager
def watched(directory: Path) -> Iterator[list[tuple[str, str]]]:
    """What happens to names in a directory, as the kernel tells it; complete when the context is left."""
    libc, events = ctypes.CDLL(None), list[tuple[str, str]]()
    fd = libc.inotify_init1(os.O_NONBLOCK)
    mask = _OPENED | _MOVED_IN | _CREATED | _DELETED
    assert fd >= 0 and libc.inotify_add_watch(fd, os.fsencode(directory), mask) >= 0
    yield events
    with contextlib.suppress(BlockingIOError):
        while data := os.read(fd, 1 << 16):
            while data:
                _, kind, _, length = struct.unpack_from("iIII", data)
                name = data[16 : 16 + length].rstrip(b"\0").decode()
                words = {_OPENED: "opened", _MOVED_IN: "moved in", _CREATED: "created", _DELETED: "deleted"}
                events += [(word, name) for bit, word in words.items() if kind & bit and name]
                data = data[16 + length :]
    os.close(fd)


def trained(directory: str) -> tuple[torch.nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(3)])
    ssdtrain.offload_parameters(model, directory, STATE, blocks=["*"])
    optimizer = ssdtrain.offload_optimizer(torch.optim.AdamW(model.parameters()), directory, STATE)
    model(torch.ones(4, 64)).sum().backward()
    optimizer.step()
    return model, optimizer


def use_everything(directory: str) -> None:
    """State dicts, spill files of every engine, the probe of every engine."""
    model, optimizer = trained(directory)
    states = model.state_dict(), optimizer.state_dict()
    assert all(value.isfinite().all() for value in states[0].values())
    assert len(states[1]["state"]) == 6
    for engine in ("io_uring", "threads", "python"):
        ssdtrain.offload_activations(directory, {"engine": engine}).close()
    optimizer.close()  # type: ignore[attr-defined]
    ssdtrain.parameter_offload(model).close()
    assert torch.equal(states[0]["0.weight"], model.state_dict()["0.weight"]), "the copy is alive by itself"


def test_no_name_ever_appears(tmp_path: Path) -> None:
    """A name in a directory that others can write to is a race: a link put in its place was followed."""
    with watched(tmp_path) as events:
        use_everything(str(tmp_path))
    assert {word for word, _ in events} <= {"opened"}, "through a descriptor"


def without_nameless_files(directory: str) -> None:
    os.environ["FAKE_NO_TMPFILE"] = "1"
    with watched(Path(directory)) as events:
        use_everything(directory)
    names = {name for _, name in events}
    assert len(names) > 10, "this is the other way"
    for name in names:
        words = [word for word, own in events if own == name]
        assert words[:3] == ["created", "opened", "deleted"] and set(words[3:]) <= {"opened"}, words
    assert os.listdir(directory) == []


def test_where_every_file_has_a_name_it_is_gone_at_once(lab: Lab, tmp_path: Path) -> None:
    """On a file system without O_TMPFILE the name is gone at once, before anything is opened through it again."""
    lab.run(without_nameless_files, tmp_path)


def killed_in_state_dict(directory: str, whose: str) -> None:
    model, optimizer = trained(directory)
    before = files_in(directory)
    os.environ["FAKE_STUCK"] = "g"
    os.environ["FAKE_STUCK_UNDER"] = directory
    writer = threading.Thread(target=(model if whose == "parameters" else optimizer).state_dict, daemon=True)
    writer.start()
    while files_in(directory) == before:
        writer.join(0.001)
    tell("now")
    writer.join()


def files_in(directory: str) -> list[str]:
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [link for link in links if link.startswith(directory)]


@pytest.mark.parametrize("whose", ["parameters", "optimizer"])
def test_a_kill_in_state_dict_leaves_nothing(lab: Lab, tmp_path: Path, whose: str) -> None:
    """The out-of-memory killer comes while a state dict is being written: its files stayed for ever."""
    child = lab.start(killed_in_state_dict, tmp_path, whose)
    assert child.next_event() == "now", child.stderr
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_state_dicts_hold_no_descriptors(tmp_path: Path) -> None:
    """Thousands of tensors must not use descriptors up."""
    model, optimizer = trained(str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    states = model.state_dict(), optimizer.state_dict()
    assert len(os.listdir("/proc/self/fd")) == before
    assert states[0]["0.weight"].untyped_storage().filename is None or not os.path.exists(
        states[0]["0.weight"].untyped_storage().filename
    )
    del states
    optimizer.close()  # type: ignore[attr-defined]
    ssdtrain.parameter_offload(model).close()
