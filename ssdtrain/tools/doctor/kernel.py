"""What the kernel allows: io_uring, locked memory, huge pages; and the memory there is."""

from __future__ import annotations

import os
import re
import resource
import tempfile
from pathlib import Path

from ssdtrain.io.host_space import available_nbytes
from ssdtrain.io.open_engine import io_uring_problem
from ssdtrain.policy import ActivationPolicy
from ssdtrain.stats import nbytes_text
from ssdtrain.tools.doctor.finding import Finding, Verdict, read_text

_AREA = "kernel"
_PROC, _SYS = Path("/proc"), Path("/sys")
_RING_NBYTES = 1 << 20  # of locked memory: enough for the ring itself


def examine_kernel(proc: Path = _PROC, sys: Path = _SYS) -> list[Finding]:
    """Findings about limits of this process; other roots for tests."""
    return [_version(), _io_uring(proc), _memlock(), _huge_pages(sys), _memory(), _cores()]


def _version() -> Finding:
    system = os.uname()
    return Finding(_AREA, "kernel", Verdict.GOOD, f"{system.sysname} {system.release}")


def _io_uring(proc: Path) -> Finding:
    problem = io_uring_problem(tempfile.gettempdir())
    if problem is None:
        return Finding(_AREA, "io_uring", Verdict.GOOD, "allowed")
    switch = read_text(proc / "sys/kernel/io_uring_disabled")
    remedy = "threads do its work at some cost of processor time; in a container, allow the io_uring system calls"
    if switch in ("1", "2"):
        remedy = f"sysctl kernel.io_uring_disabled=0 (it is {switch}); until then threads do its work"
    return Finding(_AREA, "io_uring", Verdict.UNWISE, problem, remedy)


def _memlock() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    staging = ActivationPolicy().staging_nbytes
    if limit == resource.RLIM_INFINITY or limit >= staging + _RING_NBYTES:
        text = "unlimited" if limit == resource.RLIM_INFINITY else nbytes_text(limit)
        return Finding(_AREA, "locked memory", Verdict.GOOD, text)
    remedy = (
        f"ulimit -l {(staging + _RING_NBYTES) >> 10} (or unlimited; in limits.conf: memlock), so that the kernel can "
        "keep the staging memory registered"
    )
    return Finding(_AREA, "locked memory", Verdict.UNWISE, nbytes_text(limit), remedy)


def _huge_pages(sys: Path) -> Finding:
    text = read_text(sys / "kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", text)
    if chosen is None:
        return Finding(_AREA, "huge pages", Verdict.UNKNOWN, "the system does not say")
    if chosen[1] in ("always", "madvise"):
        return Finding(_AREA, "huge pages", Verdict.GOOD, f"transparent ones: {chosen[1]}")
    remedy = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (as root): staging is pinned faster"
    return Finding(_AREA, "huge pages", Verdict.UNWISE, f"transparent ones: {chosen[1]}", remedy)


def _memory() -> Finding:
    policy = ActivationPolicy()
    needed = policy.staging_nbytes + policy.prefetch_nbytes
    try:
        there = available_nbytes()
    except (OSError, ValueError, KeyError):
        return Finding(_AREA, "memory", Verdict.UNKNOWN, "the system does not say how much is free")
    text = f"{nbytes_text(there)} available"
    if there >= 4 * needed:
        return Finding(_AREA, "memory", Verdict.GOOD, text)
    remedy = f"lower staging_nbytes and prefetch_nbytes: with their defaults they take up to {nbytes_text(needed)}"
    return Finding(_AREA, "memory", Verdict.UNWISE, text, remedy)


def _cores() -> Finding:
    count = len(os.sched_getaffinity(0))
    if count > 1:
        return Finding(_AREA, "processor cores", Verdict.GOOD, f"{count} for this process")
    remedy = "give the process another core: engine threads copy while training computes"
    return Finding(_AREA, "processor cores", Verdict.UNWISE, f"{count} for this process", remedy)
