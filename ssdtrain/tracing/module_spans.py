"""Spans of modules in the traces of `torch.profiler`: `ssdtrain::forward h.0.mlp`, `ssdtrain::backward h.0.mlp`.

Knows names and autograd's nodes, and no modules. Without an active profiler nothing is noted and no hook installed.

[Note: whose node]
Nodes are numbered in the order in which a thread makes them. While modules run it is noted from which number on the
nodes are whose; when the outermost one returns, each node that led to what it returns gets a pair of hooks, and its
backward is one span of the innermost module that made it. So spans of backward lie inside those of autograd's own.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from typing import Any

import torch
from torch.profiler import record_function
from torch.utils._pytree import tree_leaves

from ssdtrain.tracing.spans import is_profiled

_next_number = torch._C._autograd._get_sequence_nr


class ModuleSpans(threading.local):
    """Spans of the modules that run in this thread."""

    def __init__(self) -> None:
        """None runs."""
        self._open: list[tuple[str, record_function | None]] = []
        self._numbers: list[int] = []  # from each of them on, nodes are of the module of the same position
        self._names: list[str] = []

    def enter(self, name: str) -> None:
        """A module begins to run, inside those that do."""
        opened = None
        if is_profiled():
            opened = record_function(f"ssdtrain::forward {name}")
            opened.__enter__()
            self._note(name)
        self._open.append((name, opened))

    def leave(self, result: Any = None) -> None:
        """The innermost module is over, and has returned this."""
        _, opened = self._open.pop()
        if opened is not None:
            opened.__exit__(None, None, None)
        if not self._numbers:
            return
        if self._open:
            self._note(self._open[-1][0])
            return
        numbers, names, self._numbers, self._names = self._numbers, self._names, [], []
        if is_profiled():
            self._watch(result, numbers, names)

    def _note(self, name: str) -> None:
        self._numbers.append(_next_number())
        self._names.append(name)

    def _watch(self, result: Any, numbers: list[int], names: list[str]) -> None:
        """See [Note: whose node]."""
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
        end, seen = _next_number(), set(waiting)
        while waiting:
            node = waiting.pop()
            number = node._sequence_nr()
            if not numbers[0] <= number < end:  # made before, or one that accumulates gradients
                continue
            backward = _Backward(names[bisect_right(numbers, number) - 1], self)
            node.register_prehook(backward.begin)
            node.register_hook(backward.end)
            fresh = {following for following, _ in node.next_functions if following is not None} - seen
            seen |= fresh
            waiting += fresh

    @property
    def depth(self) -> int:
        """So many modules run."""
        return len(self._open)

    def cut(self, depth: int) -> None:
        """Ends the spans of all but so many: a checkpoint has stopped them once it had what backward needs."""
        for i in reversed(range(depth, len(self._open))):
            name, opened = self._open[i]
            self._open[i] = name, None
            if opened is not None:
                opened.__exit__(None, None, None)


class _Backward:
    """The span of one node's backward, begun before it and ended after."""

    def __init__(self, name: str, modules: ModuleSpans) -> None:
        self._name, self._modules = name, modules
        self._opened: tuple[record_function, int] | None = None

    def begin(self, *_: object) -> None:
        if is_profiled():
            opened = record_function(f"ssdtrain::backward {self._name}")
            self._opened = opened, self._modules.depth
            opened.__enter__()

    def end(self, *_: object) -> None:
        if self._opened is not None:
            (opened, depth), self._opened = self._opened, None
            self._modules.cut(depth)
            opened.__exit__(None, None, None)
