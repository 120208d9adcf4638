"""The examination of a machine: this one, and odd ones played with files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from drives import Drive
from json_outputs import documented

from ssdtrain.integrations import TESTED_TORCH, TESTED_VERSIONS
from ssdtrain.tools.doctor import Finding, Verdict, examine
from ssdtrain.tools.doctor.block_device import drives_below, drives_of
from ssdtrain.tools.doctor.drive import examine_directory
from ssdtrain.tools.doctor.endurance import Endurance, parse
from ssdtrain.tools.doctor.gpu import link_finding
from ssdtrain.tools.doctor.kernel import examine_kernel

NAMES = {"Python", "PyTorch", "C++ extension", "io_uring", "locked memory", "huge pages", "memory", "CUDA", "kvikio"}
OF_A_DIRECTORY = {"file system", "free space", "engine", "direct I/O"}


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ssdtrain", *arguments], capture_output=True, text=True, env=os.environ | environment
    )


def test_this_machine(tmp_path: Path) -> None:
    result = command("doctor", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(name in result.stdout for name in NAMES | OF_A_DIRECTORY | set(TESTED_VERSIONS))


def test_json_has_every_finding(tmp_path: Path) -> None:
    result = command("doctor", str(tmp_path), "--json")
    answer = documented("doctor", result.stdout)
    findings = answer["findings"]
    assert {finding["name"] for finding in findings} >= NAMES | OF_A_DIRECTORY
    assert sum(answer["verdicts"].values()) == len(findings)
    assert all(finding["remedy"] for finding in findings if finding["verdict"] in ("unwise", "broken"))


def test_something_broken_is_an_exit_code(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory in ("missing", "file"):
        result = command("doctor", str(tmp_path / directory), "--json")
        assert result.returncode == 1
        broken = [f for f in json.loads(result.stdout)["findings"] if f["verdict"] == "broken"]
        assert [f["name"] for f in broken] == ["directory"] and broken[0]["remedy"]


def test_without_the_extension(tmp_path: Path) -> None:
    result = command("doctor", str(tmp_path), "--json", SSDTRAIN_NO_CPP="1")
    found = {f["name"]: f for f in json.loads(result.stdout)["findings"]}
    assert result.returncode == 0
    assert {found[name]["verdict"] for name in ("C++ extension", "io_uring", "engine")} == {"unwise"}


def test_an_extension_of_other_source_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("ssdtrain._C")
    monkeypatch.delattr(module, "INTERFACE")  # as of one that was built before there was a number
    found = {finding.name: finding for finding in examine([str(tmp_path)])}
    assert found["C++ extension"].verdict is Verdict.UNWISE and "does not belong" in found["C++ extension"].found
    assert f"build it anew: rm {module.__file__} && pip install" in found["C++ extension"].remedy


def test_only_what_may_have_a_gpu_waits_for_pytorch(tmp_path: Path) -> None:
    """Importing PyTorch takes seconds: its version file says whether it could see a GPU at all."""
    for cuda, is_imported in (("None", False), ("'13.0'", True)):
        package = tmp_path / f"{is_imported}" / "torch"
        package.mkdir(parents=True)
        (package / "version.py").write_text(f"cuda = {cuda}\nhip = None\n")
        (package / "__init__.py").write_text("raise SystemExit('imported')")
        result = command("doctor", str(tmp_path), PYTHONPATH=f"{package.parent}:{os.environ.get('PYTHONPATH', '')}")
        assert (result.stderr == "imported\n") == is_imported, result.stderr
        assert bool(re.search("CUDA +absent +PyTorch is built without CUDA", result.stdout)) != is_imported


def test_public_names_are_there_without_waiting_for_pytorch() -> None:
    script = (
        "import sys, ssdtrain; assert set(ssdtrain.__all__) <= set(dir(ssdtrain)); assert 'torch' not in sys.modules;"
        "assert all(getattr(ssdtrain, name).__name__ == name for name in ssdtrain.__all__);"
        "assert 'torch' in sys.modules and not hasattr(ssdtrain, 'nonsense'); ssdtrain.integrations.transformers"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "has no attribute 'integrations': import ssdtrain.integrations.transformers" in result.stderr, result.stderr


def test_versions_that_were_not_tested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    versions = {"deepspeed": "9.9.9", "megatron-core": TESTED_VERSIONS["megatron-core"][0], "torch": "1.13.1+cu117"}
    monkeypatch.setattr("ssdtrain.tools.doctor.software.version", lambda name: versions.get(name, "1.0"))
    found = {finding.name: finding for finding in examine([str(tmp_path)])}
    assert found["deepspeed"].verdict is Verdict.UNWISE and TESTED_VERSIONS["deepspeed"][0] in found["deepspeed"].found
    assert found["megatron-core"].verdict is Verdict.GOOD
    assert found["PyTorch"].verdict is Verdict.BROKEN and "torch>=2.9" in found["PyTorch"].remedy
    versions["torch"] = "9.1.0"
    newer = {finding.name: finding for finding in examine([str(tmp_path)])}["PyTorch"]
    assert newer.verdict is Verdict.UNWISE and f"to {TESTED_TORCH[-1]}" in newer.found


def test_a_file_system_in_memory(small_tmpfs: Drive) -> None:
    found = by_name(examine_directory(str(small_tmpfs.directory)))
    assert found["file system"].verdict is Verdict.UNWISE and "tmpfs" in found["file system"].found
    assert found["free space"].verdict is Verdict.UNWISE


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_a_system_that_says_nothing(tmp_path: Path) -> None:
    """A container without /sys and /proc."""
    found = by_name(examine_kernel(tmp_path, tmp_path))
    assert found["huge pages"].verdict is Verdict.UNKNOWN
    assert drives_below(str(tmp_path), tmp_path) == [] and drives_of(259, 0, tmp_path) == []
    assert link_finding("GPU 0", tmp_path).verdict is Verdict.UNKNOWN


def test_huge_pages_that_are_off(tmp_path: Path) -> None:
    put(tmp_path / "kernel/mm/transparent_hugepage/enabled", "always madvise [never]")
    finding = by_name(examine_kernel(tmp_path, tmp_path))["huge pages"]
    assert finding.verdict is Verdict.UNWISE and "madvise" in finding.remedy


# -- drives ------------------------------------------------------------------------------------------------------------


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def block_device(sys: Path, name: str, number: str, **files: str) -> Path:
    device = sys / "devices" / name
    for key, text in files.items():
        put(device / key.replace("__", "/"), text)
    (sys / "dev/block").mkdir(parents=True, exist_ok=True)
    (sys / "dev/block" / number).symlink_to(device)
    return device


def nvme(sys: Path, name: str, number: str, **files: str) -> Path:
    plain = {"queue__rotational": "0", "queue__scheduler": "[none] mq-deadline", "device__model": "Fast 2TB  "}
    return block_device(sys, name, number, **plain | files)


def test_a_partition_is_its_drive(tmp_path: Path) -> None:
    drive = nvme(tmp_path, "nvme0n1", "259:0", device__numa_node="1")
    put(drive / "nvme0n1p2/partition", "2")
    (tmp_path / "dev/block/259:2").symlink_to(drive / "nvme0n1p2")
    (found,) = drives_of(259, 2, tmp_path)
    assert (found.name, found.model, found.is_rotational, found.scheduler) == ("nvme0n1", "Fast 2TB", False, "none")
    assert found.numa_node == 1 and not found.is_remote


def test_encryption_over_raid_over_partitions(tmp_path: Path) -> None:
    """dm-0 on md0 on two partitions: both drives."""
    raid = block_device(tmp_path, "md0", "9:0")
    mapper = block_device(tmp_path, "dm-0", "253:0")
    (mapper / "slaves").mkdir(parents=True)
    (mapper / "slaves/md0").symlink_to(raid)
    (raid / "slaves").mkdir(parents=True)
    for i in range(2):
        part = nvme(tmp_path, f"nvme{i}n1", f"259:{i}") / f"nvme{i}n1p1"
        put(part / "partition", "1")
        (raid / "slaves" / part.name).symlink_to(part)
    assert [drive.name for drive in drives_of(253, 0, tmp_path)] == ["nvme0n1", "nvme1n1"]


def test_a_drive_over_a_network(tmp_path: Path) -> None:
    nvme(tmp_path, "nvme0n1", "259:0", device__transport="tcp")
    assert drives_of(259, 0, tmp_path)[0].is_remote


def test_a_device_that_says_little(tmp_path: Path) -> None:
    block_device(tmp_path, "sda", "8:0", size="1")
    (found,) = drives_of(8, 0, tmp_path)
    assert (found.is_rotational, found.scheduler, found.numa_node) == (None, "", None)


SMARTCTL = {
    "nvme_smart_health_information_log": {"percentage_used": 7, "data_units_written": 10, "critical_warning": 0}
}
NVME = {"percent_used": 91, "data_units_written": 20, "critical_warning": 4}


def test_wear() -> None:
    assert parse(json.dumps(SMARTCTL)) == Endurance(7, 5_120_000, False)
    assert parse(json.dumps(NVME)) == Endurance(91, 10_240_000, True)
    assert parse("Permission denied") is None and parse("{}") is None


# -- GPUs --------------------------------------------------------------------------------------------------------------


def test_a_link_with_too_few_lanes(tmp_path: Path) -> None:
    for name, text in {"current_link_speed": "16.0 GT/s PCIe", "max_link_speed": "32.0 GT/s PCIe"}.items():
        put(tmp_path / name, text)
    for name, text in {"current_link_width": "8", "max_link_width": "16", "numa_node": "0"}.items():
        put(tmp_path / name, text)
    finding = link_finding("GPU 0", tmp_path)
    assert finding.verdict is Verdict.UNWISE and "x8" in finding.found and "of x16" in finding.found
    put(tmp_path / "current_link_width", "16")
    assert link_finding("GPU 0", tmp_path).verdict is Verdict.GOOD
