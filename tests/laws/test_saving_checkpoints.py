"""A checkpoint is replaced as a whole or not at all, and what is written can be read back."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import JOBS
from forks import Forks
from state_tools import MLP, check_same, model_of, values
from torch import nn

import ssdtrain


def job(forks: Forks, name: str, folder: Path, kind: str = "nameless") -> Any:
    (done,) = forks.run([JOBS / "checkpoint_jobs.py", name, folder, kind])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# -- whole or not at all -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nameless", "named"])
def test_whenever_a_save_is_killed_the_old_checkpoint_or_the_new_one_is_there(
    forks: Forks, tmp_path: Path, kind: str
) -> None:
    """A process dies by SIGKILL at every single line that saving executes; the file is never anything in between.

    Where files can be without a name, a killed save leaves nothing else behind but in the moment between its name and
    its place.
    """
    seen = job(forks, "killed_everywhere", tmp_path, kind)
    assert seen["torn"] == 0 and seen["old"] > 40 and seen["new"] > 1
    assert seen["most_left"] <= 1
    if kind == "nameless":
        assert seen["left"] <= 12


def test_a_save_that_is_killed_does_not_tear_the_one_beside_it(forks: Forks, tmp_path: Path) -> None:
    """Every rank saved to one path, one was killed: the other renamed the file that it had truncated, and said nothing.

    Wherever the first stands when the second saves, each that ends well leaves its own whole file, and one that dies
    leaves the other's.
    """
    for number, dies, second, first, value in job(forks, "killed_beside_another", tmp_path)["outcomes"]:
        assert second == 0, number
        assert first == (-9 if dies else 0), number
        assert value in ((1.0, 2.0, 3.0) if dies else (2.0, 3.0)), (number, value)


def test_sixteen_processes_save_to_one_path(forks: Forks, tmp_path: Path) -> None:
    """One of sixteen raised `FileNotFoundError`: another had renamed the file that both wrote."""
    seen = job(forks, "together", tmp_path)
    assert seen["endings"] == [0] * 16
    assert seen["value"] in range(16) and seen["files"] == ["model.safetensors"]


@pytest.mark.parametrize("kind", ["nameless", "named"])
def test_a_full_drive_leaves_the_old_checkpoint_and_says_where(forks: Forks, tmp_path: Path, kind: str) -> None:
    seen = job(forks, "full", tmp_path, kind)
    assert seen["error"] == [errno.EFBIG, str(tmp_path / "model.safetensors")]
    assert seen["value"] == 1.0 and seen["files"] == ["model.safetensors"]


def test_ranks_that_save_to_one_path_are_told(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Both files are whole; which one stays is a matter of chance, and it is said."""
    from ssdtrain.io.files.replacing import replacing

    with caplog.at_level(logging.WARNING, "ssdtrain"), replacing(path) as file:
        file.write(b"first")
        ssdtrain.save_safetensors(model_of("mlp"), path)
    assert path.read_bytes() == b"first"
    assert [r.getMessage() for r in caplog.records if str(path) in r.getMessage() and "one rank" in r.getMessage()]
    caplog.clear()
    ssdtrain.save_safetensors(model_of("mlp"), path)
    assert not caplog.records


# -- what else is there ------------------------------------------------------------------------------------------------


def test_a_link_is_followed_and_a_strangers_partial_file_left_alone(tmp_path: Path, path: Path) -> None:
    other = tmp_path / "model.safetensors.partial"
    other.write_text("a stranger's")
    target = tmp_path / "drive" / "real.safetensors"
    target.parent.mkdir()
    path.symlink_to(target)
    for _ in range(2):  # the link leads nowhere, then to a file
        ssdtrain.save_safetensors(model_of("mlp"), path)
        assert path.is_symlink() and target.is_file() and not target.is_symlink()
    assert other.read_text() == "a stranger's"
    assert sorted(os.listdir(tmp_path)) == ["drive", path.name, other.name]
    assert os.listdir(target.parent) == [target.name]


def test_permissions_are_those_of_new_files_or_of_the_older_one(path: Path) -> None:
    before = os.umask(0o027)
    try:
        ssdtrain.save_safetensors(model_of("mlp"), path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        ssdtrain.save_safetensors(model_of("mlp"), path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(before)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "loop"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/null")
    else:
        path.symlink_to(path)
    with pytest.raises(FileExistsError, match="regular file"):
        ssdtrain.save_safetensors(model_of("mlp"), path)
    assert os.listdir(tmp_path) == [path.name]


# -- what is written can be read back ----------------------------------------------------------------------------------


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"scale": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


class Wrapped(torch.Tensor):
    """Two tensors in one, as quantised weights are."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> Any:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(func)


def with_buffer(value: torch.Tensor, name: str = "extra") -> nn.Module:
    model = MLP(1)
    model._buffers[name] = value
    return model


UNREADABLE: dict[str, tuple[Any, Any, str]] = {
    "number as metadata": (lambda: MLP(1), {"step": 1000}, "Expected texts .* 'step': 1000"),
    "number as key": (lambda: MLP(1), {3: "x"}, "Expected texts .* 3: 'x'"),
    "nested metadata": (lambda: MLP(1), {"config": {"a": "b"}}, "Expected texts"),
    "half a character": (lambda: MLP(1), {"note": "\ud800"}, "the metadata 'note'"),
    "half a character in a name": (lambda: with_buffer(torch.ones(2), "\ud800"), None, "the name"),
    "the name of the metadata": (lambda: with_buffer(torch.ones(2), "__metadata__"), None, "__metadata__"),
    "complex": (lambda: with_buffer(torch.ones(2, dtype=torch.complex64)), None, "complex64 of extra"),
    "sparse": (lambda: with_buffer(torch.eye(3).to_sparse()), None, "sparse_coo: extra"),
    "quantised": (
        lambda: with_buffer(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)),
        None,
        "dense tensors",
    ),
    "wrapped": (lambda: with_buffer(Wrapped(torch.ones(2))), None, "Wrapped .*extra"),
    "without values": (lambda: with_buffer(torch.ones(2, device="meta")), None, "extra on the meta device"),
    "without a shape": (lambda: nn.LazyLinear(3), None, "uninitialised one"),
    "extra state": (lambda: nn.Sequential(WithExtraState(2, 2)), None, "extra state of 0"),
    "endless metadata": (lambda: MLP(1), {"log": "x" * 100_000_001}, "100000000 bytes"),
}


@pytest.mark.filterwarnings("ignore:.*quantiz.*:UserWarning", "ignore:.*LazyLinear.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*[Ll]azy modules.*:UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("what", UNREADABLE)
def test_what_cannot_be_read_back_is_refused_before_the_old_file_is_touched(path: Path, what: str) -> None:
    """`{"step": 1000}` was written without a word, and the file could not be loaded."""
    make, metadata, message = UNREADABLE[what]
    ssdtrain.save_safetensors(MLP(1), path)
    before = path.stat()
    with pytest.raises(ValueError, match=message):
        ssdtrain.save_safetensors(make(), path, metadata)
    assert path.stat() == before and os.listdir(path.parent) == [path.name]


def test_odd_tensors_come_back(path: Path) -> None:
    """Not contiguous, overlapping, negated, empty, of no dimension, of every dtype; odd names and texts."""
    pytest.importorskip("safetensors")

    def model() -> nn.Module:
        torch.manual_seed(0)
        made = MLP(1)
        base = torch.arange(24.0)
        odd = {
            "transposed": base.view(4, 6).t(),
            "expanded": torch.ones(1).expand(5),
            "overlapping": base.as_strided((4, 4), (2, 1)),
            "negated": torch.complex(base, base).conj().imag,
            "empty": torch.empty(0, 3),
            "scalar": torch.tensor(3.5),
            "näme \"'\\ \n": torch.ones(2),
        }
        for name, value in odd.items():
            made._buffers[name] = value
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool):
            made._buffers[str(dtype)[6:]] = torch.tensor([0, 1, 1]).to(dtype)
        return made

    ssdtrain.save_safetensors(model(), path, {"ключ": 'значение "\n'})
    other = model()
    for name, value in other._buffers.items():
        assert value is not None
        other._buffers[name] = torch.zeros(value.shape, dtype=value.dtype)
    ssdtrain.load_safetensors(other, path)
    check_same(values(other), values(model()))


# -- what cannot be read is said with its place ------------------------------------------------------------------------


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


MALFORMED_FILES = {
    "nothing": b"",
    "a cut length": b"\1\0",
    "a length of no header": b"\xff" * 8,
    "no JSON": file_of(b"{" * 40),
    "a list": file_of([]),
    "numbers as metadata": file_of({"__metadata__": {"step": 1000}}),
    "an unknown dtype": file_of({"weight": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "overlapping": file_of(
        {n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in ("weight", "bias")}, b"\0" * 4
    ),
    "cut data": file_of({"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 7),
    "another size": file_of({"weight": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"\0" * 8),
    "pickled": b"\x80\x02}q\x00.",
}


@pytest.mark.parametrize("what", MALFORMED_FILES)
def test_a_malformed_file_is_named(path: Path, what: str) -> None:
    pytest.importorskip("safetensors")
    path.write_bytes(MALFORMED_FILES[what])
    model = nn.Linear(2, 1)
    before = values(model)
    with pytest.raises(ValueError, match="Expected a whole safetensors file") as raised:
        ssdtrain.load_safetensors(model, path)
    assert str(path) in str(raised.value)
    check_same(values(model), before)


MALFORMED_INDEXES: dict[str, tuple[Any, type[Exception], str]] = {
    "no JSON": (b"{", ValueError, "JSON index"),
    "no UTF-8": (b"\xff\xfe\0", ValueError, "JSON index"),
    "endless nesting": (b"[" * 100_000, ValueError, "JSON index"),
    "a list": ([], ValueError, "weight_map"),
    "no map": ({"metadata": {}}, ValueError, "weight_map"),
    "a list for a map": ({"weight_map": ["weight"]}, ValueError, "weight_map"),
    "a number for a file": ({"weight_map": {"weight": 3, "bias": "a"}}, ValueError, "got 3"),
    "no file": ({"weight_map": {"weight": "", "bias": "a"}}, ValueError, "got ''"),
    "no path": ({"weight_map": {"weight": "a\0b", "bias": "a"}}, ValueError, "name of a file"),
    "elsewhere": ({"weight_map": {"weight": "/etc/passwd", "bias": "a"}}, ValueError, "in the directory of the index"),
    "above": ({"weight_map": {"weight": "x/../../a", "bias": "a"}}, ValueError, "in the directory of the index"),
    "a missing file": ({"weight_map": {"weight": "a.safetensors", "bias": "no"}}, FileNotFoundError, "nothing at .*no"),
    "a folder": (
        {"weight_map": {"weight": "a.safetensors", "bias": "folder"}},
        ValueError,
        "something else at .*folder",
    ),
    "another file": (
        {"weight_map": {"weight": "a.safetensors", "bias": "a.safetensors"}},
        ValueError,
        "bias in .*a.safetensors",
    ),
    "a name twice": (
        b'{"weight_map": {"bias": "b", "weight": "a.safetensors", "weight": "b"}}',
        ValueError,
        "'weight' twice",
    ),
}


@pytest.mark.parametrize("what", MALFORMED_INDEXES)
def test_a_malformed_index_is_named(tmp_path: Path, what: str) -> None:
    """`KeyError: 'weight_map'`, `TypeError: unsupported operand` and the like said neither file nor place."""
    pytest.importorskip("safetensors")
    content, kind, message = MALFORMED_INDEXES[what]
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.safetensors").write_bytes(
        file_of({"weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}, b"\0" * 8)
    )
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    model = nn.Linear(2, 1)
    before = values(model)
    with pytest.raises(kind, match=message) as raised:
        ssdtrain.load_safetensors(model, tmp_path)
    assert str(tmp_path) in str(raised.value)
    check_same(values(model), before)


def test_a_pipe_is_not_waited_for(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(ValueError, match="something else at"):
        ssdtrain.load_safetensors(nn.Linear(2, 1), path)


def test_a_dtype_that_cannot_be_cast_is_refused_before_anything_changes(path: Path) -> None:
    """A checkpoint of four-bit numbers: the first tensor was loaded, the second raised."""
    pytest.importorskip("safetensors")
    entries = {
        "bias": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "weight": {"dtype": "F4", "shape": [1, 2], "data_offsets": [4, 5]},
    }
    path.write_bytes(file_of(entries, b"\1" * 5))
    model = nn.Linear(2, 1)
    before = values(model)
    with pytest.raises(ValueError, match="got F4 of weight"):
        ssdtrain.load_safetensors(model, path)
    check_same(values(model), before)
