"""Sizes and strides in a backward graph: numbers, or symbols that the graph is given.

Knows one graph, to which it adds nodes that compute sizes from symbols.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

Size = int | fx.Node


class Sizes:
    """Turns sizes of fake tensors into arguments of nodes."""

    def __init__(self, graph: fx.Graph) -> None:
        """Of a graph whose placeholders have their values."""
        self._graph = graph
        self._first = next(node for node in graph.nodes if node.op != "placeholder")
        placeholders = graph.find_nodes(op="placeholder")
        given = {n.meta["val"].node.expr: n for n in placeholders if isinstance(n.meta.get("val"), torch.SymInt)}
        self._nodes: dict[Any, Size] = {**given}
        self._symbols = {expression: node for expression, node in given.items() if expression.is_Symbol}

    def are_known(self, node: fx.Node) -> bool:
        """Whether a node's size and stride are numbers, or made of symbols that the graph is given."""
        value = node.meta["val"]
        sizes = [size for size in (*value.size(), *value.stride()) if not isinstance(size, int)]
        return all(self._symbols.keys() >= size.node.expr.free_symbols for size in sizes)

    def arguments(self, sizes: Sequence[int | torch.SymInt]) -> list[Size]:
        """What stands for these sizes in an argument of a node."""
        return [size if isinstance(size, int) else self._node_of(size) for size in sizes]

    def _node_of(self, size: torch.SymInt) -> Size:
        expression = size.node.expr
        if expression not in self._nodes:
            self._nodes[expression] = self._compute(expression)
        return self._nodes[expression]

    def _compute(self, expression: Any) -> Size:
        proxies = {symbol: fx.Proxy(node) for symbol, node in self._symbols.items()}
        before = set(self._graph.nodes)
        with self._graph.inserting_before(self._first):
            result = sympy_interp(PythonReferenceAnalysis, proxies, expression)
        for node in self._graph.nodes:
            if node not in before:
                node.meta["val"] = node.target(*fx.map_arg(node.args, lambda argument: argument.meta["val"]))
        return result.node if isinstance(result, fx.Proxy) else int(result)


def hint_nbytes(value: torch.Tensor) -> int:
    """Bytes of a fake tensor in the step that is being compiled for; 0 where that is not known."""
    hints = [size if isinstance(size, int) else size.node.hint for size in value.size()]
    return 0 if None in hints else math.prod(hints) * value.element_size()
