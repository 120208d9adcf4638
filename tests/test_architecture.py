"""The file list is the architecture: imports go down it only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ssdtrain"

# From the bottom up: a room may import the rooms before it.
ROOMS = [
    "policy",
    "directories",
    "stats",
    "state_stats",
    "planner",
    "observer",
    "loggers",
    "run_record",
    "report",
    "extents",
    "_C",
    "_python_engine",
    "_kvikio_engine",
    "engine",
    "engines",
    "space",
    "drive",
    "device",
    "cuda",
    "devices",
    "simulated",
    "books",
    "identity",
    "timing",
    "recording",
    "trace",
    "record",
    "index",
    "route",
    "bandwidth",
    "agreement",
    "adaptation",
    "schedule",
    "transport",
    "reloads",
    "store",
    "watch",
    "saving",
    "modules",
    "blocks",
    "recompute",
    "activations",
    "slots",
    "vault",
    "mapped",
    "order",
    "residence",
    "parameter_blocks",
    "uses",
    "parameter_hooks",
    "parameters",
    "parameter_files",
    "pages",
    "gradients",
    "host_copies",
    "refusals",
    "plain_optimizer",
    "optimizer_state",
    "step_progress",
    "cpu_jobs",
    "cpu_updates",
    "updates",
    "optimizer",
    "offloading",
    "__init__",
    "integrations",
    "launch",
    "demo",
    "doctor",
    "bench",
    "estimate",
    "cli",
    "__main__",
]
TOP_LEVEL = {"setup.py", "ssdtrain", "csrc", "tests", "recipes", "README.md", "pyproject.toml", "Makefile", "LICENSE"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py").removesuffix(".pyi")


def imported_rooms(path: Path) -> set[str]:
    """Rooms a file imports at run time (imports for type checkers only do not count)."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    rooms = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ssdtrain":
            parts = (node.module or "").split(".")
            if len(parts) > 1:
                rooms.add(parts[1])
            else:
                rooms |= {a.name if (a.name in ROOMS) else "__init__" for a in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "ssdtrain":
                    rooms.add(parts[1] if len(parts) > 1 else "__init__")
    return rooms


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = room_of(path)
    assert own in ROOMS, f"{path.name} is a new room: give it a place in ROOMS"
    for room in imported_rooms(path) - {own}:
        assert ROOMS.index(room) < ROOMS.index(own), f"{own} imports {room}, which is above it"


def test_only_engines_touches_the_extension() -> None:
    hidden = {"_C", "_python_engine", "_kvikio_engine"}
    users = {room_of(path) for path in PACKAGE.rglob("*.py") if hidden & imported_rooms(path)}
    assert users - hidden == {"engines"}


def test_cpp_knows_bytes_and_only_the_bindings_know_python() -> None:
    for path in (ROOT / "csrc").iterdir():
        text = path.read_text()
        assert "#include <torch" not in text and "#include <ATen" not in text, path.name
        assert path.name == "bindings.cpp" or ("pybind11" not in text and "Python.h" not in text), path.name


def test_schedule_decides_and_store_moves() -> None:
    assert "store" not in imported_rooms(PACKAGE / "schedule.py")
    assert "schedule" not in imported_rooms(PACKAGE / "store.py")
    torch_users = {p.stem for p in PACKAGE.glob("*.py") if "import torch" in p.read_text()}
    assert not torch_users & {
        "policy",
        "directories",
        "stats",
        "state_stats",
        "extents",
        "space",
        "trace",
        "schedule",
        "engine",
        "engines",
    }


def test_no_module_level_state() -> None:
    """Shared things live in one object that is passed down: no lists, dicts or counters at module level."""
    for path in PACKAGE.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.Dict | ast.Set | ast.Call):
                name = ast.unparse(node.targets[0])
                is_constant = name.lstrip("_").isupper() or name in {"logger", "__all__", "Nbytes", "_NEXT"}
                assert is_constant or name[0].isupper() or name == "app", f"{path.name}: {name}"


def test_top_level_is_what_the_readme_says() -> None:
    import subprocess

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tops = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {t for t in tops if not t.startswith(".")} <= TOP_LEVEL | {"CHANGELOG.md"}
