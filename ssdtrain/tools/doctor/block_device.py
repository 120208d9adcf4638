"""The block device below a directory, as `/sys` describes it: partitions, device mapper and RAID resolved."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ssdtrain.tools.doctor.finding import read_text

_SYS = Path("/sys")
_KINDS = {
    "vd": "virtual drive",
    "xvd": "virtual drive",
    "loop": "file as a drive",
    "nvme": "NVMe",
    "sd": "SCSI or SATA",
}


@dataclass(frozen=True)
class Drive:
    """One physical (or virtual) drive."""

    name: str
    model: str
    is_rotational: bool | None
    """None where the kernel does not say."""
    scheduler: str
    numa_node: int | None
    is_remote: bool
    """Reached over a network (NVMe over Fabrics, iSCSI, network block device)."""


def drives_below(directory: str, sys: Path = _SYS) -> list[Drive]:
    """The drives that hold `directory`; none where the file system has no block device or `/sys` is missing."""
    try:
        number = os.stat(directory).st_dev
    except OSError:
        return []
    return drives_of(os.major(number), os.minor(number), sys)


def drives_of(major: int, minor: int, sys: Path = _SYS) -> list[Drive]:
    """The drives below one block device."""
    link = sys / "dev/block" / f"{major}:{minor}"
    try:
        device = link.resolve(strict=True)
    except OSError:
        return []
    found: dict[str, Drive] = {}
    _collect(device, found, 0)
    return list(found.values())


def _collect(device: Path, found: dict[str, Drive], depth: int) -> None:
    """Follows partitions up to their drive, and mappings down to what they are made of."""
    if (device / "partition").exists():
        device = device.parent
    try:
        slaves = sorted((device / "slaves").iterdir())
    except OSError:
        slaves = []
    if slaves and depth < 8:
        for slave in slaves:
            _collect(slave.resolve(), found, depth + 1)
    else:
        found[device.name] = _drive(device)


def _drive(device: Path) -> Drive:
    model = read_text(device / "device/model")
    transport = read_text(device / "device/transport")
    rotational = read_text(device / "queue/rotational")
    scheduler = read_text(device / "queue/scheduler")
    chosen = scheduler[scheduler.find("[") + 1 : scheduler.find("]")] if "[" in scheduler else scheduler
    return Drive(
        device.name,
        model or _kind(device.name),
        {"0": False, "1": True}.get(rotational),
        chosen,
        _numa_node(device),
        transport in ("tcp", "rdma", "fc", "loop") or device.name.startswith(("nbd", "rbd")),
    )


def _kind(name: str) -> str:
    return next((kind for prefix, kind in _KINDS.items() if name.startswith(prefix)), "block device")


def _numa_node(device: Path) -> int | None:
    for place in (device / "device/numa_node", device / "device/device/numa_node"):
        text = read_text(place)
        if text.lstrip("-").isdigit():
            return int(text) if int(text) >= 0 else None
    return None
