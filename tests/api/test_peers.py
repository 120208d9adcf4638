"""`OffloadActivations` in the places of TRL's and torchtune's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EAGER, assert_same, mlp, same_bits, train_once
from torch.autograd.graph import saved_tensors_hooks

from ssdtrain import ActivationOffload
from ssdtrain.api.peers import OffloadActivations

Make = Callable[..., OffloadActivations]


@pytest.fixture
def make(tmp_path: Path) -> Any:
    made: list[OffloadActivations] = []

    def new(**options: Any) -> OffloadActivations:
        policy = {name: value for name, value in EAGER.items() if name != "min_nbytes"}
        made.append(OffloadActivations(directory=tmp_path, policy=policy, **options))
        return made[-1]

    yield new
    for offload in made:
        offload.close()


def test_it_is_an_offload_whose_bytes_leave(make: Make) -> None:
    offload = make(min_offload_size=0)
    assert isinstance(offload, ActivationOffload) and offload.policy.mode == "all"
    assert_same(lambda send: train_once(mlp(), send), offload)


def test_small_tensors_stay(make: Make) -> None:
    assert make().policy.min_nbytes == 1024
    assert_same(lambda send: train_once(mlp(width=32), send), make(min_offload_size=1 << 20), is_offloaded=False)


def test_weights_are_told(make: Make) -> None:
    model, offload = mlp(), make(min_offload_size=0)
    offload.update_model_params(model)
    with offload:
        (model(torch.randn(4, 32)) * model[0].weight.detach()[0]).sum().backward()
    assert offload.stats.skipped["weight"].count > 0


def test_hooks_that_leave_tensors_alone_go_inside(make: Make) -> None:
    """Both peers keep the inputs of the head so."""
    offload, model = make(min_offload_size=0), mlp()
    with offload, saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        model(torch.randn(4, 32)).sum().backward()
    assert offload.stats.num_saved == 0


def test_switches_that_change_nothing_are_noted(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    offload = make(use_pin_memory=False, use_streams=False, max_fwd_stash_size=1)
    assert sum("is not used" in text for text in offload.stats.fallbacks) == 2
    assert not make(use_streams=None).stats.fallbacks
    with pytest.raises(ValueError, match="max_fwd_stash_size of at least 1, got 0"):
        make(max_fwd_stash_size=0)


def test_what_differs_between_the_two_is_given_by_name(make: Make) -> None:
    with pytest.raises(TypeError):
        OffloadActivations(True, True, 1024)  # type: ignore[misc]
    plain, ours = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    ours.data.copy_(plain.data)
    plain.sin().sum().backward()
    with make(min_offload_size=0):
        ours.sin().sum().backward()
    assert same_bits(plain.grad, ours.grad)
