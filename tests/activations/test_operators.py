"""Every differentiable operator PyTorch's own database knows: gradients with and without ssdtrain, equal to the bit.

An operator's saved tensors are its business: views, expanded or overlapping inputs, its own output, buffers it fills
after saving them. The database calls each in every way its authors thought of; here each call is made twice, in memory
and with all that was saved written to a file, dropped from memory, and read back.

`make test` takes the first samples of each operator, `--long` all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pytest
import torch
from conftest import MakeOffload, same_bits, send
from doses import dose
from torch.utils._pytree import tree_leaves, tree_map

import ssdtrain

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the database itself, at import
    from torch.testing._internal.common_methods_invocations import op_db

OPERATORS = [op for op in op_db if torch.float64 in op.supported_backward_dtypes("cpu")]
NUM_SAMPLES = dose(8, None)  # of each operator; none: all
NUM_CHUNKS = 27
SAMPLES_IN_FLIGHT = 16  # forward passes before the first backward

# Operators whose gradients differ from run to run, with the same seed and without ssdtrain: nothing to compare.
NOT_REPRODUCIBLE: dict[str, str] = {}


@dataclass
class Graph:
    """One forward pass that waits for its backward. Holds leaves and roots; what is saved belongs to the graph."""

    leaves: list[torch.Tensor]
    roots: list[torch.Tensor]
    doubly: bool

    def backward(self) -> list[Any]:
        """Gradients and, where supported, gradients of gradients."""
        if not self.leaves or not self.roots:
            return []  # an odd sample without anything to differentiate
        torch.manual_seed(2)
        grads = torch.autograd.grad(
            self.roots, self.leaves, weights_like(self.roots), create_graph=self.doubly, allow_unused=True
        )
        results: list[Any] = list(grads)
        seconds = [g for g in grads if g is not None and g.requires_grad]
        if seconds:
            try:
                results += torch.autograd.grad(seconds, self.leaves, weights_like(seconds), allow_unused=True)
            except RuntimeError as error:  # a few operators promise it and then refuse: equally, then
                results.append(str(error))
        return results


def weights_like(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Something to multiply gradients with, other than ones."""
    return [torch.linspace(0.5, 1.5, t.numel(), dtype=t.real.dtype).reshape(t.shape).to(t.dtype) for t in tensors]


def forward(op: Any, sample: Any, function: Callable[..., Any]) -> Graph:
    """Calls an operator on copies of the sample's tensors that nobody but its graph will hold."""
    leaves: list[torch.Tensor] = []

    def owned_by_graph(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if not value.requires_grad:
            return value.detach().clone()
        if value.layout is not torch.strided or value.untyped_storage().nbytes() == value.nbytes:
            leaves.append(value.detach().clone().requires_grad_())
            return leaves[-1].clone()
        whole = value.detach().as_strided((value.untyped_storage().nbytes() // value.itemsize,), (1,), 0)
        leaves.append(whole.clone().requires_grad_())
        return leaves[-1].clone().as_strided(value.size(), value.stride(), value.storage_offset())

    torch.manual_seed(1)
    value, args, kwargs = tree_map(owned_by_graph, (sample.input, sample.args, sample.kwargs))
    output = sample.output_process_fn_grad(function(value, *args, **kwargs))
    outputs = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
    return Graph(leaves, [t.clone() for t in outputs], op.supports_gradgrad)


def attempt(what: Callable[[], Any]) -> Any:
    """The result or, as a text, the error: one operator that fails must not hide the others."""
    try:
        return what()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@dataclass
class Sweep:
    """Runs operators both ways with one offload context and collects what differs."""

    offload: ssdtrain.ActivationOffload
    num_samples: int = 0
    num_doubly: int = 0
    failures: list[str] = field(default_factory=list)

    def run(self, op: Any, limit: int | None) -> None:
        """The first `limit` samples of an operator, or all."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the operators: they get odd arguments
            samples = op.sample_inputs("cpu", torch.float64, requires_grad=True)
            samples = islice(samples, limit)
            while batch := list(islice(samples, SAMPLES_IN_FLIGHT)):
                self._run_batch(op, op.op, batch)
                if op.inplace_variant is not None and op.supports_inplace_autograd:
                    self._run_batch(op, op.inplace_variant, [s for s in batch if not s.broadcasts_input])

    def _run_batch(self, op: Any, function: Callable[..., Any], samples: list[Any]) -> None:
        expected = [forward(op, sample, function).backward() for sample in samples]
        with self.offload:
            graphs = [attempt(lambda sample=sample: forward(op, sample, function)) for sample in samples]
            send()
        graphs.reverse()
        actual = []
        while graphs:  # each graph is gone before the next backward
            graph = graphs.pop()
            actual.append(attempt(graph.backward) if isinstance(graph, Graph) else graph)
            del graph
        self.num_samples += len(samples)
        self.num_doubly += op.supports_gradgrad * len(samples)
        for i, (sample, ours, theirs) in enumerate(zip(samples, actual, expected, strict=True)):
            if isinstance(ours, str):
                self.failures.append(f"{op.formatted_name} ({function}), sample {i}: {ours}")
            elif not same_bits(ours, theirs):
                is_reproducible = same_bits(forward(op, sample, function).backward(), theirs)
                what = "differs" if is_reproducible else "differs from run to run without ssdtrain"
                self.failures.append(f"{op.formatted_name} ({function}), sample {i}: {what}")


def chunks() -> list[Any]:
    """All operators in groups of about twenty, from all over the database."""
    groups = [OPERATORS[i::NUM_CHUNKS] for i in range(NUM_CHUNKS)]
    return [pytest.param(group, id=f"{group[0].name}..{group[-1].name}") for group in groups]


@pytest.mark.parametrize("operators", chunks())
@pytest.mark.cpu_only  # hours on the simulated accelerator, whose own tests take every twelfth operator
def test_gradients_of_every_operator(make_offload: MakeOffload, operators: list[Any]) -> None:
    """`rrelu` saves a tensor before its kernel fills it and never tells: a copy taken at once is garbage."""
    sweep = Sweep(make_offload())
    for op in operators:
        sweep.run(op, NUM_SAMPLES)
    assert sweep.failures == []
    stats = sweep.offload.stats
    assert stats.num_offloaded > sweep.num_samples / 2 and stats.read_nbytes > 0


def test_the_database_is_complete() -> None:
    """The sweep is worth what it covers: a database that shrank would pass in silence."""
    assert len(OPERATORS) >= 500
    assert {"nn.functional.rrelu", "nn.functional.dropout", "nn.functional.scaled_dot_product_attention"} <= {
        op.name for op in OPERATORS
    }
