"""What stands for a saved node on its way: itself, or the whole memory that several saved nodes are views of.

Knows two graphs and what their nodes are made of; neither operators nor contexts.

[Note: views of one memory]
Attention saves queries, keys and values, which are parts of one product. Each alone would take nearly all of that
along, gaps included. The product goes once, and backward makes the views of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import fx

from ssdtrain.integrations.compiler.roots import Roots

_AS_STRIDED = torch.ops.aten.as_strided.default


class Source(NamedTuple):
    """A node of forward, and the saved nodes that come back with it."""

    node: fx.Node
    saved: list[fx.Node]


def sources_of(nodes: Iterable[fx.Node], roots: Roots) -> list[Source]:
    """Every saved node in one source."""
    found = dict[fx.Node, list[fx.Node]]()
    for node in nodes:
        root = roots.only(node)
        found.setdefault(root if root is not None and _is_view(node, root) else node, []).append(node)
    return [source for root, saved in found.items() for source in _worth_it(root, saved)]


def _worth_it(root: fx.Node, saved: list[fx.Node]) -> list[Source]:
    """The root with all its views, unless the views alone take less along."""
    if saved == [root] or sum(_span(node) for node in saved) < root.meta["val"].numel():
        return [Source(node, [node]) for node in saved]
    return [Source(root, saved)]


def _is_view(node: fx.Node, root: fx.Node) -> bool:
    """Whether a node can be made of the whole of the root by numbers alone."""
    value, whole = node.meta["val"], root.meta.get("val")
    if not isinstance(whole, torch.Tensor) or value.dtype is not whole.dtype:
        return False
    numbers = (*_numbers(value), *_numbers(whole))
    return (
        all(isinstance(number, int) for number in numbers)
        and value.untyped_storage()._cdata == whole.untyped_storage()._cdata
        and whole.storage_offset() == 0
        and whole.untyped_storage().nbytes() == whole.numel() * whole.element_size()
        and _is_dense(whole)
    )


def _is_dense(value: torch.Tensor) -> bool:
    """Whether each element has a place of its own, without gaps."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(value.size(), value.stride(), strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _numbers(value: torch.Tensor) -> tuple[Any, ...]:
    return (*value.size(), *value.stride(), value.storage_offset())


def _span(node: fx.Node) -> int:
    """Elements from the first to the last."""
    value: torch.Tensor = node.meta["val"]
    return 1 + sum((size - 1) * stride for size, stride in zip(value.size(), value.stride(), strict=True))


def view_in(graph: fx.Graph, whole: fx.Node, saved: fx.Node) -> fx.Node:
    """A saved node of forward, made of the whole memory that it is a view of; where the graph inserts."""
    numbers = saved.meta["val"]
    how = (list(numbers.size()), list(numbers.stride()), numbers.storage_offset())
    node = graph.call_function(_AS_STRIDED, (whole, *how))
    node.meta = dict(whole.meta) | {"val": whole.meta["val"].as_strided(*how)}
    return node
