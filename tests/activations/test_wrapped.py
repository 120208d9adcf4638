"""Tensors of classes of their own: those made of others, and those that only override functions."""

from __future__ import annotations

import gc
import json
from typing import Any

import pytest
import torch
from conftest import MakeOffload, Send, assert_same, assert_same_error, gauges, grads_of
from folders import JOBS
from forks import Forks, ranks
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

NUM_STEPS = 2  # of the worker
WORKER = JOBS / "tensor_parallel_worker.py"
jagged_warning = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


class Tagged(torch.Tensor):
    """A subclass with nothing of its own, as users write them."""


class Keep(torch.autograd.Function):
    """Hands out in backward what it saved."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, out: list[torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        ctx.out = out
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        ctx.out.extend(ctx.saved_tensors)
        return grad, None, *[None] * len(ctx.saved_tensors)


def saved_and_back(send: Send, *tensors: torch.Tensor) -> list[torch.Tensor]:
    out: list[torch.Tensor] = []
    loss = Keep.apply(torch.ones((), requires_grad=True), out, *tensors)
    del tensors
    send()
    loss.backward()
    return out


def jagged(rows: tuple[int, ...] = (3, 5, 2), width: int = 64) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.randn(n, width) for n in rows], layout=torch.jagged)


def two(width: int = 64) -> torch.Tensor:
    return TwoTensor(torch.randn(8, width), torch.randn(8, width))


@pytest.mark.cpu_only
def test_a_class_that_overrides_functions_is_offloaded(make_offload: MakeOffload) -> None:
    offload = make_offload()

    def run(send: Send) -> Any:
        weight = torch.randn(64, 64, requires_grad=True)
        x = torch.randn(64, 64).as_subclass(Tagged)
        (back,) = saved_and_back(send, torch.randn(64, 64).as_subclass(Tagged))
        loss = (x @ weight).sin().square().sum()
        assert type(loss) is Tagged
        del x
        send()
        loss.backward()
        assert weight.grad is not None
        return back, weight.grad.as_subclass(torch.Tensor)

    back, _ = assert_same(run, offload)
    assert type(back) is Tagged
    assert "tensor subclass" not in offload.stats.skipped, str(offload.stats)


@pytest.mark.cpu_only
@jagged_warning
def test_jagged_tensors_are_offloaded_and_keep_their_offsets(make_offload: MakeOffload) -> None:
    """Other jagged tensors of the graph have the same offsets: as another object they would not fit together."""
    offload = make_offload(min_nbytes=512)

    def run(send: Send) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64))
        x = jagged()
        y = model(x)
        (back,) = saved_and_back(send, y.detach() * 2)
        assert back.offsets() is y.offsets()
        z = y * x
        del x, y
        send()
        z.values().square().sum().backward()
        return back.values(), grads_of(model)

    assert_same(run, offload)
    assert set(offload.stats.skipped) == {"weight", "smaller than min_nbytes"}, str(offload.stats)


@pytest.mark.cpu_only
def test_what_it_is_made_of_is_offloaded(make_offload: MakeOffload) -> None:
    offload = make_offload()

    def run(send: Send) -> Any:
        weight, x = torch.randn(64, 64, requires_grad=True), two()
        back = saved_and_back(send, two())
        loss = ((x @ weight).sin() * x).sum()
        del x
        send()
        loss.backward()
        assert type(back[0]) is TwoTensor and type(weight.grad) is TwoTensor
        return back[0].a, back[0].b, weight.grad.a, weight.grad.b

    assert_same(run, offload)
    assert set(offload.stats.skipped) <= {"weight"}, str(offload.stats)


@pytest.mark.cpu_only
def test_one_trip_for_the_views_of_one(make_offload: MakeOffload) -> None:
    offload = make_offload()
    with offload:
        x = two()
        out: list[torch.Tensor] = []
        loss = Keep.apply(torch.ones((), requires_grad=True), out, x, x.t(), x.view(-1))
        assert offload.stats.offloaded_nbytes == 0 and offload.stats.num_live_records == 2
        loss.backward()
    assert offload.stats.deduplicated_nbytes >= 2 * x.nbytes


@pytest.mark.cpu_only
def test_the_object_itself_while_somebody_holds_it(make_offload: MakeOffload) -> None:
    with make_offload():
        x, out = two(), list[torch.Tensor]()
        Keep.apply(torch.ones((), requires_grad=True), out, x).backward()
        assert out[0] is x


@pytest.mark.cpu_only
@pytest.mark.parametrize("make", [two, lambda: torch.randn(8, 64).as_subclass(Tagged)])
def test_changed_in_place(make_offload: MakeOffload, make: Any) -> None:
    def run(send: Send) -> Any:
        weight, x = torch.randn(64, 64, requires_grad=True), make()
        loss = (x @ weight).sum()
        send()
        x.mul_(2)
        loss.backward()

    assert_same_error(run, make_offload(), "modified by an inplace operation")


@pytest.mark.cpu_only
def test_weights_of_a_class_of_their_own_stay(make_offload: MakeOffload) -> None:
    """By what they are made of: also what else shares that memory."""
    model = nn.Linear(64, 64, bias=False)
    model.weight = nn.Parameter(TwoTensor(torch.randn(64, 64), torch.randn(64, 64)))
    offload = make_offload(model)
    with offload:
        loss = model(two()).sum()
        saved = Keep.apply(loss, [], model.weight.t(), model.weight.detach().a)
        assert offload.stats.skipped["weight"].count >= 2, str(offload.stats)
        saved.sum().backward()


@pytest.mark.cpu_only
def test_all_memory_is_let_go(make_offload: MakeOffload) -> None:
    offload = make_offload()
    with offload:
        loss = (two() @ torch.randn(64, 64, requires_grad=True)).sin().sum()
        del loss
        gc.collect()
    assert gauges(offload) == (0, 0, 0)


@pytest.fixture(scope="module")
def tensor_parallel(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = forks.run([WORKER, tmp_path_factory.mktemp("ranks")], ranks(2))
    assert [rank.returncode for rank in done] == [0, 0], done
    found: dict[str, Any] = json.loads(done[0].stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("kind", ["sequence parallel", "loss parallel", "batch sharded"])
def test_tensor_parallel(tensor_parallel: dict[str, Any], kind: str) -> None:
    """Nearly all is offloaded, the bits are the same, and weights stay."""
    found = tensor_parallel[kind]
    assert found["is_equal"], found
    assert found["offloaded_nbytes"] >= 0.85 * found["saved_nbytes"], found
    assert found["held_nbytes"] <= 0.25 * found["saved_nbytes"] / NUM_STEPS, found
    assert "tensor subclass" not in found["skipped"], found
