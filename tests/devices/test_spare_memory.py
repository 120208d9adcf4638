"""How much memory a process may still take, by whatever limits it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

from ssdtrain.devices.spare_memory import spare_nbytes

MIB = 1 << 20


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_the_machine_is_the_limit_where_there_is_no_other(tmp_path: Path) -> None:
    assert 16 * MIB < spare_nbytes(tmp_path, tmp_path) < math.inf


def test_control_groups_of_both_versions_and_those_around(tmp_path: Path) -> None:
    """File cache counts as used there, and is given up when memory is short."""
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    write(proc / "self", cgroup="0::/user/job")
    write(
        groups / "user" / "job", memory__max=300 * MIB, memory__current=100 * MIB, memory__stat=f"inactive_file {MIB}"
    )
    assert spare_nbytes(proc, groups) == 201 * MIB
    write(groups / "user", memory__max=250 * MIB, memory__current=150 * MIB)
    assert spare_nbytes(proc, groups) == 100 * MIB
    write(groups / "user", memory__max="max", memory__current=150 * MIB)
    assert spare_nbytes(proc, groups) == 201 * MIB
    write(proc / "self", cgroup="4:cpu:/a\n3:memory:/job\n0::/")
    write(groups / "memory" / "job", memory__limit_in_bytes=64 * MIB, memory__usage_in_bytes=60 * MIB)
    assert spare_nbytes(proc, groups) == 4 * MIB
    write(groups / "memory" / "job", memory__limit_in_bytes=64 * MIB, memory__usage_in_bytes=70 * MIB)
    assert spare_nbytes(proc, groups) == 0


SCRIPT = """
import resource, sys, tempfile
import torch
import ssdtrain
from ssdtrain.devices.spare_memory import spare_nbytes
ssdtrain.offload_activations
layers = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()) for _ in range(8)])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
data = int(status["VmData"].split()[0]) * 1024
if sys.argv[1] != "none":
    resource.setrlimit(resource.RLIMIT_DATA, (data + (int(sys.argv[1]) << 20), resource.RLIM_INFINITY))
    assert spare_nbytes() <= int(sys.argv[1]) << 20
with ssdtrain.offload_activations(tempfile.mkdtemp(), min_nbytes=0, staging_nbytes="1MiB", prefetch_nbytes="1MiB") as o:
    for _ in range(3):
        layers(torch.randn(4096, 64)).square().sum().backward()
print(o.stats.num_offloaded, o.stats.plan)
"""


def test_little_is_offloaded_where_memory_is_short() -> None:
    """16 MiB saved: nothing moves after the first step where there is memory, all of it where there is not."""
    said = {}
    for limit in ("none", "80"):
        ran = subprocess.run([sys.executable, "-c", SCRIPT, limit], capture_output=True, text=True, check=True)
        num, _, plan = ran.stdout.partition(" ")
        said[limit] = int(num), plan
    assert said["none"][1].startswith("declined") and not said["80"][1].startswith("declined")
    assert said["80"][0] > said["none"][0]
