"""The table's rows of checkpoints, compiled functions, and tensors of classes of their own."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from composition import Group, Way
from composition_eager import ROWS, WIDTH, batch, mean, mlp, train
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ssdtrain.integrations.compiler import compile_backend

NO_HOOK = "no hook sees inputs that are not positional"

CHECKPOINTS = Group("Activation checkpoints")
COMPILED = Group("torch.compile")
SUBCLASSES = Group("Tensors of other classes")


# -- checkpoints -------------------------------------------------------------------------------------------------------


def through(way: Way, run: Any, num_blocks: int = 3) -> Any:
    """Trains with `run(block, x)` for every block."""

    def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
        x.requires_grad_()  # or a reentrant checkpoint finds nothing to do
        for block in model:
            x = run(block, x)
        return x.square().mean()

    return train(way, mlp(num_blocks), loss_of)


@CHECKPOINTS.row("reentrant")
def reentrant(way: Way) -> Any:
    return through(way, partial(checkpoint, use_reentrant=True))


@CHECKPOINTS.row("non-reentrant")
def non_reentrant(way: Way) -> Any:
    return through(way, partial(checkpoint, use_reentrant=False))


@CHECKPOINTS.row("nested")
def nested(way: Way) -> Any:
    def outer(block: Any, x: torch.Tensor) -> torch.Tensor:
        def run(y: torch.Tensor) -> torch.Tensor:
            return checkpoint(block, checkpoint(block, y, use_reentrant=False), use_reentrant=False)

        return checkpoint(run, x, use_reentrant=False)

    return through(way, outer)


@CHECKPOINTS.row("the input as a keyword", note=NO_HOOK)
def keyword(way: Way) -> Any:
    return through(way, lambda block, x: checkpoint(block, x=x, use_reentrant=False))


@CHECKPOINTS.row("the input in a closure", note=NO_HOOK)
def closure(way: Way) -> Any:
    return through(way, lambda block, x: checkpoint(lambda: block(x), use_reentrant=False))


@CHECKPOINTS.row("the input as a keyword, `ssdtrain.checkpoint`")
def own_keyword(way: Way) -> Any:
    return through(way, lambda block, x: way.checkpoint(block, x=x, use_reentrant=False))


@CHECKPOINTS.row("the input in a closure, `ssdtrain.checkpoint`")
def own_closure(way: Way) -> Any:
    return through(way, lambda block, x: way.checkpoint(lambda: block(x), use_reentrant=False))


def selected() -> Any:
    kept = [torch.ops.aten.addmm.default]
    return create_selective_checkpoint_contexts(
        lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE
    )


@CHECKPOINTS.row("selective", note="no hook sees what it keeps")
def selective(way: Way) -> Any:
    return through(way, partial(checkpoint, use_reentrant=False, context_fn=selected))


@CHECKPOINTS.row("selective, `ssdtrain.checkpoint`")
def own_selective(way: Way) -> Any:
    return through(way, lambda block, x: way.checkpoint(block, x, use_reentrant=False, context_fn=selected))


@CHECKPOINTS.row("checkpoint_sequential")
def sequential(way: Way) -> Any:
    def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint_sequential(model, 2, x, use_reentrant=False).square().mean()

    return train(way, mlp(), loss_of)


@CHECKPOINTS.row("with dropout and autocast")
def random(way: Way) -> Any:
    def run(block: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(lambda y: nn.functional.dropout(block(y), 0.2), x, use_reentrant=False)

    return through(way, run)


# -- compiled ----------------------------------------------------------------------------------------------------------


@COMPILED.row("every block")
def blocks(way: Way) -> Any:
    return compiled(way, where="blocks")


@COMPILED.row("the whole model")
def whole(way: Way) -> Any:
    return compiled(way)


@COMPILED.row("the whole model, `compile_backend`")
def whole_ours(way: Way) -> Any:
    return compiled(way, backend=compile_backend("aot_eager", min_nbytes=1024))


@COMPILED.row("every block, Inductor")
def inductor_blocks(way: Way) -> Any:
    return compiled(way, where="blocks", backend="inductor")


@COMPILED.row("the whole model, Inductor")
def inductor(way: Way) -> Any:
    return compiled(way, backend="inductor")


@COMPILED.row("the whole model, Inductor, `compile_backend`")
def inductor_ours(way: Way) -> Any:
    return compiled(way, backend="inductor" if way.folder is None else compile_backend(min_nbytes=1024))


@COMPILED.row("the whole model, fullgraph")
def fullgraph(way: Way) -> Any:
    return compiled(way, fullgraph=True)


@COMPILED.row("the whole model, dynamic shapes")
def dynamic(way: Way) -> Any:
    def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
        return mean(model, x) + mean(model, x[: ROWS // 3])

    return compiled(way, loss_of, num_blocks=1, dynamic=True)


@COMPILED.row("the whole model, without a backend (eager)")
def without_backend(way: Way) -> Any:
    return compiled(way, backend="eager")


@COMPILED.row("a graph break in every block")
def breaks(way: Way) -> Any:
    def run(model: Any, x: torch.Tensor) -> torch.Tensor:
        for block in model:
            x = block(x)
            torch._dynamo.graph_break()
        return x.square().mean()

    return compiled(way, torch.compile(run, backend="aot_eager"), where="nothing", num_blocks=2)


@COMPILED.row("a checkpoint inside")
def checkpoint_inside(way: Way) -> Any:
    def run(model: Any, x: torch.Tensor) -> torch.Tensor:
        for block in model:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    forward = torch.compile(run, backend="aot_eager")
    return compiled(way, lambda model, x: forward(model, x).square().mean(), where="nothing")


@COMPILED.row("compiled blocks inside of checkpoints")
def inside_checkpoints(way: Way) -> Any:
    def run(model: Any, x: torch.Tensor) -> torch.Tensor:
        for block in model:
            x = checkpoint(block, x, use_reentrant=False)
        return x.square().mean()

    return compiled(way, run, where="blocks")


@COMPILED.row("the context inside of the compiled function")
def context_inside(way: Way) -> Any:
    model, context = mlp(), way.activations()

    @torch.compile(backend="aot_eager")
    def forward(x: torch.Tensor) -> torch.Tensor:
        with context:
            return model(x).square().mean()

    torch._dynamo.reset()
    loss = forward(batch(0))
    way.send()
    loss.backward()
    return [loss.detach(), *[p.grad for p in model.parameters()]]


def compiled(way: Way, loss_of: Any = mean, *, where: str = "whole", num_blocks: int = 2, **options: Any) -> Any:
    """Trains a model that is compiled as a whole, or each of its blocks, or by `loss_of`."""
    torch._dynamo.reset()
    model, options = mlp(num_blocks), {"backend": "aot_eager"} | options
    for block in model if where == "blocks" else [model] if where == "whole" else []:
        block.compile(**options)
    return train(way, model, loss_of)


# -- subclasses --------------------------------------------------------------------------------------------------------


class Tagged(torch.Tensor):
    """A subclass with nothing of its own, as users write them."""


@SUBCLASSES.row("a subclass that overrides functions")
def tagged(way: Way) -> Any:
    return train(way, mlp(), lambda m, x: mean(m, x.as_subclass(Tagged)).as_subclass(torch.Tensor))


@SUBCLASSES.row("a wrapper of two tensors (TwoTensor)")
def two(way: Way) -> Any:
    x = TwoTensor(batch(0), batch(1)).requires_grad_()
    with way.activations():
        loss = (x.sin() * x).exp().square().mean()
        way.send()
        loss.backward()
    return [x.grad.a, x.grad.b]


@SUBCLASSES.row("a nested tensor, jagged")
def jagged(way: Way) -> Any:
    def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
        rows = torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 10, 40, ROWS]))
        return torch.cat([part.square().mean().view(1) for part in model(rows).unbind()]).sum()

    return train(way, mlp(), loss_of)


@SUBCLASSES.row("parameters of a subclass")
def parameters(way: Way) -> Any:
    model = mlp()
    model[0].up.weight = nn.Parameter(model[0].up.weight.detach().as_subclass(Tagged))
    assert model[0].up.weight.shape[1] == WIDTH
    return train(way, model, lambda m, x: mean(m, x).as_subclass(torch.Tensor))
