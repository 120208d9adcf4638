"""Beside `torch.profiler`: spans with the module's name, and our own trace on the same clock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import ssdtrain
from ssdtrain.report import chrome_trace
from ssdtrain.run_log import read_run
from ssdtrain.tracing.spans import span


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x))


def test_both_traces_can_be_laid_over_each_other(tmp_path: Path) -> None:
    """What moved has its spans inside the step that the record has, by one clock."""
    model, record, exported = torch.nn.Sequential(*(Block() for _ in range(6))), tmp_path / "run", tmp_path / "trace"
    options = {"min_nbytes": 0, "mode": "all", "prefetch_nbytes": 0, "record": str(record)}
    offload = ssdtrain.offload_activations(tmp_path, options, model)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, offload:
        for _ in range(3):
            with record_function("the step"):
                model(torch.ones(4096, 64)).sum().backward()
    offload.close()
    profiler.export_chrome_trace(str(exported))
    theirs, ours = json.loads(exported.read_text()), chrome_trace(read_run(record))
    assert theirs["baseTimeNanoseconds"] == ours["baseTimeNanoseconds"]
    spans = [event for event in theirs["traceEvents"] if event.get("name", "").startswith("ssdtrain::")]
    for what in ("forward", "backward", "offload", "reload", "wait"):
        assert any(event["name"].startswith(f"ssdtrain::{what} ") for event in spans), what
    assert any("float32[4096, 64] of 0.linear)" in event["name"] for event in spans)
    steps = [event for event in ours["traceEvents"] if event.get("cat") == "step"]
    begin, end = steps[0]["ts"], steps[-1]["ts"] + steps[-1]["dur"]
    inside = [event for event in spans if begin - 1000 <= event["ts"] <= end + 1000]
    assert len(inside) > len(spans) // 2


def spans_of(profiler: profile, path: Path) -> list[tuple[str, str]]:
    """Name of every span of ours, and of the one of ours or autograd's that it is in; spans have to be nested."""
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
    events = [event for event in events if event["name"].startswith(("ssdtrain::", "autograd::"))]
    found, outer = [], [("", 0.0, float("inf"))]
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        begin, end = event["ts"], event["ts"] + event["dur"]
        while outer[-1][2] <= begin:
            outer.pop()
        assert end <= outer[-1][2] + 0.01, (event["name"], outer[-1])
        found.append((event["name"], outer[-1][0]))
        outer.append((event["name"], begin, end))
    return found


def offload_of(model: torch.nn.Module, folder: Path) -> ssdtrain.ActivationOffload:
    """Little staging: however slow the drive, most is there when backward begins, and has to be reloaded."""
    policy = {"min_nbytes": 0, "mode": "all", "prefetch_nbytes": 0, "staging_nbytes": "1MiB"}
    return ssdtrain.offload_activations(folder, policy, model)


def test_modules_have_spans_in_forward_and_in_backward(tmp_path: Path) -> None:
    """Those of forward lie in those of the modules around, those of backward in autograd's own, of one node each."""
    model = torch.nn.Sequential(*(Block() for _ in range(6)))
    plain = torch.autograd.grad(model(torch.ones(4096, 64)).sum(), [*model.parameters()])
    offload = offload_of(model, tmp_path)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, offload:
        grads = torch.autograd.grad(model(torch.ones(4096, 64)).sum(), [*model.parameters()])
    offload.close()
    assert all(map(torch.equal, grads, plain))
    found = spans_of(profiler, tmp_path / "trace")
    assert ("ssdtrain::forward Sequential", "") in found
    assert ("ssdtrain::forward 0", "ssdtrain::forward Sequential") in found
    assert ("ssdtrain::forward 1.linear", "ssdtrain::forward 1") in found
    for node, module in (("TanhBackward0", "1"), ("AddmmBackward0", "1.linear"), ("TanhBackward0", "0")):
        assert (f"ssdtrain::backward {module}", f"autograd::engine::evaluate_function: {node}") in found
    assert not [inside for inside in found if inside[1].endswith("SumBackward0")]
    waits = [outer for name, outer in found if name.startswith("ssdtrain::wait ") and "of 0.linear)" in name]
    assert waits
    assert set(waits) == {"ssdtrain::backward 0.linear"}


def test_what_a_checkpoint_runs_again_has_spans(tmp_path: Path) -> None:
    class Checkpointed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)

    model = Checkpointed()
    offload = offload_of(model, tmp_path)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, offload:
        model(torch.ones(512, 64, requires_grad=True)).sum().backward()
    offload.close()
    found = spans_of(profiler, tmp_path / "trace")
    assert ("ssdtrain::forward block", "ssdtrain::backward block") in found


def test_a_module_that_raises_leaves_no_span_open(tmp_path: Path) -> None:
    model = torch.nn.Sequential(Block(), Block())
    offload = offload_of(model, tmp_path)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with offload:
            with pytest.raises(RuntimeError):
                model(torch.ones(2, 3))
            model(torch.ones(4096, 64))
        with record_function("ssdtrain::after"):
            pass
    offload.close()
    found = spans_of(profiler, tmp_path / "trace")
    assert found.count(("ssdtrain::forward Sequential", "")) == 2 and ("ssdtrain::after", "") in found


def test_a_forward_without_a_profiler_leaves_no_span_behind(tmp_path: Path) -> None:
    model = torch.nn.Sequential(*(Block() for _ in range(6)))
    offload = offload_of(model, tmp_path)
    with offload:
        loss = model(torch.ones(4096, 64)).sum()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            loss.backward()
    offload.close()
    names = [name for name, _ in spans_of(profiler, tmp_path / "trace")]
    assert any(name.startswith("ssdtrain::reload") for name in names)
    assert not [name for name in names if name.startswith(("ssdtrain::forward", "ssdtrain::backward"))]


def test_updates_have_spans_with_the_parameter(tmp_path: Path) -> None:
    model = ssdtrain.offload_parameters(torch.nn.Sequential(Block(), Block()), tmp_path, {"min_nbytes": 0})
    state = ssdtrain.parameter_offload(model)
    plain = torch.optim.AdamW(model.parameters())
    optimizer = ssdtrain.offload_optimizer(plain, state, {"min_nbytes": 0, "chunk_nbytes": 1})
    model(torch.ones(8, 64)).sum().backward()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        optimizer.step()
    optimizer.close()
    found = spans_of(profiler, tmp_path / "trace")
    assert ("ssdtrain::update 1.linear.weight", "ssdtrain::optimizer_step") in found
    assert [name for name, _ in found if name.startswith("ssdtrain::write_state ") and "1.linear.weight" in name]
    state.close()


def test_without_a_profiler_there_is_no_span() -> None:
    class Unnamed:
        @property
        def name(self) -> str:
            raise AssertionError("asked for its name")

    assert span("reload", Unnamed()) is span("offload", Unnamed())
