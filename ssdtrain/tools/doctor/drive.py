"""A directory for spill files: can it be used, how fast can it be, how long will it last."""

from __future__ import annotations

import os

from ssdtrain.io.files.directories import check_directories, file_system_of
from ssdtrain.io.open_engine import open_engine
from ssdtrain.stats import nbytes_text
from ssdtrain.tools.doctor.block_device import Drive, drives_below
from ssdtrain.tools.doctor.endurance import Endurance, endurance_of
from ssdtrain.tools.doctor.finding import Finding, Verdict

_LITTLE_NBYTES = 20 << 30
_SLAB_NBYTES = 1 << 20
_WORN = 80  # per cent of the rated endurance


def examine_directory(directory: str) -> list[Finding]:
    """Findings about one directory and the drives below it."""
    area = str(directory)
    try:
        unwise = check_directories([directory])
    except OSError as error:
        return [Finding(area, "directory", Verdict.BROKEN, error.strerror or str(error), "choose another directory")]
    findings = [_file_system(area, directory, unwise), _space(area, directory), *_engine(area, directory)]
    drives = drives_below(directory)
    if not drives:
        text = "no block device below, or the system does not say which"
        return [*findings, Finding(area, "drive", Verdict.UNKNOWN, text)]
    for drive in drives:
        findings += [_drive(area, drive), _scheduler(area, drive), _endurance(area, drive, endurance_of(drive.name))]
    return findings


def _file_system(area: str, directory: str, unwise: list[str]) -> Finding:
    kind = file_system_of(directory)
    if unwise:
        return Finding(area, "file system", Verdict.UNWISE, kind, f"use a local NVMe drive: {'; '.join(unwise)}")
    if kind in ("overlay", "overlayfs"):
        remedy = "mount a drive into the container and use that: a layered file system copies and may be small"
        return Finding(area, "file system", Verdict.UNWISE, kind, remedy)
    if kind in ("btrfs", "zfs"):
        remedy = "a directory with copy-on-write and compression off (chattr +C), or ext4 or xfs, is faster"
        return Finding(area, "file system", Verdict.UNWISE, kind, remedy)
    return Finding(area, "file system", Verdict.UNKNOWN if kind == "unknown" else Verdict.GOOD, kind)


def _space(area: str, directory: str) -> Finding:
    state = os.statvfs(directory)
    free, total = state.f_bavail * state.f_frsize, state.f_blocks * state.f_frsize
    text = f"{nbytes_text(free)} free of {nbytes_text(total)}"
    if free >= _LITTLE_NBYTES:
        return Finding(area, "free space", Verdict.GOOD, text)
    remedy = "free some: a large model spills tens of GiB per step; what does not fit stays in memory"
    return Finding(area, "free space", Verdict.UNWISE, text, remedy)


def _engine(area: str, directory: str) -> list[Finding]:
    try:
        choice = open_engine("auto", [directory], 16 * _SLAB_NBYTES, _SLAB_NBYTES)
    except OSError as error:
        remedy = "free space or choose another directory"
        return [Finding(area, "spill file", Verdict.BROKEN, error.strerror or str(error), remedy)]
    try:
        file = choice.files[0]
        found = [Finding(area, "engine", Verdict.GOOD, f"{choice.kind}: {choice.reason}")]
        if choice.kind == "python":
            remedy = "build the C++ extension: the engine in Python is for reference"
            found = [Finding(area, "engine", Verdict.UNWISE, f"{choice.kind}: {choice.reason}", remedy)]
        if file.is_direct:
            text = f"yes, blocks of {file.block_nbytes} bytes, memory aligned to {file.memory_alignment}"
            found.append(Finding(area, "direct I/O", Verdict.GOOD, text))
        else:
            remedy = "use a file system with O_DIRECT (ext4, xfs): else every byte goes through the page cache"
            found.append(Finding(area, "direct I/O", Verdict.UNWISE, file.direct_reason, remedy))
        return found
    finally:
        choice.close()


def _drive(area: str, drive: Drive) -> Finding:
    node = "" if drive.numa_node is None else f", NUMA node {drive.numa_node}"
    text = f"{drive.name}: {drive.model}{node}"
    if drive.is_remote:
        return Finding(area, "drive", Verdict.UNWISE, f"{text}, over a network", "use a drive in this machine")
    if drive.is_rotational and not drive.name.startswith(("vd", "xvd", "loop")):
        return Finding(area, "drive", Verdict.UNWISE, f"{text}, rotating disk", "use an SSD: this one stalls training")
    if drive.is_rotational:
        return Finding(area, "drive", Verdict.GOOD, f"{text} (what is behind it the system does not say)")
    return Finding(area, "drive", Verdict.GOOD, text)


def _scheduler(area: str, drive: Drive) -> Finding:
    if not drive.scheduler:
        return Finding(area, "I/O scheduler", Verdict.UNKNOWN, f"{drive.name}: the system does not say")
    if drive.scheduler in ("none", "noop") or not drive.name.startswith("nvme"):
        return Finding(area, "I/O scheduler", Verdict.GOOD, f"{drive.name}: {drive.scheduler}")
    remedy = f"echo none > /sys/block/{drive.name}/queue/scheduler (as root): NVMe needs none"
    return Finding(area, "I/O scheduler", Verdict.UNWISE, f"{drive.name}: {drive.scheduler}", remedy)


def _endurance(area: str, drive: Drive, endurance: Endurance | str) -> Finding:
    if isinstance(endurance, str):
        return Finding(area, "endurance", Verdict.UNKNOWN, f"{drive.name}: {endurance}")
    text = f"{drive.name}: {endurance.percent_used} % used, {endurance.written_nbytes / 1e12:.1f} TB written"
    if endurance.has_critical_warning:
        return Finding(area, "endurance", Verdict.BROKEN, f"{text}, critical warning", "replace the drive")
    if endurance.percent_used >= _WORN:
        remedy = "cap what is written (drive_writes_per_day, endurance_tbw) or use another drive"
        return Finding(area, "endurance", Verdict.UNWISE, text, remedy)
    return Finding(area, "endurance", Verdict.GOOD, text)
