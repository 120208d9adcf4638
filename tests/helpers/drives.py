"""Real small drives to break: an ext4 on a loop device, a tmpfs of a few MiB. Both need root."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class Drive:
    """A mounted file system of its own, on `device` whose bytes are in `image` where it has one."""

    def __init__(self, directory: Path, image: Path | None = None, device: str = "") -> None:
        self.directory = directory
        self.image = image
        self.device = device
        self._nbytes = image.stat().st_size if image is not None else 0

    def pull(self) -> None:
        """From here on the device answers every request with an error."""
        self._resize(4096)

    def plug(self) -> None:
        """The device answers again."""
        self._resize(self._nbytes)

    def _resize(self, nbytes: int) -> None:
        assert self.image is not None
        os.truncate(self.image, nbytes)
        subprocess.run(["losetup", "--set-capacity", self.device], check=True)

    @property
    def used_nbytes(self) -> int:
        status = os.statvfs(self.directory)
        return (status.f_blocks - status.f_bfree) * status.f_frsize


def fill(directory: str | Path, leave_nbytes: int = 0) -> Path:
    """Makes a file that takes all room but `leave_nbytes`."""
    path = Path(directory) / "filler"
    with open(path, "wb") as file:
        for step in (1 << 20, 4096, 512):
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, step)
    os.truncate(path, max(0, path.stat().st_size - leave_nbytes))
    return path


@contextlib.contextmanager
def throttled(directory: str | Path, bandwidth: float) -> Iterator[None]:
    """Inside, this process reads and writes the drive of `directory` at most at `bandwidth` bytes per second."""
    root = Path("/sys/fs/cgroup/blkio")
    group, device = root / f"ssdtrain-test-{os.getpid()}", os.stat(directory).st_dev
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"throttling a drive needs root and the blkio cgroup: {error}")
    try:
        for way in ("read", "write"):
            limit = group / f"blkio.throttle.{way}_bps_device"
            try:
                limit.write_text(f"{os.major(device)}:{os.minor(device)} {int(bandwidth)}")
            except OSError as error:
                pytest.skip(f"the drive of {directory} cannot be throttled: {error}")
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (root / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def _run(*command: object) -> str:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip(f"{command[0]} needs root and a kernel that allows it: {result.stderr.strip()}")
    return result.stdout.strip()


@contextlib.contextmanager
def tmpfs_drive(folder: Path, nbytes: int) -> Iterator[Drive]:
    folder.mkdir()
    _run("mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", folder)
    try:
        yield Drive(folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def ext4_drive(folder: Path, nbytes: int, image_folder: Path | None = None) -> Iterator[Drive]:
    folder.mkdir()
    image = (image_folder or folder.parent) / f"{folder.name}.img"
    with open(image, "wb") as file:
        file.truncate(nbytes)
    _run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-m", "0", "-E", "root_owner", image)
    device = _run("losetup", "--find", "--show", image)
    try:
        _run("mount", "-o", "errors=continue", device, folder)
        drive = Drive(folder, image, device)
        (folder / "lost+found").rmdir()
        try:
            yield drive
        finally:
            drive.plug()
            subprocess.run(["umount", "--lazy", folder], check=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
        image.unlink()
