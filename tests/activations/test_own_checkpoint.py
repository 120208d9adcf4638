"""`ssdtrain.checkpoint`: a drop-in for PyTorch's whose inputs are all offloaded, however they reach the function."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from conftest import Send, assert_same, same_bits, send, unhooked
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ssdtrain
from ssdtrain.activations.recompute import checkpoint as module

Offload = ssdtrain.ActivationOffload
Way = Callable[[Any, nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


class Masked(NamedTuple):
    scale: torch.Tensor
    name: str


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(32, 64), nn.Linear(64, 32), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.dropout(nn.functional.gelu(self.up(x))) * scale)


def keywords(checkpoint: Any, block: nn.Module, x: torch.Tensor, scale: torch.Tensor) -> Any:
    return checkpoint(block, x=x, scale=scale, use_reentrant=False)


def nested(checkpoint: Any, block: nn.Module, x: torch.Tensor, scale: torch.Tensor) -> Any:
    def run(values: dict[str, Any], *, masked: Masked) -> torch.Tensor:
        return block(values["x"][0], masked.scale)

    return checkpoint(run, {"x": [x, None]}, masked=Masked(scale, "m"), use_reentrant=False)


def closure(checkpoint: Any, block: nn.Module, x: torch.Tensor, scale: torch.Tensor) -> Any:
    return checkpoint(lambda: block(x, scale), use_reentrant=False)


def closure_in_a_closure(checkpoint: Any, block: nn.Module, x: torch.Tensor, scale: torch.Tensor) -> Any:
    def inner() -> torch.Tensor:
        return block(x, scale)

    def outer(again: bool = True) -> torch.Tensor:
        return outer(False) if again else inner()

    return checkpoint(outer, use_reentrant=False)


def defaults(checkpoint: Any, block: nn.Module, x: torch.Tensor, scale: torch.Tensor) -> Any:
    def run(x: torch.Tensor = x, *, scale: torch.Tensor = scale) -> torch.Tensor:
        return block(x, scale)

    return checkpoint(run, use_reentrant=False)


def partials(checkpoint: Any, block: nn.Module, x: torch.Tensor, scale: torch.Tensor) -> Any:
    return checkpoint(partial(partial(block, scale=scale), x), use_reentrant=False)


def bound(checkpoint: Any, block: nn.Module, x: torch.Tensor, scale: torch.Tensor) -> Any:
    return block(checkpoint(torch.sin(x).mul, torch.cos(x), use_reentrant=False), scale)


WAYS: list[Way] = [keywords, nested, closure, closure_in_a_closure, defaults, partials, bound]


def through(checkpoint: Any, way: Way, send: Send) -> list[Any]:
    torch.manual_seed(1)
    model = nn.ModuleList(Block() for _ in range(3))
    source = torch.randn(64, 32, requires_grad=True)
    x = source * 1
    for block in model:
        x = way(checkpoint, block, x, torch.sigmoid(x.detach().repeat(1, 2)) * 1)
    loss = x.square().sum()
    gc.collect()  # a function that closes over itself
    send()
    loss.backward()
    return [loss.detach(), source.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_it_is_equal_to_pytorchs_and_its_inputs_are_offloaded(offload: Offload, way: Way) -> None:
    assert_same(lambda send: through(ssdtrain.checkpoint, way, send), offload)
    torch.manual_seed(0)
    plain = through(torch_checkpoint, way, lambda: None)
    torch.manual_seed(0)
    assert same_bits(plain, through(ssdtrain.checkpoint, way, lambda: None))


def offloaded(offload: Offload, run: Callable[[Send], Any]) -> int:
    """Bytes that went to the drive."""
    with offload:
        run(send)
    return offload.stats.offloaded_nbytes


@pytest.mark.cpu_only
@pytest.mark.parametrize("way", WAYS[:-1], ids=lambda way: way.__name__)
def test_bytes_leave_that_pytorchs_checkpoint_keeps(make_offload: Any, way: Way) -> None:
    plain, own = (
        offloaded(make_offload(), lambda send, checkpoint=checkpoint: through(checkpoint, way, send))
        for checkpoint in (torch_checkpoint, ssdtrain.checkpoint)
    )
    assert own - plain == 3 * 64 * (32 + 64) * 4  # the inputs of three blocks


def test_a_variable_that_changes_later_is_what_it_was(offload: Offload) -> None:
    """Closures of a loop see the last value of its variables; the second run sees what the first one saw."""

    def run(send: Send) -> Any:
        torch.manual_seed(1)
        model, source = nn.ModuleList(Block() for _ in range(3)), torch.randn(64, 32, requires_grad=True)
        x, scale = source * 1, torch.ones(64)
        for block in model:
            x = ssdtrain.checkpoint(lambda block=block: block(x, scale))  # noqa: B023
            scale = scale * 2
        send()
        x.square().sum().backward()
        return [source.grad, *(p.grad for p in model.parameters())]

    def expected() -> Any:
        torch.manual_seed(1)
        model, source = nn.ModuleList(Block() for _ in range(3)), torch.randn(64, 32, requires_grad=True)
        x = source * 1
        for i, block in enumerate(model):
            x = block(x, torch.ones(64) * 2**i)
        x.square().sum().backward()
        return [source.grad, *(p.grad for p in model.parameters())]

    result = assert_same(run, offload)
    torch.manual_seed(0)
    assert same_bits(result, expected())


def test_what_the_function_changes_outside_is_changed_once(offload: Offload) -> None:
    seen: list[torch.Tensor] = []
    count, first = 0, torch.ones(8, 32)

    def body(x: torch.Tensor) -> torch.Tensor:
        nonlocal count, first
        count += 1
        x = torch.sin(x) * first
        first = x.detach()
        seen.append(first)
        return torch.cos(x) * seen[0]

    seen.append(torch.ones(8, 32))
    with offload:
        x = torch.randn(8, 32, requires_grad=True)
        ssdtrain.checkpoint(body, x).square().sum().backward()
    assert len(seen) == 2 and torch.equal(first, seen[1])
    assert count == 2, "a plain number is the user's own variable, as in PyTorch"


def selective(checkpoint: Any, send: Send, **options: Any) -> Any:
    def decide(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE

    torch.manual_seed(1)
    model, source = nn.ModuleList(Block() for _ in range(3)), torch.randn(64, 32, requires_grad=True)
    x, scale = source * 1, torch.ones(64)
    for block in model:
        contexts = partial(create_selective_checkpoint_contexts, decide, **options)
        x = checkpoint(block, x, scale, use_reentrant=False, context_fn=contexts)
    loss = x.square().sum()
    send()
    loss.backward()
    return [source.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("options", [{}, {"allow_cache_entry_mutation": True}], ids=["fixed", "mutable"])
def test_what_a_selective_checkpoint_keeps_is_offloaded(make_offload: Any, options: dict[str, Any]) -> None:
    """Unless it may be changed in place, which autograd would not allow."""
    result = assert_same(lambda send: selective(ssdtrain.checkpoint, send, **options), make_offload())
    torch.manual_seed(0)
    torchs = partial(torch_checkpoint, **unhooked())
    assert same_bits(result, selective(torchs, lambda: None, **options))
    plain, own = (
        offloaded(make_offload(), lambda send, checkpoint=checkpoint: selective(checkpoint, send, **options))
        for checkpoint in (torchs, ssdtrain.checkpoint)
    )
    kept = 3 * 64 * (64 + 32) * 4  # what the products of three blocks made
    assert own - plain == (0 if options else kept)


@pytest.mark.cpu_only
def test_a_kept_output_that_was_changed_raises(offload: Offload) -> None:
    def decide(context: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
        return op is torch.ops.aten.sin.default

    x = torch.randn(64, 32, requires_grad=True)
    with offload:
        y = ssdtrain.checkpoint(torch.sin, x, context_fn=partial(create_selective_checkpoint_contexts, decide))
        z = y.cos()
        with torch.no_grad():
            y.add_(1)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation|has been mutated"):
            z.sum().backward()


def test_a_kept_output_that_the_function_changed_raises(offload: Offload) -> None:
    """It has the wrong values by the time that it would be noted what it was like."""

    def change(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = x @ weight
        z = y.exp()
        y.mul_(2)
        return z * y

    x, weight = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    for context in (contextlib.nullcontext(), offload):
        with context:
            y = ssdtrain.checkpoint(change, x, weight, context_fn=contexts)
        with pytest.raises(RuntimeError, match=r"has been mutated|modified by an inplace operation"):
            y.sum().backward()


def test_pytorchs_own_switch_is_set_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """From PyTorch 2.14 on, which warns where it is not; not where what is kept may be changed in place."""
    asked: list[Any] = []

    def newer(function: Any, *args: Any, respect_saved_tensors_hooks: Any = None, **kwargs: Any) -> Any:
        asked.append(respect_saved_tensors_hooks)
        return torch_checkpoint(function, *args, **kwargs)

    monkeypatch.setattr(module.plain, "checkpoint", newer)
    x = torch.randn(4, requires_grad=True)
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.sin.default])
    for switch in (None, True, False):
        ssdtrain.checkpoint(torch.sin, x, context_fn=contexts, respect_saved_tensors_hooks=switch).sum().backward()
    changing = partial(contexts, allow_cache_entry_mutation=True)
    ssdtrain.checkpoint(torch.sin, x, context_fn=changing).sum().backward()
    ssdtrain.checkpoint(torch.sin, x).sum().backward()
    assert asked == [True, True, False, False, None]


def test_arguments_are_pytorchs(offload: Offload) -> None:
    x = torch.randn(8, 32, requires_grad=True)
    drop = nn.Dropout(0.5)
    with offload:
        options = {"determinism_check": "none", "debug": False, "early_stop": False, "preserve_rng_state": True}
        y = ssdtrain.checkpoint(lambda: drop(x) * x, **options)  # type: ignore[arg-type]
        y.sum().backward()
        with torch.no_grad():
            assert torch.equal(ssdtrain.checkpoint(torch.sin, x), torch.sin(x))
    with pytest.raises(ValueError, match="Expected use_reentrant=False"):
        ssdtrain.checkpoint(torch.sin, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="in the function"):
        ssdtrain.checkpoint(_raises, x)


def _raises(x: torch.Tensor) -> None:
    raise RuntimeError("in the function")


def test_parameters_are_the_same_objects(offload: Offload) -> None:
    weight, kinds = nn.Parameter(torch.randn(32, 32)), []

    def body(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        kinds.append(w is weight)
        return torch.sin(x @ w)

    with offload:
        ssdtrain.checkpoint(body, torch.randn(8, 32), w=weight).sum().backward()
    assert kinds == [True, True] and weight.grad is not None


@pytest.mark.cpu_only
def test_the_compiler_sees_pytorchs_checkpoint(offload: Offload) -> None:
    torch.manual_seed(1)
    block, x = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)), torch.randn(8, 32)
    ssdtrain.checkpoint(block, x).sum().backward()
    expected = [p.grad.clone() for p in block.parameters() if p.grad is not None]
    block.zero_grad()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x: torch.Tensor) -> torch.Tensor:
        return ssdtrain.checkpoint(block, x, use_reentrant=False).sum()  # type: ignore[no-any-return]

    with offload:
        step(x).backward()
    assert same_bits(expected, [p.grad for p in block.parameters()])


def test_it_is_copied_and_pickled_by_name() -> None:
    """Models hold it in a partial."""
    held = partial(ssdtrain.checkpoint, use_reentrant=False)
    for other in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        assert other.func is ssdtrain.checkpoint
