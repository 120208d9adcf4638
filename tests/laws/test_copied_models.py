"""A model that is copied, pickled or saved inside the context: the copy is whole, and trains by itself."""

from __future__ import annotations

import copy
import io
import pickle
import pickletools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import inside
import pytest
import torch
from conftest import MakeOffload, grads_of, same_bits
from torch import nn

import ssdtrain

pytestmark = pytest.mark.cpu_only

Offload = ssdtrain.ActivationOffload


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def make() -> Model:
    torch.manual_seed(0)
    return Model()


def train(model: nn.Module, context: AbstractContextManager[Any] | None = None) -> list[Any]:
    results = []
    for number in range(3):
        torch.manual_seed(number)
        x = torch.randn(8, 16)
        with context if context is not None else nullcontext():
            loss = model(x).square().mean()
        loss.backward()
        results += [loss.detach(), *[g.clone() for g in grads_of(model) if g is not None]]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        model.zero_grad()
    return results + [p.detach().clone() for p in model.parameters()]


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
}


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("recompute", ["never", "all"])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_trains_by_itself(make_offload: MakeOffload, how: str, recompute: str, where: str) -> None:
    """EMA, snapshots, checkpoints of the whole model. A copy whose forward is the original's trains the original."""
    expected = train(make())
    model = make()
    offload = make_offload(model, recompute=recompute)
    with offload:
        model(torch.randn(8, 16))
        twin = COPIES[how](model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()  # nothing of it may show in the copy
        if where == "inside":
            assert same_bits(train(twin), expected)
    if where == "outside":
        assert same_bits(train(twin), expected)
    assert not any(p.any() or p.grad is not None for p in model.parameters()), "the original was trained"
    assert all(p.grad is None for p in model.parameters())
    again = COPIES[how](twin)
    with torch.no_grad():
        for parameter, source in zip(again.parameters(), make().parameters(), strict=True):
            parameter.copy_(source)
    own = make_offload(again, recompute=recompute)
    assert same_bits(train(again, own), expected), "a copy of the copy, with an offload of its own"


@pytest.mark.parametrize("recompute", ["never", "all"])
def test_what_is_saved_needs_no_ssdtrain(make_offload: MakeOffload, recompute: str) -> None:
    """A checkpoint of the whole model is read where it is not installed."""
    model = make()
    with make_offload(model, recompute=recompute):
        data = pickle.dumps(model)
    names = {str(argument) for _, argument, _ in pickletools.genops(data) if argument is not None}
    assert not any("ssdtrain" in name for name in names)


def test_a_copied_block_keeps_a_forward_of_its_own(make_offload: MakeOffload) -> None:
    """Other libraries set `forward` on a block too: its copy has a copy of theirs, as without us."""

    class Scaled:
        def __init__(self, block: nn.Module) -> None:
            self.block, self.scale = block, torch.tensor(3.0)

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return type(self.block).forward(self.block, x) * self.scale

    def with_own() -> Model:
        model = make()
        for block in model.blocks:
            block.forward = Scaled(block)
        return model

    expected = train(copy.deepcopy(with_own()))
    model = with_own()
    own = model.blocks[0].forward
    with make_offload(model, recompute="all"):
        twin = copy.deepcopy(model)
        assert twin.blocks[0].forward.block is twin.blocks[0]
        assert same_bits(train(twin), expected)
    assert model.blocks[0].forward is own


def test_a_forward_set_inside_the_context_stays(make_offload: MakeOffload) -> None:
    """Whoever wraps a block after us is not undone, and calls ours, which does nothing outside of the context."""
    expected = train(make())
    model = make()
    offload = make_offload(model, recompute="all")
    num_calls: list[int] = []

    def wrapped(inner: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any) -> Any:
            num_calls.append(1)
            return inner(*args)

        return forward

    with offload:
        model.blocks[0].forward = wrapped(model.blocks[0].forward)
    assert same_bits(train(model), expected)
    assert len(num_calls) == 3 and "forward" not in model.blocks[1].__dict__


def test_hooks_leave_the_model_with_the_context(make_offload: MakeOffload) -> None:
    model = make()
    with make_offload(model, recompute="all"):
        model(torch.randn(8, 16))
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in module.__dict__


def test_names_follow_errors_that_were_caught(make_offload: MakeOffload) -> None:
    """A module that raised is not running any more: what is saved next is not said to be its."""

    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError

    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fails, self.works = Fails(), nn.Tanh()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return self.fails(x)
            except ArithmeticError:
                return (self.works(x) * 2).sin()

    model = Catches()
    offload = make_offload(model)
    with offload, offload:  # entered twice: two pairs of hooks, one name
        for _ in range(2):
            y = model(torch.randn(64, requires_grad=True))
            assert inside.names(offload).where() == ""
            wheres = [record.where for record in inside.thread(offload).pass_.records if record is not None]
            assert wheres[-2:] == [" of works", " of Catches"]
            with pytest.raises(ArithmeticError):
                model.fails(y)
            y = None
    assert inside.names(offload).where() == ""
