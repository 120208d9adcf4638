"""Where nothing is offloaded, it is said once, after the first step or the run: what there was, why, what to do."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EAGER
from state_tools import EAGER_STATE, MLP, WIDTH
from torch import nn

import ssdtrain
from ssdtrain.policy import ActivationPolicy
from ssdtrain.state_stats import StateCounters
from ssdtrain.stats import Counters
from ssdtrain.verdict import Training, on_activations, on_optimizer, on_parameters

LIMIT_SECONDS = 120

Told = Callable[[], list[str]]
Make = Callable[..., ssdtrain.ActivationOffload]


class Job:
    """A model, an optimizer, and steps of both."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def forward(self) -> torch.Tensor:
        loss: torch.Tensor = self.model(torch.randn(32, 64)).square().mean()
        return loss

    def step(self) -> None:
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.fixture
def job() -> Job:
    return Job()


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Told:
    """What was said on the logger since it was last asked."""
    caplog.set_level(logging.INFO, logger="ssdtrain")

    def texts() -> list[str]:
        found = [record.getMessage() for record in caplog.records if record.name == "ssdtrain"]
        caplog.clear()
        return found

    return texts


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[ssdtrain.ActivationOffload] = []

    def offload(**policy: Any) -> ssdtrain.ActivationOffload:
        made.append(ssdtrain.offload_activations(tmp_path, EAGER | policy))
        return made[-1]

    yield offload
    for each in made:
        each.close()


def check_told(told: Told, offload: ssdtrain.ActivationOffload, *parts: str) -> str:
    """One sentence was said, and is among the fallbacks, with all of these parts."""
    (text,) = told()
    assert all(part in text for part in parts), text
    assert text in offload.stats.fallbacks
    return text


def in_thread(function: Callable[[], Any]) -> None:
    errors: list[BaseException] = []

    def body() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body, name="trainer")
    thread.start()
    thread.join()
    assert not errors, errors


def run_script(text: str, *arguments: str) -> str:
    """What a script and its children write to stderr. A fork of a process that computes in several threads of OpenMP's
    waits for them for ever, as they are not in it: here all compute in one."""
    command, own = [sys.executable, "-c", text, *arguments], {"OMP_NUM_THREADS": "1"}
    script = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | own, start_new_session=True)
    try:
        said = script.communicate(timeout=LIMIT_SECONDS)[1]
    except subprocess.TimeoutExpired:
        os.killpg(script.pid, signal.SIGKILL)
        said = script.communicate()[1]
        pytest.fail(f"Expected the script and its children to end within {LIMIT_SECONDS} s, got this far:\n{said}")
    assert script.returncode == 0, said
    return said


# -- nothing to be said ----------------------------------------------------------------------------------------------


def test_an_offload_that_works_says_nothing(make: Make, job: Job, told: Told) -> None:
    with make() as offload:
        for _ in range(3):
            job.step()
    offload.close()
    assert offload.stats.offloaded_nbytes > 0
    assert told() == []


def test_evaluation_is_no_step(make: Make, job: Job, told: Told) -> None:
    """Nothing is saved without gradients, and nobody wants to hear of that."""
    offload = make()
    with offload, torch.no_grad():
        job.forward()
    with offload:
        pass
    with torch.no_grad(), offload:
        job.forward()
    assert told() == []
    with offload:
        job.step()
    offload.close()
    assert told() == []


def test_a_step_before_the_first_forward(make: Make, job: Job, told: Told) -> None:
    """Frameworks let an optimizer step once with gradients of zero, to have it make its state."""
    with make() as offload:
        for parameter in job.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        job.optimizer.step()
        job.step()
        job.step()
    offload.close()
    assert told() == []


def test_an_offload_that_is_made_and_closed(make: Make, told: Told) -> None:
    """As frameworks do that cannot start for another reason."""
    make().close()
    assert told() == []


def test_training_before_the_context_is_entered(make: Make, job: Job, told: Told) -> None:
    offload = make()
    job.step()
    with offload:
        job.step()
    offload.close()
    assert told() == []


def test_what_a_budget_keeps_is_what_was_asked() -> None:
    counters = Counters()
    counters.num_saved = 100
    counters.keep("planned to stay", 1 << 30)
    training = Training(is_over=True, num_entered=1, num_steps=9)
    assert on_activations(counters, ActivationPolicy(memory_budget="2GiB"), training) is None
    text = on_activations(counters, ActivationPolicy(), training)
    assert text is not None and "100 x planned" not in text and "1 x planned to stay (1.00 GiB)" in text
    assert "see offload.plan" in text and "in the whole run" in text


# -- causes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["one context", "a context for each step", "a context for each forward"])
def test_everything_is_small(make: Make, job: Job, told: Told, how: str) -> None:
    """Said when the first step is over, and once, however often the context is entered."""
    offload = make(min_nbytes=1 << 20)
    for i in range(3):
        if how == "a context for each forward":
            with offload:
                loss = job.forward()
            assert i or told() == [], "the step is not over"
            loss.backward()
            job.optimizer.step()
            del loss
        else:
            with offload:
                job.step()
        if i == 0:
            check_told(
                told,
                offload,
                "nothing was offloaded in the first step: autograd saved",
                "0 B left memory",
                "smaller than min_nbytes (",
                "is little to gain",
                "policy={'min_nbytes': 4096}",
            )
    offload.close()
    gc.collect()
    assert told() == []


def test_the_minimum_that_is_advised_helps(make: Make, job: Job, told: Told) -> None:
    with make(min_nbytes=4096) as offload:
        job.step()
    assert offload.stats.offloaded_nbytes > 0 and told() == []


def test_without_an_optimizer_the_step_is_over_when_its_graph_is_used(make: Make, job: Job, told: Told) -> None:
    with make(min_nbytes=1 << 20) as offload:
        job.forward().backward()
        assert told() == []
    check_told(told, offload, "smaller than min_nbytes")


def identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@pytest.mark.parametrize("others", ["identity", "save_on_cpu", "another offload", "keep_resident"])
def test_hooks_of_others_are_the_innermost(make: Make, job: Job, told: Told, others: str, tmp_path: Path) -> None:
    """Autograd asks the innermost pair alone: ours see nothing, not even that there is a step."""
    contexts: dict[str, tuple[Callable[[], Any], str]] = {
        "identity": (lambda: torch.autograd.graph.saved_tensors_hooks(identity, identity), "test_undone.identity"),
        "save_on_cpu": (torch.autograd.graph.save_on_cpu, "torch.autograd.graph.save_on_cpu"),
        "another offload": (lambda: ssdtrain.offload_activations(tmp_path, EAGER), "ActivationOffload._pack"),
        "keep_resident": (ssdtrain.keep_resident, "keep_resident"),
    }
    make_context, name = contexts[others]
    context = make_context()
    with make() as offload:
        for _ in range(3):
            with context:
                job.forward().backward()
            job.optimizer.step()
    check_told(told, offload, "in the first step", "innermost hooks alone", name, "enter this context inside")
    offload.close()
    assert told() == [] and not torch.nn.modules.module._has_any_global_hook()


def test_hooks_of_others_in_a_run_of_one_step(make: Make, job: Job, told: Told) -> None:
    """There is no second forward that shows whose they are; while they are on, the step itself does."""
    with make() as offload, torch.autograd.graph.save_on_cpu():
        job.step()
    offload.close()
    check_told(told, offload, "in the whole run", "those of torch.autograd.graph.save_on_cpu")


def test_forward_runs_in_another_thread(make: Make, job: Job, told: Told) -> None:
    with make() as offload:
        for _ in range(2):
            in_thread(job.step)
    check_told(
        told, offload, "forward runs in thread 'trainer' and the context was entered in 'MainThread'", "enter it in the"
    )


def test_forward_runs_in_another_thread_and_the_optimizer_here(make: Make, job: Job, told: Told) -> None:
    with make() as offload:
        for _ in range(2):
            in_thread(lambda: job.forward().backward())
            job.optimizer.step()
    check_told(told, offload, "forward runs in thread 'trainer' and the context was entered in 'MainThread'")


def test_forward_runs_outside(make: Make, job: Job, told: Told) -> None:
    offload = make()
    with offload, torch.no_grad():
        job.forward()
    for _ in range(3):
        job.step()
    offload.close()
    check_told(told, offload, "in the whole run", "took 3 steps", "forward ran outside the context")


def test_never_entered(make: Make, job: Job, told: Told) -> None:
    offload = make()
    job.step()
    offload.close()
    check_told(
        told, offload, "made and never entered, while optimizers took 1 steps", "write `with offload_activations"
    )


def test_never_entered_and_dropped(tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one writes who takes it for a switch."""
    monkeypatch.delattr(sys, "last_value", raising=False)  # of a test that failed before
    ssdtrain.offload_activations(tmp_path)
    (text,) = told()
    assert "made and never entered: nothing was saved in it" in text


def test_saved_during_backward(make: Make, job: Job, told: Told) -> None:
    """A reentrant checkpoint runs forward without gradients, and again in backward, where nothing may leave."""

    layers = nn.Sequential(nn.Linear(4, 512), nn.GELU(), nn.Linear(512, 4))
    with make(min_nbytes=16384) as offload:
        x = torch.randn(64, 4, requires_grad=True)
        torch.utils.checkpoint.checkpoint(layers, x, use_reentrant=True).sum().backward()
        job.optimizer.step()
    check_told(told, offload, "saved during backward", "use_reentrant=False")


def test_host_memory_without_a_directory(job: Job, told: Told) -> None:
    with ssdtrain.offload_activations(None, EAGER | {"host_nbytes": "1MiB"}) as offload:
        job.step()
    check_told(told, offload, "in host memory already", "pass a directory")
    offload.close()


class Opaque(torch.Tensor):
    """A subclass that does not say what it is made of."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C._DisableTorchDispatch():
            return func(*args, **(kwargs or {}))


class Double(torch.autograd.Function):
    """Saves one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(torch.Tensor._make_subclass(Opaque, x * 2))
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        assert ctx.saved_tensors
        return grad * 2


def test_tensor_subclasses(make: Make, told: Told) -> None:
    with make() as offload:
        Double.apply(torch.randn(64, 64, requires_grad=True)).sum().backward()
    check_told(told, offload, "x tensor subclass (16.0 KiB)", "__tensor_flatten__")


def test_all_are_weights(make: Make, told: Told) -> None:
    """A linear layer whose input needs no gradient, and which is called with a weight, saves nothing else."""
    weight = nn.Parameter(torch.randn(64, 64))
    with make() as offload:
        weight.square().sum().backward()
        torch.optim.SGD([weight], lr=0.1).step()
    check_told(told, offload, "all of which are weights", "nothing to gain, leave ssdtrain out")


def test_backward_wants_it_at_once(make: Make, told: Told) -> None:
    with make() as offload:
        torch.randn(64, 64, requires_grad=True).exp().sum().backward()
    check_told(told, offload, "autograd saved 1 tensors", "what is saved last is needed first")


def test_next_to_nothing(make: Make, told: Told) -> None:
    """One small tensor of many large ones is not what anybody wanted."""
    with make(min_nbytes=0) as offload:
        leaf, small = torch.randn(4096, 512, requires_grad=True), torch.randn(2048, requires_grad=True)
        loss = small.exp().exp().exp().exp().sum() + Double.apply(leaf).sum()
        loss.backward()
    check_told(told, offload, "next to nothing (", "of 8.0", "was offloaded", "tensor subclass")


def test_forked_children_and_the_end_of_a_process(tmp_path: Path) -> None:
    """A child opens another engine than its parent's, under inherited hooks or entered there. What was never entered is
    said when the process ends, by the one that made it, and not after an error, which says enough."""
    script = """
import os, sys, torch, ssdtrain
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64), torch.nn.GELU())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
kept = []
def make():
    kept.append(ssdtrain.offload_activations(sys.argv[1], {"min_nbytes": 0, "mode": "all", "staging_nbytes": 65536}))
    return kept[-1]
def step():
    model(torch.randn(32, 64)).square().mean().backward()
    optimizer.step()
def in_child(body):
    print("-- child", file=sys.stderr, flush=True)
    if pid := os.fork():
        os.waitpid(pid, 0)
    else:
        body()
        sys.exit(0)
def entered():
    with offload:
        step()
def failed():
    make()
    raise ZeroDivisionError
offload = make()
with offload:
    step()
    in_child(lambda: [step() for _ in range(3)])
    step()
in_child(entered)
in_child(make)
in_child(failed)
make()
print("end", file=sys.stderr, flush=True)
"""
    parts = run_script(script, str(tmp_path)).split("-- child\n")
    first, training, entered, made, failed = parts
    failed, end = failed.split("end\n")
    assert first == "" and entered == "" and training == ""
    assert made.count("\n") == 1 and "made and never entered" in made
    assert "ZeroDivisionError" in failed and "never entered" not in failed
    assert end.count("\n") == 1 and "made and never entered" in end


def test_closed_inside_its_context(make: Make, job: Job, told: Told) -> None:
    with make() as offload:
        job.step()
        offload.close()
        job.step()
        job.step()
    check_told(told, offload, "closed inside its context", "from here on")


def test_a_policy_that_is_off(make: Make, job: Job, caplog: pytest.LogCaptureFixture, told: Told) -> None:
    """Asked for, hence no warning; a report that says so."""
    offload = make(enabled=False)
    for _ in range(2):
        with offload:
            job.step()
    assert [record.levelno for record in caplog.records if record.name == "ssdtrain"] == [logging.INFO]
    check_told(told, offload, "enabled=False")


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("drive behind", "mode='all' waits"),
        ("drive stuck", "another directory"),
        ("no spill space", "disk_nbytes"),
        ("host tier full", "host_nbytes"),
        ("outlives its graph", "hold them no longer"),
        ("CUDA graph capture", "without capturing"),
        ("device meta", "CPU and on CUDA"),
        ("something new", "print(stats)"),
    ],
)
def test_every_reason_has_a_remedy(reason: str, remedy: str) -> None:
    counters = Counters()
    counters.num_saved = 10
    for _ in range(9):
        counters.skip(reason, 1 << 20)
    counters.skip("weight", 1 << 40)
    text = on_activations(counters, ActivationPolicy(), Training(is_over=False, num_entered=1, num_steps=1))
    assert text is not None and f"9 x {reason} (9.0 MiB); " in text and remedy in text


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_an_optimizer_that_is_compiled(make: Make, job: Job, told: Told) -> None:
    """What is traced must not meet what looks at steps."""
    step = torch.compile(job.optimizer.step, backend="eager")
    with make() as offload:
        for _ in range(2):
            job.forward().backward()
            step()
    assert offload.stats.offloaded_nbytes > 0 and told() == []


# -- state -----------------------------------------------------------------------------------------------------------


def test_parameters_that_are_small(tmp_path: Path, told: Told) -> None:
    model = ssdtrain.offload_parameters(MLP(), tmp_path, {"min_nbytes": "1MiB"})
    (text,) = told()
    assert "nothing of the parameters was offloaded: in memory stay 16 x smaller than min_nbytes" in text
    assert "policy={'min_nbytes': 4096}" in text
    owner = ssdtrain.parameter_offload(model)
    assert text in owner.stats.fallbacks
    owner.close()
    model = ssdtrain.offload_parameters(MLP(), tmp_path, {"min_nbytes": 4096})
    assert told() == []
    ssdtrain.parameter_offload(model).close()


def test_parameters_outside_the_blocks(tmp_path: Path, told: Told) -> None:
    model = MLP()
    model.head = nn.Linear(256, 256)
    ssdtrain.offload_parameters(model, tmp_path, EAGER_STATE, blocks=["blocks.0"])
    assert told() == [], "more than a hundredth"
    ssdtrain.parameter_offload(model).close()
    model.head, model.small = nn.Linear(2048, 2048), nn.Linear(WIDTH, WIDTH)
    ssdtrain.offload_parameters(model, tmp_path, EAGER_STATE, blocks=["small"])
    (text,) = told()
    assert "next to nothing (" in text and "x outside the blocks (" in text and "name more modules" in text
    ssdtrain.parameter_offload(model).close()


@pytest.mark.parametrize("mode", [{}, {"step_in_backward": True}, {"offload_gradients": True}], ids=str)
def test_an_optimizer_without_state(tmp_path: Path, told: Told, mode: dict[str, bool]) -> None:
    model = MLP()
    optimizer = ssdtrain.offload_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), tmp_path, EAGER_STATE | mode)
    optimizer.step()
    assert told() == [], "no gradient, no step"
    for _ in range(2):
        model(torch.randn(3, WIDTH)).backward()
        optimizer.step()
        optimizer.zero_grad()
    (text,) = told()
    assert "nothing of the optimizer state was offloaded in the first step: SGD keeps none" in text
    assert text in optimizer.stats.fallbacks
    optimizer.close()


def test_optimizer_state_that_is_small(tmp_path: Path, told: Told) -> None:
    model = MLP()
    optimizer = ssdtrain.offload_optimizer(torch.optim.AdamW(model.parameters()), tmp_path, {"min_nbytes": "1MiB"})
    for _ in range(2):
        model(torch.randn(3, WIDTH)).backward()
        optimizer.step()
    (text,) = told()
    assert "in memory stay 48 x smaller than min_nbytes" in text and "policy={'min_nbytes': 2048}" in text
    optimizer.close()


def test_optimizer_state_that_leaves(tmp_path: Path, told: Told) -> None:
    model = MLP()
    optimizer = ssdtrain.offload_optimizer(torch.optim.AdamW(model.parameters()), tmp_path, EAGER_STATE)
    model(torch.randn(3, WIDTH)).backward()
    optimizer.step()
    optimizer.close()
    assert told() == []


def test_state_of_another_kind() -> None:
    text = on_optimizer(StateCounters("optimizer state"), "Adam8bit", {"tensor subclass": (4, 1 << 20)})
    assert text is not None and "4 x tensor subclass (1.0 MiB); its class does not say what it is made of" in text
    text = on_parameters(StateCounters("parameters"))
    assert text is not None and "the module has none" in text
