"""Contexts left in the wrong thread, twice, out of order or after `close()`: said, and nothing else changes."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from conftest import MakeOffload, assert_same, mlp, train_once
from state_tools import EAGER_STATE, MLP, WIDTH
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import ssdtrain
from ssdtrain.store.saved_tensors import innermost_hooks

pytestmark = pytest.mark.cpu_only

Offload = ssdtrain.ActivationOffload


class Counting(nn.Module):
    """A layer that counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.num_forwards = nn.Linear(8, 8), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_forwards += 1
        return torch.tanh(self.linear(x))


class Blocks(nn.Module):
    """Two of them, which `recompute` runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Counting() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.sum()

    def num_forwards_of_a_step(self) -> int:
        """How often a block's forward runs for one forward and backward."""
        before = self.blocks[0].num_forwards
        self(torch.randn(2, 8)).backward()
        return self.blocks[0].num_forwards - before


class Others(saved_tensors_hooks):
    """Hooks of somebody else, which count what they see."""

    def __init__(self) -> None:
        self.num_seen = 0
        super().__init__(self._see, lambda tensor: tensor)

    def _see(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_seen += 1
        return tensor.detach()


def in_thread(function: Callable[[], Any]) -> Any:
    """Result, or exception, of a function run in another thread."""
    results: list[Any] = []

    def body() -> None:
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=body, name="worker")
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def leave(context: Any) -> None:
    context.__exit__(None, None, None)


def save_something() -> None:
    torch.randn(64, requires_grad=True).exp().sum().backward()


# -- the offload context ---------------------------------------------------------------------------------------------


def test_left_in_another_thread(make_offload: MakeOffload) -> None:
    """`__exit__` in a worker used to raise `IndexError: pop from empty list`, after it had taken the recomputation off:
    the steps that followed in the thread that entered ran without it, and nobody knew."""
    model = Blocks()
    offload = make_offload(model, recompute="all")
    offload.__enter__()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="thread that entered, 'MainThread', got __exit__ in thread 'worker'"):
            in_thread(lambda: leave(offload))
    assert model.num_forwards_of_a_step() == 2
    assert offload.is_innermost
    leave(offload)
    assert innermost_hooks() is None and model.num_forwards_of_a_step() == 1
    with offload:
        assert model.num_forwards_of_a_step() == 2


def test_left_without_having_been_entered(make_offload: MakeOffload) -> None:
    model = Blocks()
    offload = make_offload(model, recompute="all")
    with pytest.raises(RuntimeError, match="second __exit__, or one without __enter__"):
        leave(offload)
    with offload:
        assert model.num_forwards_of_a_step() == 2
    with pytest.raises(RuntimeError, match="second __exit__"):
        leave(offload)
    with offload, offload:
        assert model.num_forwards_of_a_step() == 2
    assert model.num_forwards_of_a_step() == 1 and innermost_hooks() is None


def test_entered_in_two_threads_and_left_by_one_twice(make_offload: MakeOffload) -> None:
    """The second `__exit__` of one thread must not take the other's part away."""
    model = Blocks()
    offload = make_offload(model, recompute="all")

    def body() -> None:
        offload.__enter__()
        leave(offload)
        leave(offload)

    with offload:
        with pytest.raises(RuntimeError, match="'MainThread', got __exit__ in thread 'worker'"):
            in_thread(body)
        assert model.num_forwards_of_a_step() == 2


def test_left_before_hooks_that_were_entered_later(offload: Offload) -> None:
    """PyTorch takes off the innermost pair, whoever leaves: the other's hooks were gone, and ours saved on in a context
    that was over."""
    others = Others()
    offload.__enter__()
    others.__enter__()
    leave(offload)
    before = offload.stats.num_saved
    save_something()
    assert others.num_seen > 0 and offload.stats.num_saved == before
    others.__exit__()
    assert innermost_hooks() is None
    assert_same(lambda send: train_once(mlp(), send), offload)


def test_left_after_hooks_that_were_entered_before(make_offload: MakeOffload) -> None:
    """The other has left first and so has taken ours off: this is said, and no hooks are left on."""
    model = Blocks()
    offload = make_offload(model, recompute="all")
    others = Others()
    others.__enter__()
    offload.__enter__()
    others.__exit__()
    with pytest.raises(RuntimeError, match="taken off by a context that was entered earlier and left earlier"):
        leave(offload)
    assert innermost_hooks() is None and model.num_forwards_of_a_step() == 1
    assert_same(lambda send: train_once(mlp(), send), offload)


def test_two_offloads_left_in_the_order_they_were_entered(make_offload: MakeOffload) -> None:
    first, second = make_offload(), make_offload()
    first.__enter__()
    second.__enter__()
    leave(first)
    save_something()
    assert (first.stats.num_saved, second.is_innermost) == (0, True) and second.stats.num_saved > 0
    leave(second)
    assert innermost_hooks() is None


def test_a_generator_that_is_closed_in_another_thread(make_offload: MakeOffload) -> None:
    """A data pipeline written as a generator, `with offload:` inside, is often closed by whichever thread drops it."""
    model = Blocks()
    offload = make_offload(model, recompute="all")

    def steps() -> Iterator[int]:
        with offload:
            yield model.num_forwards_of_a_step()
            yield model.num_forwards_of_a_step()

    running = steps()
    assert next(running) == 2
    with pytest.raises(RuntimeError, match="got __exit__ in thread 'worker'"):
        in_thread(running.close)
    assert offload.is_innermost and model.num_forwards_of_a_step() == 2
    leave(offload)
    assert innermost_hooks() is None and list(steps()) == [2, 2]


def test_generators_that_are_left_in_turn(make_offload: MakeOffload) -> None:
    """Two suspended generators leave as they come to it; each takes off what is its own."""
    offloads = [make_offload(), make_offload()]

    def steps(offload: Offload) -> Iterator[None]:
        with offload:
            yield

    running = [steps(offload) for offload in offloads]
    for each in running:
        next(each)
    for each in running:
        assert list(each) == []
    assert innermost_hooks() is None


class Interrupted(nn.Module):
    """Its hooks cannot be installed."""

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt


@pytest.mark.parametrize("recompute", ["all", "never"])
def test_an_exception_while_entering(make_offload: MakeOffload, recompute: str) -> None:
    """Ctrl-C in the middle of `__enter__`: no `__exit__` follows, and nothing may stay on, not a hook of a module."""
    model = Blocks()
    model.blocks.append(Interrupted())
    offload = make_offload(model, recompute=recompute)
    with pytest.raises(KeyboardInterrupt), offload:
        raise AssertionError("entered")
    assert innermost_hooks() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    del model.blocks[2]
    with offload:
        assert model.num_forwards_of_a_step() == (2 if recompute == "all" else 1)
    assert model.num_forwards_of_a_step() == 1


def test_an_error_of_the_block_is_not_hidden(offload: Offload) -> None:
    with pytest.raises(ZeroDivisionError), offload:
        raise ZeroDivisionError
    assert innermost_hooks() is None


def test_use_after_close(offload: Offload) -> None:
    with offload:
        offload.close()
        save_something()
    offload.close()
    for use in (offload.__enter__, offload.keep_open, lambda: offload.on_step(lambda number, stats: None)):
        with pytest.raises(RuntimeError, match="open offload, got one after close"):
            use()
    assert innermost_hooks() is None and offload.stats.num_live_records == 0


# -- the others ------------------------------------------------------------------------------------------------------


def test_keep_resident_left_in_another_thread(offload: Offload) -> None:
    """PyTorch answers with an internal assertion and "please report a bug"."""
    resident = ssdtrain.keep_resident()
    with offload:
        resident.__enter__()
        with pytest.raises(RuntimeError, match="got __exit__ in thread 'worker'"):
            in_thread(lambda: resident.__exit__(None, None, None))
        save_something()
        assert offload.stats.num_saved == 0
        leave(resident)
        save_something()
        assert offload.stats.num_saved > 0
        with pytest.raises(RuntimeError, match="second __exit__"):
            leave(resident)
    assert innermost_hooks() is None


def test_keep_resident_decorates_and_is_entered_again(offload: Offload) -> None:
    resident = ssdtrain.keep_resident()
    decorated = resident(save_something)
    with offload:
        with resident, resident:
            decorated()
        assert offload.stats.num_saved == 0 and offload.is_innermost


def test_keep_resident_left_before_what_was_entered_later() -> None:
    resident, others = ssdtrain.keep_resident(), Others()
    resident.__enter__()
    others.__enter__()
    leave(resident)
    save_something()
    assert others.num_seen > 0
    others.__exit__()
    assert innermost_hooks() is None


def test_a_context_that_stays_on_when_a_forward_ends(tmp_path: Path) -> None:
    """Entered in the middle of an offloaded module's forward and left after it: the module's own hooks, which were no
    longer the innermost when it ended, stayed on for good."""
    model = ssdtrain.offload_parameters(MLP(), tmp_path, EAGER_STATE)
    others = Others()
    entering = model.blocks[1].register_forward_pre_hook(lambda module, args: others.__enter__())
    model(torch.randn(3, WIDTH)).backward()
    others.__exit__()
    assert innermost_hooks() is None
    entering.remove()
    model(torch.randn(3, WIDTH)).backward()
    assert innermost_hooks() is None
    ssdtrain.parameter_offload(model).close()


def test_accumulate_left_in_any_order(tmp_path: Path) -> None:
    """Two that overlap used to restore what the first had found: accumulating went on for good, and no parameter was
    updated in backward any more."""
    model = nn.Linear(4, 4)
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = ssdtrain.offload_optimizer(plain, tmp_path, EAGER_STATE | {"step_in_backward": True})
    first, second = optimizer.accumulate(), optimizer.accumulate()
    first.__enter__()
    second.__enter__()
    leave(first)
    before = model.weight.detach().clone()
    model(torch.ones(1, 4)).sum().backward()
    assert torch.equal(model.weight, before)
    leave(second)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)
    optimizer.close()


@pytest.mark.cpu_only
def test_what_is_dropped_is_gone_at_once(tmp_path: Path) -> None:
    """Engine, slabs and files go with the last reference: no cycle has them wait for the garbage collector."""
    gc.disable()
    try:
        offload = ssdtrain.offload_activations(tmp_path, mode="all", min_nbytes=0)
        with offload:
            nn.Linear(64, 64)(torch.randn(64, 64)).sum().backward()
        store = weakref.ref(inside.store(offload))
        del offload
        assert store() is None
    finally:
        gc.enable()


def test_an_optimizer_after_close(tmp_path: Path) -> None:
    """`clip_grad_norm_` used to note a factor that no step would apply, and `accumulate` to hold nothing back."""
    model = nn.Linear(4, 4)
    optimizer = ssdtrain.offload_optimizer(torch.optim.AdamW(model.parameters()), tmp_path, EAGER_STATE)
    optimizer.close()
    optimizer.close()
    uses: list[Callable[[], Any]] = [
        optimizer.step,
        optimizer.zero_grad,
        optimizer.state_dict,
        optimizer.flush,
        lambda: optimizer.clip_grad_norm_(1.0),
        lambda: optimizer.accumulate().__enter__(),
        lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match="open offload, got one after close"):
            use()
    assert len(optimizer.param_groups) == 1


def test_parameters_after_close(tmp_path: Path) -> None:
    """All are in memory then: `gathered` has nothing to do, and does not say that a name is none."""
    model = MLP()
    plain = [p.detach().clone() for p in model.parameters()]
    owner = ssdtrain.parameter_offload(ssdtrain.offload_parameters(model, tmp_path, EAGER_STATE))
    with owner.gathered("blocks.0.*"):
        owner.close()
    owner.close()
    with owner.gathered("blocks.*"):
        assert all(map(torch.equal, plain, model.parameters()))
    with pytest.raises(RuntimeError, match="open offload, got one after close"):
        owner.flush()


def test_gathered_left_in_another_thread(tmp_path: Path) -> None:
    """It belongs to no thread: what it holds is let go wherever it is left."""
    model = MLP()
    owner = ssdtrain.parameter_offload(ssdtrain.offload_parameters(model, tmp_path, EAGER_STATE))
    gathered = owner.gathered()
    gathered.__enter__()
    in_thread(lambda: leave(gathered))
    with torch._C.DisableTorchFunctionSubclass():  # else they come for whoever asks
        assert all(p.isnan().all() for p in model.blocks[0].up.parameters(recurse=False) if p.dim() > 1)
    owner.close()
