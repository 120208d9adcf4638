"""The spill file: for this process only, gone when it goes, no longer than allowed."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_tools import descriptors, implementation
from folders import HELPERS


@pytest.fixture(params=["threads", "python"], ids=["cpp", "python"])
def make(request: pytest.FixtureRequest) -> Any:
    return implementation(request.param).SpillFile


@pytest.fixture
def file(make: Any, tmp_path: Path) -> Iterator[Any]:
    spill = make(str(tmp_path), None)
    yield spill
    spill.close()


def test_nobody_else_can_open_it(file: Any, tmp_path: Path) -> None:
    status = os.fstat(file.fd)
    assert stat.S_ISREG(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_nlink == 0
    assert not os.get_inheritable(file.fd)
    assert list(tmp_path.iterdir()) == []


def test_what_it_says_about_itself(file: Any, tmp_path: Path) -> None:
    assert file.directory == str(tmp_path)
    assert file.block_nbytes >= 512
    assert file.block_nbytes % max(1, file.memory_alignment) == 0
    assert file.direct_reason.startswith("direct: " if file.is_direct else "buffered: ")
    assert bool(os.get_blocking(file.fd))
    assert (file.nbytes, file.cap_nbytes, file.fallocate_reason) == (0, None, "")
    assert os.fstat(file.fd).st_size == 0


def test_grow_reserves_whole_blocks(file: Any) -> None:
    file.grow(1_000_001)
    assert file.nbytes >= 1_000_001
    assert file.nbytes % file.block_nbytes == 0
    status = os.fstat(file.fd)
    assert status.st_size == file.nbytes
    assert status.st_blocks * 512 >= file.nbytes
    file.grow(5)
    assert file.nbytes == status.st_size


def test_cap(make: Any, tmp_path: Path) -> None:
    file = make(str(tmp_path), 1_000_000)
    file.grow(4096)
    with pytest.raises(OSError, match="Expected at most cap_nbytes=1000000") as caught:
        file.grow(1_000_001)
    assert caught.value.errno == errno.EDQUOT
    assert caught.value.filename == str(tmp_path)
    assert file.nbytes == os.fstat(file.fd).st_size == 4096
    file.grow(1_000_000)
    assert file.nbytes == 1_000_000 // file.block_nbytes * file.block_nbytes


def test_close_is_idempotent_and_final(make: Any, tmp_path: Path) -> None:
    before = descriptors()
    file = make(str(tmp_path), None)
    assert len(descriptors() - before) == 1
    file.close()
    file.close()
    assert not descriptors() - before
    with pytest.raises(RuntimeError, match="Expected an open spill file, got a closed one"):
        file.grow(4096)
    dropped = make(str(tmp_path), None)
    del dropped
    assert not descriptors() - before


def test_closing_it_under_an_engine_is_safe(tmp_path: Path) -> None:
    """The descriptor's number may be reused at once; the engine must not write to a stranger's file."""
    from engine_tools import KINDS, SLAB_NBYTES, Io, random_bytes

    for kind in KINDS:
        io = Io(kind, tmp_path, num_slabs=1)
        written = io.write(random_bytes(10 * SLAB_NBYTES))
        for file in io.files:
            file.close()
        stranger = os.open(tmp_path / "stranger", os.O_RDWR | os.O_CREAT)
        written.write.wait()
        assert written.write.error is None
        io.check(written)
        assert os.fstat(stranger).st_size == 0
        os.close(stranger)
        io.close()


@pytest.mark.parametrize("name, number", [("missing", errno.ENOENT), ("a_file", errno.ENOTDIR)])
def test_directories_that_are_none(make: Any, tmp_path: Path, name: str, number: int) -> None:
    (tmp_path / "a_file").write_text("")
    with pytest.raises(OSError, match=name) as caught:
        make(str(tmp_path / name), None)
    assert caught.value.errno == number
    assert caught.value.filename == str(tmp_path / name)


FULL = """
import errno, os, sys
sys.path[:0] = [{tests!r}]
from engine_tools import implementation
file = implementation({kind!r}).SpillFile({directory!r}, None)
file.grow(256 * 1024)
try:
    file.grow(64 << 20)
except OSError as error:
    assert (error.errno, error.filename) == (errno.ENOSPC, {directory!r}), error
else:
    raise AssertionError("64 MiB fit into 1 MiB")
assert file.nbytes == os.fstat(file.fd).st_size == 256 * 1024
file.grow(512 * 1024)
"""


@pytest.mark.parametrize("kind", ["threads", "python"])
def test_full_file_system(kind: str, tmp_path: Path) -> None:
    """No room: an error with errno and directory, and the file is as it was."""
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True)
    if mount.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    script = FULL.format(tests=str(HELPERS), kind=kind, directory=str(tmp_path))
    try:
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert result.returncode == 0, result.stderr
