"""Which nodes of a forward graph share memory, and until when it is used.

Knows one graph, and changes nothing in it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx


class Roots:
    """Finds for every node what its memory was made by: by the storages of fake tensors, and by operators' schemas.

    Passes of the compiler replace nodes, and then a view may have a fake storage of its own.
    """

    def __init__(self, graph: fx.Graph, num_outputs: int) -> None:
        """`num_outputs`: how many of the outputs are the model's."""
        self._roots = dict[fx.Node, frozenset[fx.Node]]()
        self._last_use = dict[fx.Node, fx.Node]()  # of a root
        storages = dict[int, fx.Node]()
        for node in graph.nodes:
            if node.op != "output":
                self._roots[node] = self._roots_of(node, storages)
                for root in self._all(node.all_input_nodes):
                    self._last_use[root] = node
        outputs: Any = graph.output_node().args[0]
        inputs = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]
        held = [node for node in outputs[:num_outputs] if isinstance(node, fx.Node)]
        self._others = frozenset(self._all(inputs + held))

    def is_own(self, node: fx.Node) -> bool:
        """Whether nobody but the graph holds its memory: it is no input's and no output's of the model."""
        return self._others.isdisjoint(self._roots[node])

    def only(self, node: fx.Node) -> fx.Node | None:
        """The one node that has made its memory, if it is one."""
        roots = self._roots[node]
        return next(iter(roots)) if len(roots) == 1 else None

    def last_use(self, node: fx.Node) -> fx.Node:
        """The last node that uses its memory, if only by a view; `node` itself where none does."""
        order = {n: i for i, n in enumerate(self._roots)}
        uses = [node, *(self._last_use[root] for root in self._roots[node] if root in self._last_use)]
        return max(uses, key=order.__getitem__)

    def _all(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        return {root for node in nodes for root in self._roots[node]}

    def _roots_of(self, node: fx.Node, storages: dict[int, fx.Node]) -> frozenset[fx.Node]:
        found = self._all(_aliased(node))
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            found.add(storages.setdefault(value.untyped_storage()._cdata, node))
        return frozenset(found or {node})


def _aliased(node: fx.Node) -> list[fx.Node]:
    """The arguments that an operator returns views of, as its schema says."""
    source = node
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        source = node.args[0]
    if not isinstance(source.target, torch._ops.OpOverload):
        return []
    schema = source.target._schema
    if not any(returned.alias_info is not None for returned in schema.returns):
        return []
    named = dict(zip([argument.name for argument in schema.arguments], source.args, strict=False)) | source.kwargs
    aliased = [named.get(argument.name) for argument in schema.arguments if argument.alias_info is not None]
    return [argument for argument in aliased if isinstance(argument, fx.Node)]
