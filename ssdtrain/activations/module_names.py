"""Which module of the user's model is running, for messages only.

A model that is copied or pickled meanwhile takes hooks along that belong to nobody and do nothing. In a graph of the
compiler there are no modules: what is saved there is of the module that was compiled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

_is_traced = torch.compiler.is_compiling


class ModuleNames(threading.local):
    """Follows the forward calls of a model's modules in this thread while it watches."""

    def __init__(self, model: torch.nn.Module | None) -> None:
        """Without a model there is nothing to follow, and no cost."""
        self._model = model
        self._running: list[str] = []
        self._removable: list[list[Any]] = []

    def where(self) -> str:
        """``" of h.0.mlp"`` while that module runs, else nothing."""
        return f" of {self._running[-1] or type(self._model).__name__}" if self._running else ""

    def install(self) -> None:
        """Installs a pair of hooks on every module.

        None is called for a forward that raises: the compiler would guard such hooks one by one, and compile every
        block anew. See `_enter`.
        """
        handles: list[Any] = []
        self._removable.append(handles)
        for name, module in self._model.named_modules() if self._model is not None else ():
            handles.append(module.register_forward_pre_hook(_Hook(self._enter, name)))
            handles.append(module.register_forward_hook(_Hook(self._leave, name)))

    def unwatch(self) -> None:
        """Removes what the latest `install` added."""
        for handle in self._removable.pop() if self._removable else ():
            handle.remove()
        if not self._removable:
            self._running.clear()

    def _enter(self, name: str) -> None:
        """What it is not inside of runs no more, or has called a module that is not its own."""
        running = self._running
        while running and not _is_inside(name, running[-1]):
            running.pop()
        running.append(name)

    def _leave(self, name: str) -> None:
        running = self._running
        while name in running and running.pop() != name:
            pass


def _is_inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


class _Hook:
    """Calls a function with a module's name; a copy, pickled or not, is the standard library's and does nothing."""

    def __init__(self, note: Callable[[str], None], name: str) -> None:
        self._note = note
        self._name = name

    def __call__(self, module: torch.nn.Module, *args: object) -> None:
        if not _is_traced():
            self._note(self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")
