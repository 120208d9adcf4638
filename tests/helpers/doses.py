"""How much a run of the tests proves: `make test` a part of every product and small doses, `--long` all of it.

A test with three or more parametrizations runs in as many of their combinations as it takes for any two values of
different parametrizations to meet at least once. What engine it runs on is rotated where the kind of device varies too.
Values that belong together stand in one parametrization, of which nothing is left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import TypeVar
from zlib import crc32

import pytest

T = TypeVar("T")
Axis = tuple[str, ...]
_VARIABLE = "SSDTRAIN_TEST_LONG"
_DEVICE, _ENGINE = ("device_kind",), ("engine",)


def ask_for_all() -> None:
    """From here on the whole dose is meant, in children too."""
    os.environ[_VARIABLE] = "1"


def dose(short: T, whole: T) -> T:
    """What `make test` takes, or `--long`."""
    return whole if os.environ.get(_VARIABLE) else short


def enough_of(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Those of the items that `make test` runs, in their order."""
    functions: dict[tuple[object, str], list[pytest.Function]] = {}
    kept: set[pytest.Item] = set()
    items = list(items)
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            functions.setdefault((item.parent, item.originalname), []).append(item)
        else:
            kept.add(item)
    for cases in functions.values():
        kept.update(_pairs(cases))
    return [item for item in items if item in kept]


def _pairs(cases: Sequence[pytest.Function]) -> list[pytest.Function]:
    """The first that has most of the pairs no case has yet, again and again; its name decides among equals."""
    axes = _axes(cases)
    if len(axes) < 3:
        return list(cases)
    left = {case: _pairs_of(case, axes) for case in cases}
    missing = set().union(*left.values())
    chosen = []
    while missing:
        best = max(left, key=lambda case: (len(left[case] & missing), crc32(case.name.encode())))
        chosen.append(best)
        missing -= left.pop(best)
    return chosen


def _axes(cases: Sequence[pytest.Function]) -> list[Axis]:
    """The names that each parametrization sets, of those that differ between the cases."""
    axes = [_names(marker.args[0]) for marker in cases[0].iter_markers("parametrize")]
    others = cases[0].callspec.params.keys() - {name for axis in axes for name in axis}
    axes += [(name,) for name in sorted(others)]
    return [axis for axis in axes if len({_row(case, axis) for case in cases}) > 1]


def _names(given: str | Sequence[str]) -> Axis:
    return tuple(name.strip() for name in given.split(",")) if isinstance(given, str) else tuple(given)


def _row(case: pytest.Function, axis: Axis) -> tuple[int, ...]:
    """Which of its rows a parametrization gives a case: the values are the same objects in all cases."""
    return tuple(id(case.callspec.params[name]) for name in axis)


def _pairs_of(case: pytest.Function, axes: Sequence[Axis]) -> set[object]:
    return {
        (one, _row(case, one), other, _row(case, other))
        for one, other in combinations(axes, 2)
        if _DEVICE not in axes or _DEVICE in (one, other) or _ENGINE not in (one, other)
    }
