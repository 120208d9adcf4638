"""A callback that has a session, and how a trainer that tells callbacks of no exception is made to leave it.

An adapter says which event of its trainer means what: ``on_step_begin = SessionCallback.enter``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from ssdtrain.api.section import Section
from ssdtrain.api.session import Offload

_MARK = "_ssdtrain_original"


class SessionCallback:
    """Offloads what `ssdtrain.Offload`, which takes the same arguments, offloads; its `session` has the statistics."""

    def __init__(self, *directory: Any, **features: Any) -> None:
        """Opens nothing before training begins."""
        self.session = Offload(*directory, **features)

    @classmethod
    def of_environment(cls) -> list[Any]:
        """One that does as the environment says; none where it says nothing. For entry points of trainers."""
        section = Section.from_environment()
        return [cls(section)] if section is not None else []

    def enter(self, *_: Any, **__: Any) -> None:
        """An event after which a forward comes."""
        self.session.enter()

    def leave(self, *_: Any, **__: Any) -> None:
        """An event after which backward is over, or something was raised."""
        self.session.leave()

    def end(self, *_: Any, **__: Any) -> None:
        """Training is over: parameters and state stay on the drive, where the model can be saved and evaluated."""
        self.session.end()


def the_only_one(callbacks: Iterable[object]) -> SessionCallback | None:
    """Ours among a trainer's callbacks.

    Raises:
        ValueError: there are several.
    """
    ours = [callback for callback in callbacks if isinstance(callback, SessionCallback)]
    if len(ours) > 1:
        raise ValueError(
            f"Expected one ssdtrain callback, got {len(ours)}: remove all but one from callbacks=[...], or unset "
            "SSDTRAIN_DIR where the environment adds one"
        )
    return ours[0] if ours else None


def put_round(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Has `wrapper(original, *arguments)` called in the place of a method; nothing to do a second time."""
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, _MARK, original)
    setattr(owner, name, wrapped)


def add_to_all(owner: Any, make: Callable[[], object], callbacks_of: Callable[[Any], Iterable[object]]) -> None:
    """Has every trainer that is made without our callback get one by its `add_callback`."""

    def init_and_add(original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> None:
        original(trainer, *args, **kwargs)
        if the_only_one(callbacks_of(trainer)) is None:
            trainer.add_callback(make())

    put_round(owner, "__init__", init_and_add)


def leave_after(owner: Any, name: str, callbacks_of: Callable[[Any], Iterable[object]]) -> None:
    """Has a trainer's method look at its callbacks first, and leave our hooks however it ends."""

    def call_and_leave(original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
        ours = the_only_one(callbacks_of(trainer))
        try:
            return original(trainer, *args, **kwargs)
        finally:
            if ours is not None:
                ours.leave()

    put_round(owner, name, call_and_leave)
