"""Beside `torch.profiler`: spans with the module's name, and our own trace on the same clock."""

from __future__ import annotations

import json
from pathlib import Path

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
    for what in ("offload", "reload", "wait"):
        assert any(event["name"].startswith(f"ssdtrain::{what} ") for event in spans), what
    assert any("float32[4096, 64] of 0.linear)" in event["name"] for event in spans)
    steps = [event for event in ours["traceEvents"] if event.get("cat") == "step"]
    begin, end = steps[0]["ts"], steps[-1]["ts"] + steps[-1]["dur"]
    inside = [event for event in spans if begin - 1000 <= event["ts"] <= end + 1000]
    assert len(inside) > len(spans) // 2


def test_without_a_profiler_there_is_no_span() -> None:
    class Unnamed:
        @property
        def name(self) -> str:
            raise AssertionError("asked for its name")

    assert span("reload", Unnamed()) is span("offload", Unnamed())
