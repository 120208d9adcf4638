"""What autograd saves while backward runs: graphs of their own, walked later, are offloaded like others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import MakeOffload, Send, assert_same, grads_of, mlp
from torch import nn
from torch.utils.checkpoint import checkpoint

DURING = "saved during backward"


def gradient_penalty(send: Send) -> Any:
    """WGAN-GP: the norm of a gradient is part of the loss."""
    model, x = mlp(), torch.randn(16, 32, requires_grad=True)
    score = model(x).square().sum()
    send()
    (gradient,) = torch.autograd.grad(score, x, create_graph=True)
    loss = score + (gradient.norm(dim=1) - 1).square().mean()
    send()
    loss.backward()
    return loss, x.grad, grads_of(model)


def maml(send: Send) -> Any:
    """Two inner steps; the outer gradient goes through both."""
    model = mlp(layers=2)
    weights = dict(model.named_parameters())
    for _ in range(2):
        inner = torch.func.functional_call(model, weights, (torch.randn(16, 32),)).square().mean()
        send()
        gradients = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        weights = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), gradients, strict=True)}
    loss = torch.func.functional_call(model, weights, (torch.randn(16, 32),)).square().mean()
    send()
    loss.backward()
    return loss, grads_of(model)


def hessian_vector_product(send: Send) -> Any:
    """Backward over backward, twice through one graph."""
    model = mlp(layers=2)
    parameters = list(model.parameters())
    loss = model(torch.randn(16, 32)).square().sum()
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    send()
    products = []
    for _ in range(2):
        vectors = [torch.randn_like(p) for p in parameters]
        products.append(torch.autograd.grad(gradients, parameters, vectors, retain_graph=True))
    return products


def grad_cache(send: Send) -> Any:
    """A contrastive loss over embeddings made without a graph; its hook makes the graph, chunk by chunk."""
    model, chunks = mlp(), [torch.randn(8, 32) for _ in range(3)]
    with torch.no_grad():
        embeddings = [model(chunk).requires_grad_() for chunk in chunks]
    flat = torch.cat(embeddings)
    loss = (flat @ flat.t()).logsumexp(dim=1).mean()
    (*cached,) = torch.autograd.grad(loss, embeddings)
    loss = loss.detach().requires_grad_()

    def again(_: torch.Tensor) -> None:
        with torch.enable_grad():
            for chunk, gradient in zip(chunks, cached, strict=True):
                surrogate = (model(chunk) * gradient).sum()
                send()
                surrogate.backward()

    (loss * 1).register_hook(again)
    result = loss * 1
    result.register_hook(again)
    result.backward()
    return loss, grads_of(model)


@pytest.mark.parametrize("run", [gradient_penalty, maml, hessian_vector_product, grad_cache])
def test_it_is_offloaded(make_offload: MakeOffload, run: Any) -> None:
    offload = make_offload()
    assert_same(run, offload)
    stats = offload.stats
    assert DURING not in stats.skipped, str(stats)
    assert stats.num_offloaded > 8


@pytest.mark.parametrize("mode", ["all", "auto"])
def test_steps_with_a_penalty_are_planned_like_others(make_offload: MakeOffload, mode: str) -> None:
    offload = make_offload(mode=mode)
    for _ in range(3):
        assert_same(gradient_penalty, offload, is_offloaded=None)


def test_what_a_checkpoint_computes_again_stays(make_offload: MakeOffload) -> None:
    """It is needed at once. What is computed around it in a backward of backward is not."""
    offload = make_offload()

    def run(send: Send) -> Any:
        model, head = mlp(), nn.Linear(32, 1)
        x = torch.randn(16, 32, requires_grad=True)
        loss = head(checkpoint(model, x, use_reentrant=True)).sum()
        send()
        loss.backward()
        return loss, x.grad, grads_of(model)

    assert_same(run, offload)
    assert offload.stats.skipped[DURING].count > 0


def test_saved_again_by_the_backward_that_reads_it(make_offload: MakeOffload) -> None:
    """Backward of backward saves what backward has just read: its bytes are on the drive already."""
    offload = make_offload()

    def run(send: Send) -> Any:
        x = torch.randn(64, 64, requires_grad=True)
        y = x.sin()
        z = (y * y * x).sum()
        send()
        (gradient,) = torch.autograd.grad(z, x, create_graph=True)
        send()
        gradient.square().sum().backward()
        return x.grad

    assert_same(run, offload)
