"""Which module of the user's model is running, for messages only.

A model that is copied or pickled meanwhile takes hooks along that belong to nobody and do nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch


class ModuleNames(threading.local):
    """Follows the forward calls of a model's modules in this thread while it watches."""

    def __init__(self, model: torch.nn.Module | None) -> None:
        """Without a model there is nothing to follow, and no cost."""
        self._model = model
        self._running: list[str] = []
        self._removable: list[list[Any]] = []

    def where(self) -> str:
        """``" of h.0.mlp"`` while that module runs, else nothing."""
        return f" of {self._running[-1]}" if self._running else ""

    def install(self) -> None:
        """Installs a pair of hooks on every module."""
        handles: list[Any] = []
        self._removable.append(handles)
        for name, module in self._model.named_modules() if self._model is not None else ():
            name = name or type(module).__name__
            handles.append(module.register_forward_pre_hook(_Hook(self._enter, name)))
            handles.append(module.register_forward_hook(_Hook(self._leave, name), always_call=True))

    def unwatch(self) -> None:
        """Removes what the latest `install` added."""
        for handle in self._removable.pop() if self._removable else ():
            handle.remove()
        if not self._removable:
            self._running.clear()

    def _enter(self, name: str) -> None:
        self._running.append(name)

    def _leave(self, name: str) -> None:
        if self._running:
            self._running.pop()


class _Hook:
    """Calls a function with a module's name; a copy, pickled or not, is the standard library's and does nothing."""

    def __init__(self, note: Callable[[str], None], name: str) -> None:
        self._note = note
        self._name = name

    def __call__(self, module: torch.nn.Module, *args: object) -> None:
        self._note(self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")
