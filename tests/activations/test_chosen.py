"""Only some tensors are offloaded: those marked, and inputs of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import MakeOffload, Send, assert_same, gauges, mlp, send
from torch.utils.checkpoint import checkpoint

import ssdtrain

NOT_CHOSEN = "not chosen"


def put(send: Send, offload: ssdtrain.ActivationOffload) -> None:
    """As `send`, whose own tensors stay here."""
    send()
    gauges(offload)


def test_marked_tensors_are_offloaded_and_others_stay(make_offload: MakeOffload) -> None:
    offload = make_offload(only="marked")

    def run(send: Send) -> Any:
        x = torch.randn(64, 32, requires_grad=True)
        y = x.sin()  # saves x
        z = y.exp() * 1
        if offload.is_innermost:
            offload.mark(z)
        loss = z.view(32, 64).cos().sum() + z.sin().square().sum()
        del y, z
        put(send, offload)
        loss.backward()
        return x.grad

    assert_same(run, offload, is_offloaded=None)
    stats = offload.stats
    assert stats.read_nbytes == stats.offloaded_nbytes == 64 * 32 * 4, "the marked one, of which there are two views"
    assert stats.skipped[NOT_CHOSEN].count >= 3, stats


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize(
    "run_again",
    [
        lambda block, x: checkpoint(block, x, use_reentrant=False),
        lambda block, x: checkpoint(block, x, use_reentrant=True),
        lambda block, x: ssdtrain.checkpoint(lambda: block(x)),
    ],
    ids=["plain", "reentrant", "own"],
)
def test_inputs_of_checkpoints_are_offloaded_and_others_stay(
    make_offload: MakeOffload, run_again: Callable[..., torch.Tensor]
) -> None:
    offload = make_offload(only="checkpoint_inputs")

    def run(send: Send) -> Any:
        model, source = mlp(layers=3), torch.randn(64, 32, requires_grad=True)
        x = source.sin()
        for layer in model:
            x = run_again(layer, x)
        loss = x.exp().sum()
        del x
        put(send, offload)
        loss.backward()
        return [source.grad, *(p.grad for p in model.parameters())]

    assert_same(run, offload, is_offloaded=None)
    stats = offload.stats
    assert 5 * 64 * 32 * 4 <= stats.offloaded_nbytes <= 6 * 64 * 32 * 4, (
        stats
    )  # of six layers; the last may have stayed
    assert stats.skipped[NOT_CHOSEN].count >= 2, "what is round them"


@pytest.mark.cpu_only
def test_a_mark_is_on_the_memory_and_ends_with_it(make_offload: MakeOffload) -> None:
    offload = make_offload(only="marked")
    with offload:
        for _ in range(20):
            offload.mark(torch.randn(64, 32))  # gone at once; the allocator gives its place to others
        x = torch.randn(64, 32, requires_grad=True)
        graphs = [x.sin().exp() for _ in range(5)]
        send()
    assert offload.stats.offloaded_nbytes == 0 and graphs


@pytest.mark.cpu_only
def test_weights_and_what_cannot_leave_keep_their_reasons(make_offload: MakeOffload) -> None:
    offload, model = make_offload(only="marked"), mlp()
    with offload:
        model(torch.randn(4, 32)).sum().backward()
        sparse = torch.eye(4).to_sparse().requires_grad_()
        torch.sparse.mm(sparse, torch.randn(4, 4, requires_grad=True)).sum().backward()
    assert {"weight", "not strided", NOT_CHOSEN} <= set(offload.stats.skipped)


@pytest.mark.cpu_only
def test_marks_need_a_policy_that_asks_for_them(make_offload: MakeOffload) -> None:
    with pytest.raises(ValueError, match="Expected a policy with only="):
        make_offload().mark(torch.ones(4))
    with pytest.raises(ValueError, match="only"):
        ssdtrain.ActivationPolicy(only="some")  # type: ignore[arg-type]


def test_the_last_saved_stay(make_offload: MakeOffload) -> None:
    """With two forwards alive together, those of the second. The very last one does not leave anyway: no operator
    comes after it before backward."""
    offload = make_offload(keep_last=3)

    def gradients() -> list[torch.Tensor | None]:
        torch.manual_seed(0)
        xs = [torch.randn(64, 32, requires_grad=True) for _ in range(2)]
        losses = []
        for x in xs:
            y = x
            for _ in range(8):
                y = y.sin()  # saves its input
            losses.append(y.sum())
        torch.stack(losses).sum().backward()
        return [x.grad for x in xs]

    expected = gradients()
    for step in (1, 2, 3):
        with offload:
            assert all(a is not None and torch.equal(a, b) for a, b in zip(expected, gradients(), strict=True))
        stats = offload.stats
        assert stats.num_offloaded == step * (16 - 1 - 3), stats
        assert stats.skipped["among the last saved"].count == step * 3, stats
        assert stats.num_live_records == 0
