"""What `make test` leaves out of a product, and what it never does."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations

import pytest
from doses import ask_for_all
from folders import HELPERS

from ssdtrain.api.section import Section

CONFTEST = f"""
import sys
import pytest
sys.path.insert(0, {str(HELPERS)!r})
from doses import enough_of

@pytest.fixture(params=["cpu", "simulated"])
def device_kind(request):
    pass

def pytest_collection_modifyitems(items):
    items[:] = enough_of(items)
"""
PRODUCTS = """
import pytest

@pytest.mark.parametrize("c", "89")
@pytest.mark.parametrize("b", "4567")
@pytest.mark.parametrize("a", "123")
def test_three(a, b, c):
    pass

@pytest.mark.parametrize("engine", ["io_uring", "threads", "host"])
@pytest.mark.parametrize("model", "abcdef")
def test_rotated(model, engine, device_kind):
    pass

@pytest.mark.parametrize("b", "345")
@pytest.mark.parametrize("a", "12")
def test_two(a, b):
    pass

@pytest.mark.parametrize("a, b, c", [(a, b, c) for a in "12" for b in "34" for c in "56"])
def test_together(a, b, c):
    pass
"""


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, list[str]]]:
    """Of the tests above, each name and its values."""
    folder = tmp_path_factory.mktemp("products")
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_products.py").write_text(PRODUCTS)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    lines = [line.split("::")[1] for line in done.stdout.splitlines() if "::" in line]
    return [(name, values.rstrip("]").split("-")) for name, values in (line.split("[") for line in lines)]


def values_of(collected: list[tuple[str, list[str]]], name: str) -> list[list[str]]:
    return [values for found, values in collected if found == name]


def pairs_in(rows: list[list[str]]) -> set[tuple[str, str]]:
    return {pair for row in rows for pair in combinations(row, 2)}


def test_any_two_values_of_a_product_meet(collected: list[tuple[str, list[str]]]) -> None:
    rows = values_of(collected, "test_three")
    assert len(pairs_in(rows)) == 3 * 4 + 3 * 2 + 4 * 2 and 12 <= len(rows) <= 14


def test_the_engine_is_rotated_where_the_device_varies(collected: list[tuple[str, list[str]]]) -> None:
    rows = values_of(collected, "test_rotated")
    found = {frozenset(pair) for pair in pairs_in(rows)}
    for device in ("cpu", "simulated"):
        assert all({device, other} in found for other in ["io_uring", "threads", "host", *"abcdef"])
    assert len(rows) == 12


def test_two_parametrizations_and_what_one_gives_together_are_whole(collected: list[tuple[str, list[str]]]) -> None:
    assert len(values_of(collected, "test_two")) == 6
    assert len(values_of(collected, "test_together")) == 8


def test_asking_for_all_is_no_setting_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that is launched under `--long` is not refused for a variable that ssdtrain does not know."""
    monkeypatch.setattr(os, "environ", {})
    ask_for_all()
    assert os.environ and Section.from_environment(os.environ) is None
