"""Methods of one object with something put round them, until they are as they were."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

Method = Callable[..., Any]


class Methods:
    """Keeps what an object's methods were, and does not keep the object."""

    def __init__(self, owner: object) -> None:
        """Changes nothing yet."""
        self._owner = weakref.ref(owner)
        self._before: dict[str, Method | None] = {}  # None: it was the class's

    def put_round(self, **wrappers: Method) -> None:
        """Has `wrapper(original, *arguments)` called in the place of a method of that name."""
        owner: Any = self._owner()
        for name, wrapper in wrappers.items():
            self._before[name] = vars(owner).get(name)
            original = getattr(owner, name)
            setattr(owner, name, functools.wraps(original)(functools.partial(wrapper, original)))

    def restore(self) -> None:
        """Leaves the object as it was found."""
        owner: Any = self._owner()
        for name, original in self._before.items() if owner is not None else ():
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        self._before = {}
