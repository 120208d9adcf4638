"""Is this machine fit? Looks at software, kernel, drives and GPUs, and says for each what to do about it.

Knows machines and engines, no tensors. Reads what the system tells (`/proc`, `/sys`, installed packages) and opens
the engine once per directory. It changes nothing, and what it cannot find out it says so.

Example:
    >>> for finding in examine(["/mnt/nvme"]):
    ...     print(finding.verdict, finding.name, finding.found, finding.remedy)
"""

from __future__ import annotations

from collections.abc import Sequence

from ssdtrain.tools.doctor.drive import examine_directory
from ssdtrain.tools.doctor.finding import Finding, Verdict
from ssdtrain.tools.doctor.gpu import examine_gpu
from ssdtrain.tools.doctor.kernel import examine_kernel
from ssdtrain.tools.doctor.software import examine_software

__all__ = ["Finding", "Verdict", "examine"]


def examine(directories: Sequence[str]) -> list[Finding]:
    """All findings, by area: software, kernel, GPU, then each directory."""
    findings = [*examine_software(), *examine_kernel(), *examine_gpu(directories)]
    for directory in directories:
        findings += examine_directory(directory)
    return findings
