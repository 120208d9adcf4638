"""What is released: the source distribution is whole, a wheel says what it is, and the right package is imported."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import ssdtrain

ROOT = Path(ssdtrain.__file__).parents[1]
WORKER = """
import sys
sys.path.remove("")
from ssdtrain.tools.demo.process import WorkerProcess
from ssdtrain.tools.demo.settings import DemoSettings
with WorkerProcess("plain", DemoSettings(".", layers=1, width=32, heads=1)) as worker:
    worker.start()
    print(worker.receive()["event"])
"""
NOT_EDITABLE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)];"
ENGINE = (
    "from ssdtrain.io.open_engine import open_engine; print(open_engine('auto', ['.'], 1 << 20, 1 << 16).fallbacks)"
)
DOCTOR = "from ssdtrain.tools.cli import app; app(['doctor', '.'])"
BUILD = "import setuptools.build_meta as b, sys; print(getattr(b, f'build_{sys.argv[1]}')(sys.argv[2]))"


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | own | environment)


def source_files() -> set[str]:
    """What git has, but for what is about the repository itself; in an unpacked distribution, what is there."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        files = {line for line in listed.stdout.splitlines() if (ROOT / line).exists()}
    else:
        files = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()}
    about_the_repository = (".git", ".ci/", ".github/", ".venv", ".pytest_cache/", ".hypothesis/", "build/")
    made = ("ssdtrain.egg-info/", "PKG-INFO", "setup.cfg")
    return {f for f in files if not f.startswith((*about_the_repository, *made)) and not f.endswith((".so", ".pyc"))}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, built from a copy of the sources and unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in source_files():
        (folder / "sources" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / "sources" / name)
    result = run(sys.executable, "-c", BUILD, "sdist", folder, cwd=folder / "sources")
    assert result.returncode == 0, result.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_a_source_distribution_has_everything(unpacked: Path) -> None:
    assert {f for f in source_files() if not (unpacked / f).exists()} == set()
    assert unpacked.name == f"ssdtrain-{ssdtrain.__version__}"


def test_tests_run_from_a_source_distribution(unpacked: Path) -> None:
    """Those that need no PyTorch, which takes seconds to import; the workflows run all."""
    (test,) = (unpacked / "tests").rglob("test_architecture.py")
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", test, "-k", "go_down")
    result = run(*command, cwd=unpacked, PYTHONPATH=str(unpacked))
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr


def test_a_wheel_says_what_it_is(unpacked: Path, tmp_path: Path) -> None:
    result = run(sys.executable, "-c", BUILD, "wheel", tmp_path, cwd=unpacked, SSDTRAIN_NO_CPP="1")
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"ssdtrain-{ssdtrain.__version__}.dist-info"
        about = message_from_string(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert {"ssdtrain/py.typed", "ssdtrain/_C.pyi", f"{info}/licenses/LICENSE"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"ssdtrain", info}
    assert about["Version"] == ssdtrain.__version__ and about["Author"] == "the ssdtrain developers"
    assert about["Summary"] and about["Keywords"] and about.get_all("Classifier") and about.get_all("Project-URL")
    assert "ssdtrain = ssdtrain.tools.cli:main" in entry_points
    needed = {re.split(r"[ ;<>=!\[]", text)[0] for text in about.get_all("Requires-Dist", []) if "extra ==" not in text}
    assert needed == {"torch", "pydantic", "typing_extensions", "typer", "rich"}


def test_everything_imported_is_declared() -> None:
    """What only another package's requirements happen to install may be gone with that package's next release."""
    declared = {"torch", "pydantic", "typing_extensions", "typer", "rich", "ssdtrain", "pybind11", "setuptools"}
    declared |= {"pydantic_core"}  # of one release with pydantic, whose documentation imports errors from there
    optional = {"bokeh", "kvikio", "deepspeed", "megatron", "safetensors", "numpy", "wandb", "mlflow", "tensorboard"}
    found = set()
    for path in (ROOT / "ssdtrain").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:  # what functions import is optional, and said where it is missing
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found |= {str(node.module).partition(".")[0]}
    assert found - set(sys.stdlib_module_names) <= declared | optional


def test_workers_do_not_import_from_the_current_directory(tmp_path: Path) -> None:
    """A notebook's folder, or a checkout, may have files named like packages."""
    for name in ("json.py", "random.py", "torch.py", "ssdtrain.py"):
        (tmp_path / name).write_text("raise RuntimeError('imported from the current directory')\n")
    result = run(sys.executable, "-c", WORKER, cwd=tmp_path)
    assert result.stdout == "ready\n", result.stdout + result.stderr


def test_sources_without_an_extension_say_so(tmp_path: Path) -> None:
    """In a checkout the package there hides the installed one; a reinstallation would change nothing."""
    shutil.copytree(ROOT / "ssdtrain", tmp_path / "ssdtrain", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "bindings.cpp").touch()
    result = run(sys.executable, "-c", NOT_EDITABLE + ENGINE, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    (text,) = ast.literal_eval(result.stdout)
    assert text.startswith("engines io_uring and threads are not available"), text
    assert f"from its source code in {tmp_path}" in text and f"pip install -e {tmp_path}" in text
    found = run(sys.executable, "-c", NOT_EDITABLE + DOCTOR, cwd=tmp_path, PYTHONPATH=str(tmp_path)).stdout
    assert "in another directory" in " ".join(found.split())
