"""The C++ engine under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, with and without faults."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest
from doses import dose
from folders import ROOT

CSRC = ROOT / "csrc"
SOURCES = sorted(path for path in CSRC.glob("*.cpp") if path.name != "bindings.cpp")
FLAGS = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-pthread", "-fno-sanitize-recover=all"]
NUM_ROUNDS = dose(75, 300)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def stress_test(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, compiled under one set of sanitizers; kept in `build/` for as long as its sources are the same."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    sanitize = f"-fsanitize={request.param}"
    kept = ROOT / "build" / "sanitizers" / digest(compiler, sanitize)
    if kept.exists():
        return kept
    build = tmp_path_factory.mktemp("stress")
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
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(build / "stress_test", kept.with_suffix(f".{os.getpid()}"))
    os.replace(kept.with_suffix(f".{os.getpid()}"), kept)
    return kept


def digest(compiler: str, sanitize: str) -> str:
    """Of all that the program is made of."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    made_of = sha256(repr((FLAGS, sanitize, version)).encode())
    for path in sorted([*SOURCES, *CSRC.glob("*.h")]):
        made_of.update(path.name.encode() + path.read_bytes())
    return made_of.hexdigest()[:24]


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
