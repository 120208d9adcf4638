"""Autograd's own promises: whatever a graph does without ssdtrain, result or error, it does with it."""

from __future__ import annotations

import gc
from typing import Any, ClassVar

import pytest
import torch
from conftest import Send, assert_same, assert_same_error, grads_of, mlp, send, train_once

import ssdtrain

Offload = ssdtrain.ActivationOffload


# -- walking a graph more than once, or in part --------------------------------------------------------------------


def test_retain_graph(offload: Offload) -> None:
    """Three backwards through one graph: what the first one unpacked and dropped is read again."""

    def run(send: Send) -> Any:
        model, x = mlp(), torch.randn(4, 32)
        loss = model(x).square().sum()
        for retain in (True, True, False):
            send()
            loss.backward(retain_graph=retain)
        return grads_of(model)

    assert_same(run, offload)


def test_second_backward_without_retain_graph(offload: Offload) -> None:
    """The same error as without us, and records that are gone."""

    def run(send: Send) -> Any:
        model, x = mlp(), torch.randn(4, 32)
        loss = model(x).square().sum()
        send()
        loss.backward()
        loss.backward()

    assert_same_error(run, offload, "backward through the graph a second time")
    assert offload.stats.num_live_records == 0


def test_create_graph(offload: Offload) -> None:
    """A gradient penalty: backward makes a graph of the unpacked tensors, and a second backward goes through both."""

    def run(send: Send) -> Any:
        model, x = mlp(), torch.randn(4, 32, requires_grad=True)
        y = model(x).square().sum()
        send()
        (grad,) = torch.autograd.grad(y, x, create_graph=True)
        penalty = (grad.norm(dim=1) - 1).square().sum()
        del grad
        send()
        (y + penalty).backward()
        return grads_of(model)

    assert_same(run, offload)


def test_third_derivative(offload: Offload) -> None:
    def run(send: Send) -> Any:
        x = torch.randn(16, requires_grad=True)
        y = (x * 1).sin().exp().sum()
        results = []
        for _ in range(3):
            send()
            (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            results.append(y.detach())
        return results

    assert_same(run, offload)


def test_grad_of_parts(offload: Offload) -> None:
    """The upper half first, then the lower half from there, then a leaf in the middle again."""

    def run(send: Send) -> Any:
        lower, upper, x = mlp(), mlp(), torch.randn(4, 32, requires_grad=True)
        middle = lower(x)
        loss = upper(middle).square().sum()
        send()
        (at_middle,) = torch.autograd.grad(loss, middle, retain_graph=True)
        send()
        at_x = torch.autograd.grad(middle, [x, *lower.parameters()], at_middle, retain_graph=True)
        return [at_middle, *at_x, *torch.autograd.grad(loss, list(upper.parameters()))]

    assert_same(run, offload)


def test_backward_with_inputs(offload: Offload) -> None:
    def run(send: Send) -> Any:
        model, x = mlp(), torch.randn(4, 32)
        loss = model(x).square().sum()
        send()
        loss.backward(inputs=list(model[4].parameters()))
        return grads_of(model)

    assert_same(run, offload)


def test_unused_branch(offload: Offload) -> None:
    """An auxiliary head that no loss reaches: its records wait, and go when the graph goes."""

    def run(send: Send) -> Any:
        body, head, unused, x = mlp(), mlp(), mlp(), torch.randn(4, 32)
        hidden = body(x)
        side = unused(hidden)
        loss = head(hidden).square().sum()
        send()
        loss.backward()
        del side
        return grads_of(body) + grads_of(head) + grads_of(unused)

    assert_same(run, offload)
    assert offload.stats.num_live_records == 0


# -- graphs that end early -----------------------------------------------------------------------------------------


def test_dropped_graph_releases_its_records(offload: Offload) -> None:
    """Evaluation with gradients switched on by mistake, a hundred times: without a cycle to collect, space is reused.

    `exp` saves its own output: held by itself, it would keep its node, and its memory, alive until the next collection.
    """
    gc.collect()
    gc.disable()
    try:
        with offload:
            for _ in range(100):
                hidden = mlp(layers=1)(torch.randn(64, 32)).exp().sigmoid()
                send()
                assert offload.stats.num_live_records > 0
                del hidden
                assert offload.stats.num_live_records == 0
    finally:
        gc.enable()
    assert offload.stats.num_offloaded > 300
    assert offload.stats.peak_disk_nbytes < 1 << 20


def test_dropped_before_anything_was_written(offload: Offload) -> None:
    """The writes not begun are cancelled, those begun end, and what follows is right."""
    x = torch.randn(256, 256)
    with offload:
        for _ in range(5):
            mlp(width=256)(x)
    assert_same(lambda send: train_once(mlp(), send), offload)


class Refuses(torch.autograd.Function):
    """Raises where it is told to."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, where: str) -> torch.Tensor:
        ctx.where = where
        ctx.save_for_backward(x)
        if where == "forward":
            raise ArithmeticError("refused in forward")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.where == "backward":
            raise ArithmeticError("refused in backward")
        return grad, None


@pytest.mark.parametrize("where", ["forward", "backward", "nowhere"])
def test_exception_in_the_middle(offload: Offload, where: str) -> None:
    """A step that fails half way, out of memory say, then a normal one in the same context."""

    def run(send: Send) -> Any:
        lower, upper, x = mlp(), mlp(), torch.randn(4, 32)
        message = ""
        try:
            loss = upper(Refuses.apply(lower(x), where)).square().sum()
            send()
            loss.backward()
        except ArithmeticError as error:
            message = str(error)
        loss = None
        failed = grads_of(lower) + grads_of(upper)
        upper.zero_grad()
        loss = upper(lower(x)).square().sum()
        send()
        loss.backward()
        return [message, failed, grads_of(lower) + grads_of(upper)]

    message, *_ = assert_same(run, offload)
    assert message == ("" if where == "nowhere" else f"refused in {where}")
    assert offload.stats.num_live_records == 0


def test_exception_leaves_the_context_clean(offload: Offload) -> None:
    """The hooks are taken away when the body raises."""
    with pytest.raises(ArithmeticError), offload:
        Refuses.apply(torch.randn(8, requires_grad=True), "forward")
    before = offload.stats.num_saved
    torch.randn(8, requires_grad=True).exp()
    assert offload.stats.num_saved == before


# -- aliases and escapes -------------------------------------------------------------------------------------------


def test_detached_alias(offload: Offload) -> None:
    """A detached tensor shares storage and version: one record serves both sides, and gradient flows through one."""

    def run(send: Send) -> Any:
        leaf = torch.randn(64, requires_grad=True)
        hidden = leaf * 1
        loss = (hidden.sin() * hidden.detach().cos() * hidden.detach()[::2].repeat(2)).sum()
        del hidden
        send()
        loss.backward()
        return leaf.grad

    assert_same(run, offload)


class Stash(torch.autograd.Function):
    """Lets a view of what it saved escape from backward."""

    escaped: ClassVar[list[torch.Tensor]] = []

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        Stash.escaped.append(x[1:].view(-1))
        return grad * x


def test_a_view_that_escapes_backward(offload: Offload) -> None:
    """Logging code keeps a saved tensor: its memory must not be reused while it does, whatever happens next."""

    def run(send: Send) -> Any:
        Stash.escaped.clear()
        leaf = torch.randn(64, 64, requires_grad=True)
        for i in range(5):
            output = Stash.apply(leaf * i).sum()
            send()
            output.backward()
        return [t.clone() for t in Stash.escaped]

    try:
        assert_same(run, offload)
    finally:
        Stash.escaped.clear()


class Everything(torch.autograd.Function):
    """Saves inputs, outputs, something in between and None; changes one input in place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        between = x.sin()
        y.mul_(scale)
        ctx.mark_dirty(y)
        output = between * 2
        ctx.scale = scale
        ctx.save_for_backward(x, None, output, between, y)
        return output, y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, none, output, between, y = ctx.saved_tensors
        assert none is None and torch.equal(ctx.saved_tensors[2], output)  # unpacked for the second time
        return grads[0] * x.cos() * output + between * y, grads[1] * ctx.scale * output, None


def test_custom_function_saves_everything(offload: Offload) -> None:
    def run(send: Send) -> Any:
        x, y = torch.randn(64, requires_grad=True), torch.randn(64, requires_grad=True)
        output, dirty = Everything.apply(x * 1, y * 1, 3.0)
        loss = (output * dirty).sum()
        del output, dirty
        send()
        loss.backward()
        return [x.grad, y.grad]

    assert_same(run, offload)


def test_saved_tensor_attributes_of_a_node(offload: Offload) -> None:
    """`grad_fn._saved_self` unpacks too, as often as asked, before and after backward."""

    def run(send: Send) -> Any:
        leaf = torch.randn(64, requires_grad=True)
        output = (leaf * 1).sin()
        send()
        node = output.grad_fn
        before = [node._saved_self.clone(), node._saved_self.clone()]
        output.sum().backward(retain_graph=True)
        return [*before, node._saved_self.clone(), leaf.grad]

    assert_same(run, offload)
