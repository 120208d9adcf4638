"""Offloaded parameters under `torch.func`, in inference mode, by address: as plain ones, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from state_tools import EAGER_STATE, adamw, batch, check_same, model_of, train, values
from torch import nn

import ssdtrain


def both(folder: Path) -> tuple[nn.Module, nn.Module, ssdtrain.ParameterOffload]:
    """A plain model and the same one offloaded."""
    plain, model = model_of("mlp"), model_of("mlp")
    ssdtrain.offload_parameters(model, folder, EAGER_STATE | {"prefetch_nbytes": 0})
    owner = ssdtrain.parameter_offload(model)
    owner.flush()
    return plain, model, owner


def check_trains_on(model: nn.Module, plain: nn.Module) -> None:
    check_same(*(train(m, adamw(m.parameters()), 2) for m in (model, plain)))
    check_same(values(model), values(plain))


TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "grad": lambda model: torch.func.grad(model)(batch(0)),
    "vjp": lambda model: torch.func.vjp(model, batch(0))[1](torch.ones(())),
    "jacrev": lambda model: torch.func.jacrev(model)(batch(0)),
    "per sample": lambda model: torch.func.vmap(torch.func.grad(model))(batch(0)),
    "a parameter": lambda model: torch.func.grad(lambda x: (x @ next(model.parameters())).sum())(torch.ones(96)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_functional_gradients_are_taken_where_all_is_in_memory(name: str, tmp_path: Path) -> None:
    """A transform keeps the parameter itself, whose block would leave before it runs backward."""
    plain, model, owner = both(tmp_path)
    with pytest.raises(RuntimeError, match=r"torch\.func\.grad, .*got blocks\.0\.\w+\.weight.*gathered\(\)"):
        TRANSFORMS[name](model)
    check_trains_on(model, plain)
    with owner.gathered():
        check_same(TRANSFORMS[name](model), TRANSFORMS[name](plain))
    check_trains_on(model, plain)


FORWARDS: dict[str, Callable[[nn.Module], Any]] = {
    "jvp": lambda model: torch.func.jvp(model, (batch(0),), (batch(1),)),
    "jacfwd": lambda model: torch.func.jacfwd(model)(batch(0)[:, :1]),
    "vmap": lambda model: torch.func.vmap(model)(batch(0)),
    "a parameter": lambda model: torch.func.vmap(lambda x: x @ next(model.parameters()))(torch.ones(2, 96)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # of forward mode's own
@pytest.mark.parametrize("name", FORWARDS)
def test_functional_forwards(name: str, tmp_path: Path) -> None:
    """What comes to memory inside of a transform is no wrapper of that transform, which is gone when it is over."""
    plain, model, _ = both(tmp_path)
    check_same(FORWARDS[name](model), FORWARDS[name](plain))
    check_trains_on(model, plain)


def test_linearize_says_what_to_do(tmp_path: Path) -> None:
    """It records operators, and would record what brings a parameter."""
    plain, model, _ = both(tmp_path)
    with pytest.raises(RuntimeError, match=r"offloaded: export copy\.deepcopy\(model\)"):
        torch.func.linearize(model, batch(0))
    check_trains_on(model, plain)


def test_writes_in_inference_mode_are_kept(tmp_path: Path) -> None:
    """A parameter that was brought in inference mode had no version counter: what was written to it was lost."""
    plain, model, owner = both(tmp_path)
    for module in (plain, model):
        with torch.inference_mode():
            module(batch(0))
            for p in module.parameters():
                p.mul_(0.5)
    owner.flush()
    check_same(values(model), values(plain))
    assert not any(p.is_inference() for p in model.parameters())
    check_trains_on(model, plain)


def test_addresses_tell_parameters_apart(tmp_path: Path) -> None:
    """Ties are found by comparing them: one parameter after the other in the same memory looked like one parameter."""
    _, model, owner = both(tmp_path)
    parameters = list(model.parameters())
    for address in (torch.Tensor.data_ptr, lambda p: p.untyped_storage().data_ptr()):
        assert len(set(map(address, parameters))) == len(parameters)
    for step in range(3):
        model(batch(step)).backward()
    owner.flush()
    assert all(r.storage is None for r in inside.working_set(owner))


def test_memory_is_not_shared_with_other_processes(tmp_path: Path) -> None:
    """They would write to memory that has left."""
    plain, model, _ = both(tmp_path)
    with pytest.raises(RuntimeError, match=r"share_memory\(\).*close\(\)"):
        model.share_memory()
    check_trains_on(model, plain)
