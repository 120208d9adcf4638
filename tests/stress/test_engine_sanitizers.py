"""The C++ engine under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, with and without faults."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from folders import ROOT

CSRC = ROOT / "csrc"
SOURCES = sorted(path for path in CSRC.glob("*.cpp") if path.name != "bindings.cpp")
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-fno-sanitize-recover=all"]
NUM_ROUNDS = 300

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def stress_test(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, compiled under one set of sanitizers."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    build = tmp_path_factory.mktemp("stress")
    sanitize = f"-fsanitize={request.param}"
    (build / "empty.cpp").write_text("int main() {}\n")
    probe = subprocess.run(
        [compiler, sanitize, "-pthread", build / "empty.cpp", "-o", build / "empty"], capture_output=True, text=True
    )
    if probe.returncode != 0 or subprocess.run([build / "empty"], capture_output=True).returncode != 0:
        pytest.skip(f"no runtime for {sanitize}: {probe.stderr.strip()}")

    def compile_one(source: Path) -> Path:
        target = build / f"{source.stem}.o"
        result = subprocess.run(
            [compiler, *FLAGS, sanitize, "-c", source, "-o", target], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    subprocess.run([compiler, sanitize, "-pthread", *objects, "-o", build / "stress_test"], check=True)
    return build / "stress_test"


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("kind", ["io_uring", "threads"])
def test_stress(stress_test: Path, tmp_path: Path, kind: str, seed: int) -> None:
    command = [stress_test, tmp_path, kind, str(NUM_ROUNDS), str(seed)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "Expected io_uring_setup to succeed" in result.stderr:
        pytest.skip("the kernel forbids io_uring")
    assert result.returncode == 0, result.stderr[-8000:]
    assert "retries" in result.stdout
    assert list(tmp_path.iterdir()) == []
