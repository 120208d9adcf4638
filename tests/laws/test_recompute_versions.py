"""Blocks that run twice: what they change in place is refused where autograd refuses it, and never done twice."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from conftest import MakeOffload, grads_of, same_bits, send
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.cpu_only

MODIFIED = "modified by an inplace operation"


class Block(nn.Module):
    """Calls `change` on its way, with itself, its argument, what it saved, and its number of calls."""

    def __init__(self, change: Callable[..., Any]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.GELU())
        self.register_buffer("table", torch.zeros(16))
        self.register_buffer("spread", torch.ones(16))
        self.codes = nn.Parameter(torch.ones(16), requires_grad=False)
        self.change = change
        self.num_calls = self.step = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        saved = self.first(x + 1)
        product = saved * saved * self.codes
        more = self.change(self, x, saved)
        product = product + self.table + (more if isinstance(more, torch.Tensor) else 0)
        result = self.last(product + saved + x)
        return result.exp() if self.change is nothing else result  # `exp` saves what it returns


class Model(nn.Module):
    def __init__(self, change: Callable[..., Any], after: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(change) for _ in range(3)])
        self.after = after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
            self.after(x)
        return x.mean()


def nothing(*_: object) -> None:
    pass


def train(
    change: Callable[..., Any],
    after: Callable[[torch.Tensor], Any] = nothing,
    context: Callable[[nn.Module], AbstractContextManager[Any]] = lambda model: nullcontext(),
    between: Callable[[nn.Module], Any] = nothing,
    prepare: Callable[[nn.Module], Any] = nothing,
) -> tuple[list[Any], nn.Module]:
    torch.manual_seed(0)
    model = Model(change, after)
    prepare(model)
    results: list[Any] = []
    entered = context(model)
    for number in range(3):
        torch.manual_seed(number)
        x = torch.randn(4, 16, requires_grad=True)
        model.zero_grad()
        for block in model.blocks:
            block.step = number
        with entered:
            loss = model(x * 1)
            send()
        between(model)
        loss.backward()
        results += [loss.detach(), x.grad, *[None if g is None else g.clone() for g in grads_of(model)]]
        results += [buffer.clone() for buffer in model.buffers()]
        loss = None
    return results, model


# -- refused -------------------------------------------------------------------------------------------------------


def change_saved(block: Block, x: torch.Tensor, saved: torch.Tensor) -> None:
    saved.mul_(2)


def change_a_view(block: Block, x: torch.Tensor, saved: torch.Tensor) -> None:
    saved.detach()[:1].zero_()


@pytest.mark.parametrize("change", [change_saved, change_a_view])
def test_a_change_of_what_a_block_saved_is_refused(make_offload: MakeOffload, change: Callable[..., Any]) -> None:
    """PyTorch's checkpoint changes it again in the second run, and backward computes with that: a wrong gradient."""
    for context in (lambda model: nullcontext(), lambda model: make_offload(model, recompute="all")):
        with pytest.raises(RuntimeError, match=MODIFIED):
            train(change, context=context)


def test_a_change_of_what_a_block_returned_is_refused(make_offload: MakeOffload) -> None:
    """Its last operator saved its result."""
    for context in (lambda model: nullcontext(), lambda model: make_offload(model, recompute="all")):
        with pytest.raises(RuntimeError, match=MODIFIED):
            train(nothing, after=lambda x: x.mul_(2), context=context)


def change_weights(model: nn.Module) -> None:
    with torch.no_grad():
        model.blocks[1].last[0].weight.add_(1)


def test_a_weight_that_changes_between_forward_and_backward_is_refused(make_offload: MakeOffload) -> None:
    """An optimizer step too early: the second run would compute with other weights than the first."""
    for context in (lambda model: nullcontext(), lambda model: make_offload(model, recompute="all")):
        with pytest.raises(RuntimeError, match=MODIFIED):
            train(nothing, context=context, between=change_weights)


def change_biases(model: nn.Module) -> None:
    with torch.no_grad():
        model.blocks[1].last[0].bias.add_(1)


def test_a_bias_that_changes_between_forward_and_backward_is_refused(make_offload: MakeOffload) -> None:
    """Nothing saves a bias: plain training does not notice, and the second run would compute with the new one."""
    train(nothing, between=change_biases)
    with pytest.raises(RuntimeError, match=MODIFIED):
        train(nothing, context=lambda model: make_offload(model, recompute="all"), between=change_biases)


# -- run once --------------------------------------------------------------------------------------------------------


def count(block: Block, x: torch.Tensor, saved: torch.Tensor) -> None:
    block.table += 1


def count_once_in_a_while(block: Block, x: torch.Tensor, saved: torch.Tensor) -> None:
    if block.step == 2:
        block.table.add_(1)


def replace_a_buffer(block: Block, x: torch.Tensor, saved: torch.Tensor) -> None:
    block.table = block.table + 1
    block.table = block.table + 1


def quantise(block: Block, x: torch.Tensor, saved: torch.Tensor) -> None:
    """Codes that follow what passes, as in vector quantisation."""
    block.codes = nn.Parameter(block.codes.detach().clone(), requires_grad=False)
    block.table.lerp_(saved.detach().mean(0), 0.5)


def follow_statistics(block: Block, x: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
    """No version tells of it."""
    return F.batch_norm(saved, block.table, block.spread, training=True)


def add_to_the_argument(block: Block, x: torch.Tensor, saved: torch.Tensor) -> None:
    x.add_(1)


def change_a_parameter(block: Block, x: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        block.first.bias.add_(0.5)  # nothing saves a bias
    return saved * 2


CHANGES = [
    count,
    count_once_in_a_while,
    replace_a_buffer,
    quantise,
    follow_statistics,
    add_to_the_argument,
    change_a_parameter,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_block_that_changes_what_outlives_it_runs_once(make_offload: MakeOffload, change: Callable[..., Any]) -> None:
    """Also in the call in which it is seen, the first or a later one: what is done cannot be undone."""
    made: list[Any] = []

    def context(model: nn.Module) -> AbstractContextManager[Any]:
        made.append(make_offload(model, recompute="all"))
        return made[0]

    expected, plain = train(change)
    actual, model = train(change, context=context)
    assert same_bits(actual, expected)
    numbers = [block.num_calls for block in model.blocks]
    if change is count_once_in_a_while:
        assert numbers == [5, 5, 5], "twice, twice, and once"
    else:
        assert numbers == [block.num_calls for block in plain.blocks] == [3, 3, 3]
    assert sum("is not run twice" in text for text in made[0].stats.fallbacks) == 3
    assert made[0].stats.num_offloaded > 0


def differentiate(block: Block, x: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
    """A gradient penalty inside the block."""
    (slope,) = torch.autograd.grad((saved.sin() * saved.cos()).sum(), saved, create_graph=True)
    return slope * slope


def test_a_block_that_differentiates_in_its_forward(make_offload: MakeOffload) -> None:
    """What it saved and asks for while it runs is there."""
    expected, _ = train(differentiate)
    actual, _ = train(differentiate, context=lambda model: make_offload(model, recompute="all"))
    assert same_bits(actual, expected)


def test_an_error_in_a_block_leaves_nothing(make_offload: MakeOffload) -> None:
    """A step that fails half way, then a normal one."""

    def fail(block: Block, x: torch.Tensor, saved: torch.Tensor) -> None:
        if block.num_calls == 1 and block.fails:
            raise ArithmeticError

    torch.manual_seed(0)
    model = Model(fail, nothing)
    for number, block in enumerate(model.blocks):
        block.fails = number == 1
    offload = make_offload(model, recompute="all")
    x = torch.randn(4, 16, requires_grad=True)
    with offload:
        with pytest.raises(ArithmeticError):
            model(x * 1)
        assert offload.stats.num_live_records == 0
        model(x * 1).backward()
    assert [block.num_calls for block in model.blocks] == [3, 3, 2]


@pytest.mark.parametrize(
    "policy", [{"recompute": "all"}, {"recompute": "auto", "memory_budget": "1GiB", "mode": "auto"}], ids=str
)
def test_buffers_without_versions(make_offload: MakeOffload, policy: dict[str, Any]) -> None:
    """Tables made in inference mode, sparse ones and NaN are looked at with care, and change nothing."""

    def use(block: Block, x: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
        return torch.sparse.mm(block.sparse, saved) + block.inferred.clone()

    def context(model: nn.Module) -> AbstractContextManager[Any]:
        made.append(make_offload(model, **policy))
        return made[0]

    def with_tables(model: nn.Module) -> None:
        for block in model.blocks:
            block.register_buffer("sparse", torch.eye(4).to_sparse())
            block.register_buffer("unset", torch.full((4,), torch.nan))
            with torch.inference_mode():
                block.register_buffer("inferred", torch.ones(16))

    made: list[Any] = []
    expected, _ = train(use, prepare=with_tables)
    actual, model = train(use, context=context, prepare=with_tables)
    assert same_bits(actual, expected)
    assert not any("is not run twice" in text for text in made[0].stats.fallbacks)
    assert [block.num_calls for block in model.blocks] == ([6, 6, 6] if policy["recompute"] == "all" else [3, 3, 3])


def test_other_weights_for_one_call_are_not_forgotten(make_offload: MakeOffload) -> None:
    """Fast weights of meta-learning are in the block for the call only: a second run would take the slow ones."""

    def run(offload: Any = None) -> list[Any]:
        torch.manual_seed(0)
        model = Model(lambda *_: None, nothing)
        x = torch.randn(4, 16)
        with make_offload(model, recompute="all") if offload else nullcontext():
            slow = dict(model.named_parameters())
            gradients = torch.autograd.grad(model(x), [p for p in slow.values() if p.requires_grad], create_graph=True)
            found = iter(gradients)
            fast = {name: p - next(found) if p.requires_grad else p for name, p in slow.items()}
            loss = torch.func.functional_call(model, fast, (x,))
        loss.backward()
        return [loss.detach(), *grads_of(model)]

    expected = run()
    assert expected[0].isfinite()
    assert same_bits(run(offload=True), expected)
