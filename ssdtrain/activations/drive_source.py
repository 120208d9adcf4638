"""Where an offload has its drive from, each time it opens one: another's, files that were kept, or new ones.

Knows directories and which of them are not used any more; neither records nor what moves them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ssdtrain.devices.registry import Devices
from ssdtrain.io.client import Drive, open_drive
from ssdtrain.io.engine import SpillFile
from ssdtrain.io.host_space import host_limit_nbytes
from ssdtrain.io.kept_files import KeptFiles
from ssdtrain.io.open_engine import close_files
from ssdtrain.policy import ActivationPolicy

Attach = Callable[[Callable[[str], None], int | None, int | None, Iterable[str]], Drive]
"""`Drive.attach` of another's drive."""


class DriveSource:
    """Opens the drives of one offload, one after the other. Files are opened once: between engines they are kept."""

    def __init__(
        self,
        directories: Sequence[str],
        policy: ActivationPolicy,
        devices: Devices,
        note_fallback: Callable[[str], None],
        attach: Attach | None = None,
    ) -> None:
        """Opens nothing yet. `attach`: takes a share of another's drive instead."""
        self.has_directories = bool(directories)
        self.is_shared = attach is not None
        self._directories, self._policy, self._devices = directories, policy, devices
        self._note_fallback, self._attach = note_fallback, attach
        self._retired: set[str] = set()  # directories that are not used any more
        self._kept = KeptFiles(policy.io_timeout_seconds)

    def open(self, slab_nbytes: int) -> Drive | None:
        """A drive with slabs of so many bytes; None when no directory is left.

        Raises:
            OSError: no directory can be used.
            RuntimeError: the engine asked for by name is not available.
        """
        p = self._policy
        self.settle()
        kept = {file.directory: file for file in self._kept.take()}
        directories = [directory for directory in self._directories if directory not in self._retired]
        if self._directories and not directories:
            return None
        if self._attach is not None:
            return self._attach(self._note_fallback, p.disk_nbytes, p.host_nbytes, self._retired)
        try:
            places = [kept.get(directory, directory) for directory in directories]
            return self._open_on(self._kept.kind if kept else p.engine, places, slab_nbytes)
        except RuntimeError:  # that engine cannot be had any more
            close_files(list(kept.values()), 0.0)
            if not kept or p.engine != "auto":
                raise
        return self._open_on(p.engine, directories, slab_nbytes)

    def _open_on(self, kind: str, places: Sequence[str | SpillFile], slab_nbytes: int) -> Drive:
        p = self._policy
        return open_drive(
            kind,
            places,
            p.staging_nbytes,
            slab_nbytes,
            note_fallback=self._note_fallback,
            leave_out=self._retired.add,
            checksum=p.checksum,
            disk_nbytes=p.disk_nbytes,
            host_nbytes=host_limit_nbytes(p.host_nbytes, has_directories=self.has_directories),
            device_index=self._devices.gpu_index(),
            timeout_seconds=p.io_timeout_seconds,
            keeps_files=True,
        )

    def take_back(self, drive: Drive | None, retired: Iterable[str]) -> None:
        """Its engine has ended: keeps the files, but for those in directories that are not used any more."""
        self._retired.update(retired)
        if drive is None or self.is_shared or not drive.is_closed:
            return
        self._kept.keep(drive.kind, [file for file in drive.files if file.directory not in self._retired])
        close_files([file for file in drive.files if file.directory in self._retired], 0.0)

    def settle(self) -> None:
        """Waits until the room of files that are kept is given back."""
        for directory, why in self._kept.settle():
            self._retired.add(directory)
            self._note_fallback(f"{directory}: not used any more: {why}")

    def close(self) -> None:
        """Closes the files that are kept."""
        self._kept.close()

    def leave_to_parent(self) -> None:
        """This is a forked child: the files are the parent's."""
        self._kept = KeptFiles(self._policy.io_timeout_seconds)
