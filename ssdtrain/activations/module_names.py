"""Which module of the user's model is running, for messages only."""

from __future__ import annotations

import threading
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

    def watch(self) -> None:
        """Installs a pair of hooks on every module."""
        handles: list[Any] = []
        self._removable.append(handles)  # first: an interrupt may come between any two of them
        for name, module in self._model.named_modules() if self._model is not None else ():
            handles.append(module.register_forward_pre_hook(self._entering(name or type(module).__name__)))
            handles.append(module.register_forward_hook(self._leaving, always_call=True))

    def unwatch(self) -> None:
        """Removes what the latest `watch` installed."""
        for handle in self._removable.pop():
            handle.remove()
        if not self._removable:
            self._running.clear()

    def _entering(self, name: str) -> Any:
        def hook(module: torch.nn.Module, args: object) -> None:
            self._running.append(name)

        return hook

    def _leaving(self, module: torch.nn.Module, args: object, output: object) -> None:
        if self._running:
            self._running.pop()
