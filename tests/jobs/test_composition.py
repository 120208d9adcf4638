"""What offload is used together with: every row of the table in the documentation is run, and compared with its page.

`python tests/helpers/composition.py` writes the page.
"""

from __future__ import annotations

from collections.abc import Iterator

import composition
import pytest
import torch
from composition import PAGE, Row, Tables
from forks import Forks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def tables(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """All rows, of one run."""
    return composition.run_all(forks, tmp_path_factory.mktemp("composition"))


def rows(tables: Tables) -> Iterator[Row]:
    for group in tables.values():
        yield from group


def test_every_row_is_equal_to_plain_training(tables: Tables) -> None:
    assert [row.name for row in rows(tables) if not row.is_equal] == []
    assert sum(1 for _ in rows(tables)) >= 115


def test_what_left_memory_came_back(tables: Tables) -> None:
    assert [row.name for row in rows(tables) if row.offloaded_nbytes and not row.read_nbytes] == []


def test_every_group_and_row_is_on_the_page(tables: Tables) -> None:
    written = composition.read_page(PAGE.read_text())
    assert {title: list(group) for title, group in written.items()} == {
        title: [row.name for row in group] for title, group in tables.items()
    }, f"run `python {composition.__file__}`"


def test_bytes_move_and_stay_as_the_page_says(tables: Tables) -> None:
    """Numbers differ from machine to machine, and reasons between versions of PyTorch; whether bytes move does not."""
    text = PAGE.read_text()
    is_same_version = f"PyTorch {torch.__version__.partition('+')[0]} " in text
    for title, group in composition.read_page(text).items():
        for row in tables[title]:
            equal, moves, why = group[row.name]
            now = composition.read_row(row.words)
            assert (equal, moves) == now[:2], row.words
            assert not is_same_version or why == now[2], row.words
