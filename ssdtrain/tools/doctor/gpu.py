"""CUDA driver, GPUs, their links, pinned memory and GPUDirect Storage. A machine without a GPU is fine too."""

from __future__ import annotations

import importlib.util
import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssdtrain.io.open_engine import gpudirect
from ssdtrain.tools.doctor.finding import Finding, Verdict, read_text

_AREA = "GPU"
_SYS = Path("/sys")
_PIN_NBYTES = 1 << 24
_LIMIT_SECONDS = 2.0


def examine_gpu(directories: Sequence[str], sys: Path = _SYS) -> list[Finding]:
    """Findings about every GPU that PyTorch sees."""
    if importlib.util.find_spec("torch") is None:
        return [Finding(_AREA, "CUDA", Verdict.UNKNOWN, "PyTorch is not installed")]
    if not _may_have_cuda():
        return [_without("PyTorch is built without CUDA")]
    import torch

    if not torch.cuda.is_available():
        return [_without(f"no GPU, or no driver for CUDA {torch.version.cuda}")]
    findings = [Finding(_AREA, "CUDA", Verdict.GOOD, f"PyTorch with CUDA {torch.version.cuda}"), _pinned()]
    for index in range(torch.cuda.device_count()):
        findings.append(_link(index, sys))
    return [*findings, *[_gpudirect(directory) for directory in directories]]


def _may_have_cuda() -> bool:
    """Whether PyTorch is built for GPUs, from its version file: importing PyTorch takes seconds."""
    spec = importlib.util.find_spec("torch")
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder) / "version.py"
        if file.exists():
            version = runpy.run_path(str(file))
            return version.get("cuda") is not None or version.get("hip") is not None
    return True


def _without(text: str) -> Finding:
    return Finding(_AREA, "CUDA", Verdict.ABSENT, f"{text}: training on the CPU is supported")


def _pinned() -> Finding:
    import torch

    try:
        torch.empty(_PIN_NBYTES, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        remedy = "raise the limit of locked memory: copies from pageable memory block training"
        return Finding(_AREA, "pinned memory", Verdict.UNWISE, str(error).splitlines()[0], remedy)
    return Finding(_AREA, "pinned memory", Verdict.GOOD, "can be had")


def _link(index: int, sys: Path) -> Finding:
    import torch

    properties: Any = torch.cuda.get_device_properties(index)
    name = f"GPU {index} ({properties.name}, {properties.total_memory >> 30} GiB)"
    address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    return link_finding(name, sys / "bus/pci/devices" / address)


def link_finding(name: str, device: Path) -> Finding:
    """Whether a PCIe device runs at the width and speed that it could."""
    now, most = (
        (_speed(read_text(device / f"{which}_link_speed")), read_text(device / f"{which}_link_width"))
        for which in ("current", "max")
    )
    if not now[0] or not now[1].isdigit():
        return Finding(_AREA, name, Verdict.UNKNOWN, "the system does not say how its PCIe link runs")
    node = read_text(device / "numa_node")
    where = f", NUMA node {node}" if node.isdigit() else ""
    text = f"PCIe {now[0]:g} GT/s x{now[1]}{where}"
    if most[1].isdigit() and int(now[1]) < int(most[1]):
        remedy = "move it to a slot with all lanes: copies to host memory take longer by that much"
        return Finding(_AREA, name, Verdict.UNWISE, f"{text} of x{most[1]}", remedy)
    return Finding(_AREA, name, Verdict.GOOD, text)


def _speed(text: str) -> float:
    found = re.match(r"([\d.]+) ?GT/s", text)
    return float(found[1]) if found else 0.0


def _gpudirect(directory: str) -> Finding:
    verdict = gpudirect([directory], _LIMIT_SECONDS)
    if verdict.is_real:
        return Finding(directory, "GPUDirect Storage", Verdict.GOOD, verdict.sentence)
    remedy = "nothing to do unless the drive supports it: pinned memory and io_uring are used instead"
    return Finding(directory, "GPUDirect Storage", Verdict.ABSENT, verdict.sentence, remedy)
