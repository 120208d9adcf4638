"""The kvikio engine, by the tests of all engines and by its own, and what is said about GPUDirect.

kvikio wants a driver when its process starts, so what runs it runs in a pytest of its own, with a stand-in for the
driver (`libcuda_stub.c`). `kvikio_cases.py` is not collected by itself for that reason.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from folders import ROOT

from ssdtrain import ActivationPolicy
from ssdtrain.io.kvikio.probe import GpuDirect, judge, probe
from ssdtrain.io.open_engine import KINDS, gpudirect, open_engine

LIMIT_SECONDS = 600
FILES = [
    "tests/io/test_engine.py",
    "tests/io/test_engine_faults.py",
    "tests/store/test_state_store.py",
    "tests/store/test_drive.py",
    "tests/io/kvikio_cases.py",
]


@pytest.fixture(scope="module")
def passed(kvikio_environment: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Counter[str]:
    """How many tests of each file passed in one process; none may fail or be skipped.

    In a folder of its own: a second run in the common one takes away what other users were let into there.
    """
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", "kvikio"]
    command += ["--basetemp", str(tmp_path_factory.mktemp("session"))]
    done = subprocess.run(
        [*command, *FILES], cwd=ROOT, env=kvikio_environment, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "SKIPPED" not in done.stdout, done.stdout
    return Counter(re.findall(r"^(\S+)::.* PASSED", done.stdout, re.MULTILINE))


@pytest.mark.slow
def test_keeps_the_promises_of_all_engines(passed: Counter[str]) -> None:
    assert passed["tests/io/test_engine.py"] + passed["tests/io/test_engine_faults.py"] >= 60


@pytest.mark.slow
def test_keeps_parameters_and_optimizer_state(passed: Counter[str]) -> None:
    """Also with activations on the same engine."""
    assert passed["tests/store/test_state_store.py"] + passed["tests/store/test_drive.py"] >= 10


@pytest.mark.slow
def test_keeps_its_own(passed: Counter[str]) -> None:
    assert passed["tests/io/kvikio_cases.py"] >= 30


def test_policy_knows_every_engine() -> None:
    for kind in KINDS:
        assert ActivationPolicy(engine=kind).engine == kind  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- what is missing


def pretend_kvikio(folder: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name which is imported instead."""
    (folder / "kvikio").mkdir()
    (folder / "kvikio" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))


def test_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, it is an error with the command to type; for "auto" on the host it is not even looked for."""
    pretend_kvikio(tmp_path, "raise ModuleNotFoundError(\"No module named 'kvikio'\")", monkeypatch)
    spill = tmp_path / "spill"
    spill.mkdir()
    with pytest.raises(RuntimeError, match=r"Expected engine 'kvikio' .*pip install \"ssdtrain\[gds\]\""):
        open_engine("kvikio", [str(spill)], 1 << 20, 1 << 16)
    choice = open_engine("auto", [str(spill)], 1 << 20, 1 << 16)
    assert "kvikio" not in choice.reason
    choice.close()
    choice = open_engine("auto", [str(spill)], 1 << 20, 1 << 16, device_index=0)
    assert choice.kind != "kvikio"
    assert "kvikio is not preferred" in choice.reason and "pip install" in choice.reason
    assert not any("kvikio" in text for text in choice.fallbacks)
    choice.close()


def test_a_probe_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_kvikio(tmp_path, "while True: pass", monkeypatch)
    began = time.monotonic()
    verdict = probe([str(tmp_path)], timeout_seconds=2)
    assert time.monotonic() - began < 30
    assert verdict == GpuDirect("unavailable", ("the probe ended early: no answer within 2 s",))


def test_a_probe_that_crashes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_kvikio(tmp_path, "import os, sys; sys.stderr.write('boom'); os._exit(7)", monkeypatch)
    assert probe([str(tmp_path)]).reasons == ("the probe ended early: exit status 7: boom",)


def test_no_driver(tmp_path: Path, kvikio_environment: Mapping[str, str]) -> None:
    """The real kvikio where there is no libcuda: cuFile would spin for ever, so nobody asks it."""
    script = f"""
from ssdtrain.io.open_engine import open_engine
try:
    open_engine("kvikio", [{str(tmp_path)!r}], 1 << 20, 1 << 16)
except RuntimeError as error:
    print(error)
"""
    environment = {k: v for k, v in kvikio_environment.items() if k != "LD_LIBRARY_PATH"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "there is no NVIDIA driver" in done.stdout and "use engine='auto'" in done.stdout


# ------------------------------------------------------------------------------------------------------ the verdict

PLACE = "/mnt/nvme is xfs on /dev/nvme0n1"
FACTS = {
    "ending": "",
    "directory": "/mnt/nvme",
    "file_system": "xfs on /dev/nvme0n1",
    "has_udev": True,
    "is_wsl": False,
    "has_nvidia_fs": True,
    "compat_mode_variable": "",
    "cufile_json": "/etc/cufile.json",
    "is_compat_forced": False,
    "kvikio_error": "",
    "libcuda_error": "",
    "cufile_version": [1, 16],
    "is_posix_preferred": False,
}


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"has_udev": False}, "/run/udev is not readable"),
        ({"cufile_version": [0, 0]}, "libcufile.so.0 does not load"),
        ({"is_wsl": True}, "this is WSL"),
        ({"compat_mode_variable": "ON"}, "KVIKIO_COMPAT_MODE=ON asks for it"),
        ({}, "does not say why"),
    ],
)
def test_posix_mode_says_why(changes: dict[str, object], reason: str) -> None:
    verdict = judge(FACTS | {"is_posix_preferred": True} | changes, {})
    assert (verdict.mode, verdict.is_real) == ("posix", False)
    assert verdict.sentence.startswith("POSIX mode of kvikio: ") and verdict.sentence.endswith(PLACE)
    assert reason in verdict.reasons[0]


def test_cufile_that_never_answers_is_not_used() -> None:
    verdict = judge(FACTS | {"ending": "no answer within 30 s"}, {})
    assert verdict == GpuDirect("posix", ("cuFile does not work: no answer within 30 s", PLACE))


def test_gpudirect_is_believed_only_after_a_transfer() -> None:
    verdict = judge(FACTS | {"transfer": ""}, {})
    assert verdict.is_real
    assert verdict.sentence.startswith("GPUDirect: a transfer with cuFile's compatibility mode off")


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"has_nvidia_fs": False}, "the kernel module nvidia_fs is not loaded"),
        ({"cufile_json": ""}, "there is no cufile.json"),
        ({"is_compat_forced": True}, "/etc/cufile.json forces cuFile's compatibility mode"),
    ],
)
def test_compatibility_mode_of_cufile_says_why(changes: dict[str, object], reason: str) -> None:
    strict = FACTS | {"transfer": "RuntimeError: cuFile error: GPUDirect Storage not supported"} | changes
    verdict = judge(strict, FACTS | {"transfer": ""})
    assert verdict == GpuDirect("cufile", (str(strict["transfer"]), reason, PLACE))
    verdict = judge(strict, FACTS | {"transfer": "OSError: no"})
    assert verdict.mode == "posix" and verdict.reasons[0] == "OSError: no" and reason in verdict.reasons


def test_the_worst_directory_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_kvikio(tmp_path, "raise ImportError('no')", monkeypatch)
    assert gpudirect([str(tmp_path), str(tmp_path), "/"]).mode == "unavailable"
