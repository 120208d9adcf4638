"""Compiled functions: the context inside and outside of them, and hooks that the compiler does not trace.

Graphs are counted by the backend. A context inside a compiled function costs a graph break: PyTorch runs the function
that has it in eager mode, and compiles what that calls. Everything else makes as many graphs as without a context.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import inside
import pytest
import torch
from compiled_blocks import Block
from conftest import MakeOffload, grads_of, same_bits, send
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import ssdtrain

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore", "error::pytest.PytestUnraisableExceptionWarning"),  # the compiler's own
]

NUM_STEPS = 2
Compile = Callable[[Any, Any], Any]


@contextlib.contextmanager
def users_own() -> Iterator[None]:
    yield


class Model(nn.Module):
    """Blocks; with a graph break after each, inside a context of the user's, or checkpointed."""

    def __init__(self, *, context: Callable[[], Any] | None = None, is_checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.context, self.is_checkpointed = context, is_checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.context is None:
            return self.run(x)
        with self.context():
            return self.run(x)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.is_checkpointed else block(x)
            if self.context is not None:
                torch._dynamo.graph_break()
        return x


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def whole(model: nn.Module, backend: Any, **options: Any) -> Any:
    return torch.compile(model, backend=backend, **options)


def per_block(model: Any, backend: Any) -> Any:
    for block in model.blocks:
        block.compile(backend=backend)
    return model


def full(model: nn.Module, backend: Any) -> Any:
    return whole(model, backend, fullgraph=True)


def dynamic(model: nn.Module, backend: Any) -> Any:
    return whole(model, backend, dynamic=True)


@dataclass
class Result:
    num_graphs: int
    values: list[Any]


def train(compile_: Compile, model: nn.Module, context: Any = None, *, inside: bool = False, backend: str) -> Result:
    """Two steps. The context is inside the compiled function, or outside."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    step = compile_(Inside(model, context) if inside and context is not None else model, counter)
    values: list[Any] = []
    with context if context is not None and not inside else contextlib.nullcontext():
        for i in range(NUM_STEPS):
            torch.manual_seed(i)
            loss = step(torch.randn(8, 32)).float().square().mean()
            if context is not None:
                with context:
                    send()
            loss.backward()
            values += [loss.detach(), *(g.clone() for g in grads_of(model) if g is not None)]
    return Result(counter.frame_count, values)


class Inside(nn.Module):
    """Has the context in its forward."""

    def __init__(self, model: nn.Module, context: ssdtrain.ActivationOffload) -> None:
        super().__init__()
        self.model, self.context = model, context

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.context:
            return self.model(x)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": Model,
    "breaks in a user's context": lambda: Model(context=users_own),
    "breaks in autocast": lambda: Model(context=autocast),
    "checkpointed": lambda: Model(is_checkpointed=True),
}


@pytest.mark.parametrize(
    ("kind", "where", "with_model"),
    [
        ("plain", "inside", True),
        ("breaks in a user's context", "outside", True),
        ("breaks in autocast", "inside", False),
        ("checkpointed", "outside", False),
    ],
)
def test_as_many_graphs_and_the_same_bits(make_offload: MakeOffload, kind: str, where: str, with_model: bool) -> None:
    plain = train(whole, MODELS[kind](), backend="aot_eager")
    model = MODELS[kind]()
    offload = make_offload(model if with_model else None)
    ours = train(whole, model, offload, inside=where == "inside", backend="aot_eager")
    assert same_bits(plain.values, ours.values)
    assert ours.num_graphs == plain.num_graphs
    assert offload.stats.read_nbytes > 0, str(offload.stats)


@pytest.mark.parametrize(("compile_", "with_model"), [(per_block, True), (full, True), (dynamic, False)])
def test_ways_to_compile(make_offload: MakeOffload, compile_: Compile, with_model: bool) -> None:
    plain = train(compile_, Model(), backend="aot_eager")
    model = Model()
    offload = make_offload(model if with_model else None)
    ours = train(compile_, model, offload, backend="aot_eager")
    assert same_bits(plain.values, ours.values)
    assert ours.num_graphs == plain.num_graphs
    assert set(offload.stats.skipped) <= {"weight"}, str(offload.stats)


@pytest.mark.slow
def test_inductor(make_offload: MakeOffload) -> None:
    plain = train(per_block, Model(), backend="inductor")
    ours = train(per_block, Model(), offload := make_offload(), backend="inductor")
    assert same_bits(plain.values, ours.values)
    assert ours.num_graphs == plain.num_graphs
    assert offload.stats.read_nbytes > 0, str(offload.stats)


def test_no_hook_of_ours_is_traced_twice(make_offload: MakeOffload) -> None:
    """Nine contexts would hit the limit on recompilations if hooks were guarded by their context."""
    model, counter = Model(context=users_own), CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, backend=counter)
    for i in range(9):
        with make_offload():
            step(torch.randn(8, 32)).square().mean().backward()
        if i == 0:
            torch._dynamo.utils.counters.clear()
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not torch._dynamo.utils.counters["recompile_limit"]


def test_backward_inside_a_compiled_function(make_offload: MakeOffload) -> None:
    """It runs uncompiled, unpack hooks and destructors of handles too."""

    def run(context: Any) -> list[Any]:
        torch._dynamo.reset()
        model = Model()

        def step(x: torch.Tensor) -> torch.Tensor:
            with context:
                loss = model(x).square().mean()
                send()
                loss.backward()
                return loss.detach()

        compiled = torch.compile(step, backend="aot_eager")
        return [compiled(torch.ones(8, 32) * i) for i in range(3)] + grads_of(model)

    offload = make_offload()
    assert same_bits(run(contextlib.nullcontext()), run(offload))
    assert offload.stats.read_nbytes > 0, str(offload.stats)


def test_keep_resident_inside_a_compiled_function(make_offload: MakeOffload) -> None:
    def run(outer: Any, inner: Any) -> list[Any]:
        torch._dynamo.reset()
        model = Model(context=users_own)

        def step(x: torch.Tensor) -> torch.Tensor:
            with inner:
                return model(x)

        compiled = torch.compile(step, backend="aot_eager")
        with outer:
            compiled(torch.ones(8, 32)).square().mean().backward()
        return grads_of(model)

    offload = make_offload()
    plain = run(contextlib.nullcontext(), contextlib.nullcontext())
    assert same_bits(plain, run(offload, ssdtrain.keep_resident()))
    assert offload.stats.num_saved <= 1  # of the loss


def test_compiled_autograd(make_offload: MakeOffload) -> None:
    """Backward itself is traced, and asks our unpack hook from its graph."""

    def run(context: Any) -> list[Any]:
        torch._dynamo.reset()
        model, results = Model(), list[Any]()
        step = torch.compile(model, backend="aot_eager")
        with context, torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            for i in range(NUM_STEPS):
                loss = step(torch.ones(8, 32) * i).square().mean()
                send()
                loss.backward()
                results += [g.clone() for g in grads_of(model) if g is not None]
        return results

    offload = make_offload()
    assert same_bits(run(contextlib.nullcontext()), run(offload))
    assert offload.stats.read_nbytes > 0, str(offload.stats)


class SaveMany(torch.autograd.Function):
    """As a compiled model does: one node has everything."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, num: int) -> torch.Tensor:
        ctx.save_for_backward(*[x * i for i in range(num)])
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * len(ctx.saved_tensors), None


@pytest.mark.parametrize(("sizes", "is_said"), [((24,), True), ((24, 24, 24), False), ((4,), False)])
def test_one_node_that_needs_everything_at_once(
    make_offload: MakeOffload, sizes: tuple[int, ...], is_said: bool
) -> None:
    """Bytes leave and the peak does not fall: said once, with what to do."""
    with make_offload() as offload:
        for _ in range(3):
            x = torch.randn(1024, requires_grad=True)
            for num in sizes:
                x = SaveMany.apply(x, num)
            x.sin().sum().backward()
    said = [
        text
        for text in offload.stats.fallbacks
        if "compile every block, or with integrations.compiler.compile_backend" in text
    ]
    assert len(said) == is_said, said


def test_compiled_blocks_are_read_once(make_offload: MakeOffload) -> None:
    """In the first backward, too: a node asks in the order in which it saved, blocks come in the reverse one.

    Prefetching has no room for the nodes of two blocks.
    """
    torch.manual_seed(0)
    model, x = nn.Sequential(*[Block() for _ in range(6)]), torch.randn(64, 32)
    for block in model:
        block.compile(backend="aot_eager")
    model(x).sum().backward()
    expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    offload = make_offload(prefetch_nbytes=64 * 1024)
    with offload:
        loss = model(x).sum()
        send()
    loss.backward()
    stats = offload.stats
    assert same_bits(expected, grads_of(model))
    assert stats.num_demand_reloads <= 2 and stats.num_prefetched > 6 * 3, stats
    assert stats.read_nbytes <= stats.offloaded_nbytes, stats


def test_what_compiled_functions_are_handed_out_is_not_held(make_offload: MakeOffload) -> None:
    """They ask once, and give up each tensor when it is used; also in a second backward."""
    model, offload = torch.compile(nn.Sequential(Block(), Block()), backend="aot_eager"), make_offload()
    for retain in (True, False):
        with offload:
            loss = model(torch.randn(64, 32)).sum()
            send()
        loss.backward(retain_graph=retain)
        if retain:
            loss.backward()
    assert not inside.item_by_item(offload).kinds


def test_what_a_compiled_backward_still_computes_with_outlives_no_graph(make_offload: MakeOffload) -> None:
    """It lets go of what was saved before it has used it: what never left is not somebody else's for being alive."""
    model = nn.Sequential(*[Block() for _ in range(4)])
    for block in model:
        block.compile(backend="aot_eager")
    with make_offload(mode="auto", keep_last=8) as offload:
        for _ in range(6):
            model(torch.randn(64, 32)).sum().backward()
        skipped = offload.stats.skipped
    assert "among the last saved" in skipped  # else nothing stays in memory that could look held
    assert "outlives its graph" not in skipped, skipped
