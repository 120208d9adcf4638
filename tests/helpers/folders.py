"""Where things lie, for tests that start a program or a child with the helpers at hand."""

from __future__ import annotations

from pathlib import Path

HELPERS = Path(__file__).parent
TESTS = HELPERS.parent
ROOT = TESTS.parent
JOBS = TESTS / "jobs"
RECIPES = ROOT / "recipes"


def code_folders() -> list[str]:
    """The helpers' folder and all with tests: a child that has them on its path finds any function by its module."""
    folders = {path.parent for path in TESTS.rglob("test_*.py") if "standin" not in path.parts}
    return [str(HELPERS), *map(str, sorted(folders))]
