"""Edits the two graphs that PyTorch's partitioner makes: what forward saves becomes handles, which backward reloads.

Knows graphs and sizes; neither contexts nor drives.

[Note: what is offloaded]
What an operator of forward has made and backward needs, of at least `min_nbytes`. Not what shares memory with an input
(weights, buffers, the batch) or with an output of the model, which the user holds anyway. With symbolic sizes only
where backward is given the symbols. Several views of one memory go as one: see `sources`.

[Note: where operators stand]
`offload` right after the last use of the memory in forward, which may go from there on. `wait_tensor` right before the
first use in backward, in the order that the partitioner chose, which is autograd's. `reload` some waits earlier, so
that it is known what comes next before any step was seen.

[Note: strides]
Inductor lays out what forward computes as it likes, and backward is told strides. `offload` is given what has these:
Inductor sees to that where a node says what eager PyTorch would have passed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch.partitioners import min_cut_rematerialization_partition

from ssdtrain.integrations.compiler.operators import AGAIN, OFFLOAD, RELOAD, WAIT_TENSOR
from ssdtrain.integrations.compiler.roots import Roots
from ssdtrain.integrations.compiler.sizes import Sizes, hint_nbytes
from ssdtrain.integrations.compiler.sources import Source, sources_of, view_in

_AHEAD = 2  # waits
_KEPT_META = ("autograd_backward", "desc", "partitioner_tag")


def partition(
    joint: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    num_fwd_outputs: int,
    min_nbytes: int,
    may_change: bool = False,
    **options: Any,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """What PyTorch's own partitioner makes, edited: what forward saves of at least `min_nbytes` is offloaded.

    `may_change`: whether what runs the backward graph may write to what comes back.
    """
    graphs = min_cut_rematerialization_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs, **options)
    forward, backward = graphs[0].graph, graphs[1].graph
    roots, sizes = Roots(forward, num_fwd_outputs), Sizes(backward)
    placeholders = {node.name: node for node in backward.find_nodes(op="placeholder") if node.users}
    chosen = [
        node
        for node in _saved(forward, num_fwd_outputs)
        if node.name in placeholders and hint_nbytes(node.meta["val"]) >= max(1, min_nbytes)
        if roots.is_own(node) and sizes.are_known(node)
    ]
    if chosen:
        sources = sources_of(chosen, roots)
        _offload(forward, roots, sources)
        _reload(backward, sizes, placeholders, sources, may_change=may_change)
        for module in graphs:
            module.graph.lint()
            module.recompile()
    return graphs


def _saved(graph: fx.Graph, num_outputs: int) -> Iterator[fx.Node]:
    """What forward computes and returns for backward, each once."""
    outputs: Sequence[Any] = graph.output_node().args[0]  # type: ignore[assignment]
    for node in dict.fromkeys(outputs[num_outputs:]):
        if isinstance(node, fx.Node) and node.op == "call_function" and _is_plain(node.meta.get("val")):
            yield node


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and not (value.is_quantized or value.is_conj() or value.is_neg())
    )


def _offload(graph: fx.Graph, roots: Roots, sources: list[Source]) -> None:
    handles = dict[Any, fx.Node]()
    for source, saved in sources:
        with graph.inserting_after(roots.last_use(source)):
            handle = graph.call_function(OFFLOAD, (source,))
        handle.meta = _meta_of_handle(source) | {"eager_input_vals": ((source.meta["val"],), {})}
        handles[saved[0]] = handle
        for node in saved[1:]:  # the compiler has a place for each
            with graph.inserting_after(handle):
                handles[node] = graph.call_function(AGAIN, (handle,))
            handles[node].meta = _meta_of_handle(source)
    output = graph.output_node()
    outputs: Any = output.args[0]
    output.update_arg(0, tuple(handles.get(value, value) for value in outputs))


def _reload(
    graph: fx.Graph, sizes: Sizes, placeholders: dict[str, fx.Node], sources: list[Source], *, may_change: bool
) -> None:
    order = {node: i for i, node in enumerate(graph.nodes)}

    def first_use(nodes: list[fx.Node]) -> fx.Node:
        return min([user for node in nodes for user in placeholders[node.name].users], key=order.__getitem__)

    waits = list[fx.Node]()
    for source, saved in sorted(sources, key=lambda source: order[first_use(source.saved)]):
        value = source.meta["val"]
        size, stride = sizes.arguments(value.size()), sizes.arguments(value.stride())
        uses = {node: (list(placeholders[node.name].users), first_use([node])) for node in saved}
        with graph.inserting_before(first_use(saved)):
            how = {"dtype": value.dtype, "device": value.device, "may_change": may_change}
            wait = graph.call_function(WAIT_TENSOR, (placeholders[saved[0].name], size, stride), how)
        wait.meta = dict(placeholders[saved[0].name].meta) | {"val": value}
        for node, (users, first) in uses.items():
            placeholder = placeholders[node.name]
            placeholder.meta = _meta_of_handle(placeholder)
            with graph.inserting_before(first):
                result = wait if node is source else view_in(graph, wait, node)
            for user in users:
                user.replace_input_with(placeholder, result)
        waits.append(wait)
    for i, wait in enumerate(waits):
        handle = wait.all_input_nodes[0]
        with graph.inserting_before(waits[max(0, i - _AHEAD)]):
            reload = graph.call_function(RELOAD, (handle,))
        reload.meta = dict(handle.meta)
        wait.update_arg(0, reload)


def _meta_of_handle(node: fx.Node) -> dict[str, Any]:
    value: Any = node.meta["val"]
    with value.fake_mode:
        handle = torch.empty(0, dtype=torch.int64, device="cpu")
    return {name: node.meta[name] for name in _KEPT_META if name in node.meta} | {"val": handle}
