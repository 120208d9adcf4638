"""Whole models compiled by `compile_backend`: the same bits as of PyTorch's backend, and memory as of single blocks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from compiled_blocks import Block
from conftest import MakeOffload, gauges, grads_of, same_bits, send
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import ssdtrain
from ssdtrain.integrations.compiler import compile_backend

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore", "error::pytest.PytestUnraisableExceptionWarning"),  # the compiler's own
]

NUM_STEPS = 2
PEAK_RATIO = 1.2  # of the whole model's peak, to that of its blocks compiled one by one


class Attention(nn.Module):
    """Views of one tensor, attention, and a size that is a product."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.inner(x.view(-1, 8, 32)).view(-1, 8, 3, 4, 8).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q.sin(), k.tanh(), v, is_causal=True)
        return x + self.outer(y.transpose(1, 2).reshape(-1, 32)).exp().cos()


class Checkpointed(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=False).sigmoid()  # type: ignore[no-any-return]


class Outputs(Block):
    """Returns what it also saves: itself, and as a view."""

    def forward(self, x: torch.Tensor) -> Any:
        y, z = super().forward(x).exp(), x.tanh()
        return y.sin().sum() + (z * z).sum(), y, z.t()


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def blocks() -> nn.Module:
    return nn.Sequential(Block(), Block())


def normalised() -> nn.Module:
    """Changes buffers in place, and draws random numbers."""
    return nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.3), Block(64))


def mixed() -> nn.Module:
    return nn.Sequential(Attention(), Checkpointed())


def settled(context: Any) -> Callable[[], Any]:
    """Waits until what has set out is on the drive, for it to be read."""
    return partial(gauges, context) if isinstance(context, ssdtrain.ActivationOffload) else lambda: None


def sent(context: Any) -> None:
    """The same for small tensors too, which would wait for company; in a context that sends everything."""
    if isinstance(context, ssdtrain.ActivationOffload):
        send()
        gauges(context)


def step(model: nn.Module, compiled: Any, seed: int, num_rows: int = 64, settle: Any = lambda: None) -> list[Any]:
    """Loss and gradients, and what else the model returned or changed."""
    torch.manual_seed(seed)
    returned = compiled(torch.randn(num_rows, 32, requires_grad=True))
    loss, *others = returned if isinstance(returned, tuple) else (returned.square().mean(),)
    kept = [other.detach().clone() for other in others]
    settle()
    loss.backward()
    assert same_bits([other.detach() for other in others], kept)
    grads = [None if grad is None else grad.clone() for grad in grads_of(model)]
    return [loss.detach(), *kept, *grads, *(buffer.clone() for buffer in model.buffers())]


def train(make: Callable[[], nn.Module], backend: Any, context: Any = None, **options: Any) -> list[Any]:
    torch._dynamo.reset()
    model = seeded(make)
    compiled = torch.compile(model, backend=backend, **options)
    rows = (64, 48, 80) if options.get("dynamic") else (64,) * NUM_STEPS
    with context if context is not None else contextlib.nullcontext():
        return [step(model, compiled, seed, num_rows, settled(context)) for seed, num_rows in enumerate(rows)]


def ours(name: str = "aot_eager") -> Any:
    return compile_backend(name, min_nbytes=0)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (blocks, {"fullgraph": True}),
        (normalised, {}),
        (mixed, {}),
        (Attention, {"dynamic": True}),
        (Outputs, {}),
    ],
)
def test_the_same_bits(make_offload: MakeOffload, make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    plain = train(make, "aot_eager", **options)
    offload = make_offload()
    assert same_bits(plain, train(make, ours(), offload, **options))
    gauges(offload)
    stats = offload.stats
    assert stats.offloaded_nbytes > 0.5 * stats.read_nbytes > 0, str(stats)
    assert set(stats.skipped) <= {"weight", "empty"}, str(stats)


class Parts(nn.Module):
    """Queries, keys and values that are parts of one product, used and saved as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.inner(x).view(-1, 8, 3, 4, 8).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.outer(y.transpose(1, 2).reshape(-1, 32))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_parts_of_one_tensor_leave_once(make_offload: MakeOffload, name: str) -> None:
    """Each of three took nearly all of it along; the output, which backward needs in two shapes, went twice."""
    plain, offload = train(Parts, name), make_offload()
    assert same_bits(plain, train(Parts, ours(name), offload))
    gauges(offload)
    product, output, copied = 64 * 96, 64 * 32, 64 * 32
    assert offload.stats.offloaded_nbytes == NUM_STEPS * 4 * (product + output + copied), str(offload.stats)


def test_the_same_bits_without_a_context() -> None:
    assert same_bits(train(Block, "aot_eager"), train(Block, ours()))


def test_the_same_bits_in_auto_mode(make_offload: MakeOffload) -> None:
    """Steps are planned, and what is kept is handed out too."""
    plain, offload = train(Block, "aot_eager"), make_offload(mode="auto")
    assert same_bits(plain, train(Block, ours(), offload))


def peak_nbytes(run: Callable[[], Any]) -> int:
    """Of what PyTorch allocates meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def test_peak_of_a_whole_model(make_offload: MakeOffload) -> None:
    """As low as that of its blocks, compiled one by one; and of a step that nobody has seen before."""
    width, rows, staging = 64, 512, 128 << 10

    def compiled_whole(model: nn.Module) -> Any:
        return torch.compile(model, backend=ours())

    def compiled_blocks(model: Any) -> Any:
        for block in model:
            block.compile(backend="aot_eager")
        return model

    peaks, held = list[int](), list[int]()
    for compile_ in (compiled_blocks, compiled_whole):
        torch._dynamo.reset()
        model = nn.Sequential(*[Block(width) for _ in range(5)])
        compiled, offload = compile_(model), make_offload(staging_nbytes=staging, prefetch_nbytes=staging)
        compiled(torch.randn(rows, width)).sum().backward()

        def run(compiled: Any = compiled, offload: Any = offload) -> None:
            with offload:
                loss = compiled(torch.randn(rows, width)).square().mean()
                held.append(gauges(offload)[0])
                loss.backward()

        peaks.append(peak_nbytes(run))
        saved = offload.stats.offloaded_nbytes
        assert saved > 5 * 5 * rows * width * 4, str(offload.stats)
    assert peaks[1] <= PEAK_RATIO * peaks[0], peaks
    assert peaks[1] < saved / 2, (peaks, saved)
    assert held[1] <= held[0] + 2 * rows * width * 4, held  # what the operators of the loss have saved


def test_two_graphs_at_once_and_again(make_offload: MakeOffload) -> None:
    """Two forwards before two backwards, each of which comes twice."""

    def run(backend: Any, context: Any) -> list[Any]:
        torch._dynamo.reset()
        model = seeded(Block)
        compiled, results = torch.compile(model, backend=backend), list[Any]()
        with context:
            losses = [compiled(torch.full((64, 32), i + 0.5)).square().mean() for i in range(2)]
            sent(context)
            for loss in losses:
                for retain_graph in (True, False):
                    loss.backward(retain_graph=retain_graph)
                    results += [grad.clone() for grad in grads_of(model) if grad is not None]
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                losses[0].backward()
        return results

    offload = make_offload()
    assert same_bits(run("aot_eager", contextlib.nullcontext()), run(ours(), offload))
    assert offload.stats.read_nbytes > 0


def test_graphs_that_are_dropped(make_offload: MakeOffload) -> None:
    """Without backward, by an error in the middle of one, and without gradients at all."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError

    model, offload = seeded(Block), make_offload()
    compiled = torch.compile(model, backend=ours())
    x = torch.randn(64, 32, requires_grad=True)
    with offload:
        loss = compiled(x).sum()
        assert offload.stats.num_live_records > 3
        del loss
        assert offload.stats.num_live_records == 0
        with pytest.raises(ZeroDivisionError):
            compiled(Fails.apply(x)).sum().backward()
        with pytest.raises(ZeroDivisionError):
            Fails.apply(compiled(x)).sum().backward()
        with torch.no_grad():
            compiled(x)
            assert offload.stats.num_live_records == 0
    assert same_bits(compiled(x).detach(), model(x).detach())


def test_backward_after_the_context_and_forward_outside(make_offload: MakeOffload) -> None:
    """One compiled function, called where things are offloaded and where they are not."""
    model, offload = seeded(Block), make_offload()
    compiled, results = torch.compile(model, backend=ours()), list[Any]()
    for context in (contextlib.nullcontext(), offload, ssdtrain.keep_resident(), offload):
        model.zero_grad()
        with context:
            loss = compiled(torch.ones(64, 32)).square().mean()
            sent(context)
        loss.backward()
        results.append([grad.clone() for grad in grads_of(model) if grad is not None])
    assert all(same_bits(results[0], others) for others in results)
    assert offload.stats.read_nbytes > 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_compiled_block_in_a_checkpoint(make_offload: MakeOffload, use_reentrant: bool) -> None:
    """Its handles are the checkpoint's to drop and to make again."""

    def run(backend: Any, context: Any) -> list[Any]:
        torch._dynamo.reset()
        model: Any = seeded(blocks)
        model[0].compile(backend=backend)
        with context:
            for _ in range(NUM_STEPS):
                x = torch.full((64, 32), 0.5, requires_grad=True)
                model[1](checkpoint(model[0], x, use_reentrant=use_reentrant)).square().mean().backward()
        return grads_of(model)

    assert same_bits(run("aot_eager", contextlib.nullcontext()), run(ours(), make_offload()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "eager"}, "Expected a backend among .*aot_eager.*, got 'eager'"),
        ({"min_nbytes": "many"}, "Expected a size such as"),
        ({"min_nbytes": -1}, "Expected a size such as"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_backend(**arguments)


@pytest.mark.slow
def test_inductor(make_offload: MakeOffload) -> None:
    """The same bits, also in a second backward of a graph: Inductor works in place where it may."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x)
            y[:, :8] = y[:, 8:16]
            return y.tanh() * y

    def run(backend: Any, context: Any) -> list[Any]:
        torch._dynamo.reset()
        model, results = seeded(Model), list[Any]()
        compiled = torch.compile(model, backend=backend, options={"size_asserts": True})
        with context, torch._functorch.config.patch(donated_buffer=False):
            for i in range(NUM_STEPS):
                torch.manual_seed(i)
                loss = compiled(torch.randn(128, 32)).square().mean()
                sent(context)
                for retain_graph in (i == 0, False)[i:]:
                    loss.backward(retain_graph=retain_graph)
                    results += [loss.detach(), *(grad.clone() for grad in grads_of(model) if grad is not None)]
        return results

    offload = make_offload()
    plain = run("inductor", contextlib.nullcontext())
    assert same_bits(plain, run(ours("inductor"), offload))
    gauges(offload)
    assert offload.stats.read_nbytes > 0 and set(offload.stats.skipped) <= {"weight", "empty"}, str(offload.stats)


def test_a_pytorch_without_the_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused when the backend is made, with what to do, and not in the middle of a step."""
    monkeypatch.delitem(sys.modules, "ssdtrain.integrations.compiler.inductor", raising=False)
    monkeypatch.setitem(sys.modules, "torch._inductor.custom_graph_pass", None)
    with pytest.raises(RuntimeError, match=r"Expected a PyTorch whose compiler .* Compile every block"):
        compile_backend()


@pytest.mark.slow
def test_inductor_with_a_transposed_input(make_offload: MakeOffload) -> None:
    """Inductor lays out what it computes from it likewise, and backward is told how."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = Block(), nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.outer(self.inner(x))  # type: ignore[no-any-return]

    def run(backend: Any, context: Any) -> list[Any]:
        torch._dynamo.reset()
        model, x = seeded(Model), torch.linspace(-1, 1, 32 * 64).view(32, 64).t().requires_grad_()
        with context:
            torch.compile(model, backend=backend)(x).square().mean().backward()
        return [*grads_of(model), x.grad]

    plain = run("inductor", contextlib.nullcontext())
    assert same_bits(plain, run(ours("inductor"), make_offload()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "reduce-overhead"}, "Expected a mode without CUDA graphs"),
        ({"options": {"triton.cudagraphs": True}}, "Expected a mode without CUDA graphs"),
        ({"options": {"custom_partitioner_fn": None}}, "Expected no custom_partitioner_fn"),
    ],
)
def test_options_that_inductor_cannot_have(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_backend()(torch.fx.symbolic_trace(nn.Identity()), [torch.ones(1)], **options)
