"""Which module of the user's model is running, for messages and for the spans of a profiler.

A model that is copied or pickled meanwhile takes hooks along that belong to nobody and do nothing. In a graph of the
compiler there are no modules: what is saved there is of the module that was compiled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from ssdtrain.tracing.module_spans import ModuleSpans

_is_traced = torch.compiler.is_compiling


class ModuleNames(threading.local):
    """Follows the forward calls of a model's modules in this thread while it watches."""

    def __init__(self, model: torch.nn.Module | None, spans: ModuleSpans) -> None:
        """Without a model there is nothing to follow, and no cost. `spans`: what a profiler sees of it."""
        self._model, self._spans = model, spans
        self._running: list[str] = []
        self._removable: list[list[Any]] = []

    def where(self) -> str:
        """``" of h.0.mlp"`` while that module runs, else nothing."""
        return f" of {self._name(self._running[-1])}" if self._running else ""

    def _name(self, name: str) -> str:
        return name or type(self._model).__name__

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
            while self._running:
                self._end()

    def _end(self, result: object = None) -> str:
        """The innermost module runs no more, and has returned this."""
        self._spans.leave(result)
        return self._running.pop()

    def _enter(self, name: str, _: object) -> None:
        """What it is not inside of runs no more, or has called a module that is not its own.

        Neither does the same module: its forward has raised.
        """
        running = self._running
        while running and not _is_inside(name, running[-1]):
            self._end()
        running.append(name)
        self._spans.enter(self._name(name))

    def _leave(self, name: str, result: object) -> None:
        while name in self._running and self._end(result) != name:
            pass


def _is_inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(f"{outer}."))


class _Hook:
    """Calls a function with a module's name and its last argument, of a hook after forward what the module returned.

    A copy, pickled or not, is the standard library's and does nothing.
    """

    def __init__(self, note: Callable[[str, object], None], name: str) -> None:
        self._note = note
        self._name = name

    def __call__(self, module: torch.nn.Module, *args: object) -> None:
        if not _is_traced():
            self._note(self._name, args[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")
