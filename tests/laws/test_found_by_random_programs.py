"""What random programs found, each as the shortest program that fails."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_models import Lion, LooksAtAll
from state_tools import batch, check_same, model_of, values
from torch import nn
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import ssdtrain


def of_two_dtypes() -> list[nn.Parameter]:
    torch.manual_seed(0)
    shapes = ((12, 8), torch.bfloat16), ((8, 12), torch.float32)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape, dtype in shapes]


def train(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Any]:
    for step in range(3):
        torch.manual_seed(step)
        for p in parameters:
            p.grad = (torch.randn(p.shape) * 1e-3).to(p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def test_an_update_that_depends_on_the_dtype_of_the_first_parameter(tmp_path: Path) -> None:
    """PyTorch's Adafactor takes the eps of the first parameter's dtype for all of its group: updated apart, a float32
    parameter behind one of bfloat16 came out with other values."""
    plain, own = of_two_dtypes(), of_two_dtypes()
    expected = train(plain, torch.optim.Adafactor(plain))
    small: dict[str, Any] = {"min_nbytes": 0, "chunk_nbytes": 16}
    with pytest.raises(ValueError, match=r"Expected chunk_nbytes of at least .* Adafactor, which cannot update"):
        ssdtrain.offload_optimizer(torch.optim.Adafactor(own), tmp_path, small)
    offloaded = ssdtrain.offload_optimizer(torch.optim.Adafactor(own), tmp_path, small | {"chunk_nbytes": "1MiB"})
    check_same(train(own, offloaded), expected)
    alike = [p for p in of_two_dtypes() if p.dtype is torch.float32]
    ssdtrain.offload_optimizer(torch.optim.Adafactor(alike), tmp_path, small)


def test_groups_that_are_added_later_have_the_keys_that_they_would_have(tmp_path: Path) -> None:
    """The offload added `"differentiable"` to the defaults of an optimizer that has none, and so to its checkpoints."""
    plain, own = of_two_dtypes(), of_two_dtypes()
    expected, inner = Lion(plain[:1]), Lion(own[:1])
    optimizer = ssdtrain.offload_optimizer(inner, tmp_path)
    for each, parameters in ((expected, plain), (optimizer, own)):
        each.add_param_group({"params": parameters[1:]})
    assert optimizer.state_dict()["param_groups"] == expected.state_dict()["param_groups"]
    assert inner.defaults == expected.defaults


def test_a_group_that_cannot_be_paged_is_not_added(tmp_path: Path) -> None:
    """The error came when the group was there already: the next step raised it again, and the checkpoint had it."""
    own = of_two_dtypes()
    small = {"min_nbytes": 0, "chunk_nbytes": 400}  # all state of the first
    optimizer = ssdtrain.offload_optimizer(LooksAtAll(own[:1]), tmp_path, small)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match="Expected chunk_nbytes of at least"):
        optimizer.add_param_group({"params": own[1:], "lr": 0.1})
    check_same(optimizer.state_dict(), before)
    own[0].grad = torch.ones_like(own[0])
    optimizer.step()


def test_a_parameter_that_is_frozen_after_its_gradient_was_computed(tmp_path: Path) -> None:
    """A plain optimizer still updates it, and did so to the placeholder of an offloaded one: the update was lost."""
    plain, own = model_of("mlp"), model_of("mlp")
    ssdtrain.offload_parameters(own, tmp_path, {"min_nbytes": 0, "prefetch_nbytes": 0})
    for model in (plain, own):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        for step in range(3):
            model(batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            model.blocks[2].requires_grad_(False)  # type: ignore[index,union-attr]
    check_same(values(own), values(plain))


def test_an_offload_that_is_collected_in_the_middle_of_somebodys_step(tmp_path: Path) -> None:
    """Its hooks on optimizers went with it while PyTorch was going through them: `OrderedDict mutated during iteration`
    in the step of an optimizer that had nothing to do with it."""
    offloads = [ssdtrain.offload_parameters(model_of("mlp"), tmp_path) for _ in range(2)]
    own = of_two_dtypes()
    optimizer = torch.optim.AdamW(own)

    def collect(*_: Any) -> None:
        offloads.clear()
        gc.collect()

    handle = register_optimizer_step_pre_hook(collect)
    try:
        train(own, optimizer)
    finally:
        handle.remove()
    num_hooks = len(handle.hooks_dict_ref())
    ssdtrain.parameter_offload(ssdtrain.offload_parameters(model_of("mlp"), tmp_path)).close()
    assert len(handle.hooks_dict_ref()) <= num_hooks - 2  # what is gone is cleared away


def test_a_context_that_is_collected_in_the_middle_of_somebodys_step(tmp_path: Path) -> None:
    """The same for an offload of activations, whose hook says when a step is over."""
    held: list[Any] = [ssdtrain.offload_activations(tmp_path)]
    handle = register_optimizer_step_post_hook(lambda *_: (held.clear(), gc.collect())[1])
    other = ssdtrain.offload_activations(tmp_path)  # whose hook follows
    try:
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        torch.optim.SGD([p], lr=1.0).step()
    finally:
        handle.remove()
    assert torch.equal(p.detach(), torch.zeros(3))
    other.close()
    ssdtrain.offload_activations(tmp_path).close()
    assert not [hook for hook in _global_optimizer_post_hooks.values() if "_after_step" in repr(hook)]


def test_closing_in_the_middle_of_a_step_says_so(tmp_path: Path) -> None:
    """A backward that raises leaves some parameters updated: whoever closes and offloads anew would train on."""
    model = model_of("mlp")
    inner = torch.optim.AdamW(model.parameters())
    policy: dict[str, Any] = {"min_nbytes": 0, "chunk_nbytes": 1, "step_in_backward": True}
    optimizer = ssdtrain.offload_optimizer(inner, tmp_path, policy)
    first = next(model.parameters())

    def fail(_: torch.Tensor) -> None:
        raise ZeroDivisionError

    first.register_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(batch(0)).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"got one that was interrupted: step 1, .* load a checkpoint"):
        optimizer.close()
    optimizer.close()  # it is closed
    assert "step" not in vars(inner)  # the optimizer is the user's again
