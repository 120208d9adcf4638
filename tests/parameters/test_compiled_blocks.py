"""Offloaded parameters under `torch.compile`: one graph for each block, whose parameters come and go between graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_blocks import Block
from conftest import same_bits
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import ssdtrain

NUM_BLOCKS = 3
# Of warnings, the compiler's own are let pass.
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore", "error::pytest.PytestUnraisableExceptionWarning"),
]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def train(model: nn.Module) -> tuple[int, list[Any]]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step, optimizer = torch.compile(model, backend=counter), torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for i in range(3):
        torch.manual_seed(i)
        losses.append(step(torch.randn(8, 32)))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return counter.frame_count, [loss.detach() for loss in losses]


def test_one_graph_for_each_block(tmp_path: Path) -> None:
    _, plain = train(Model())
    model = ssdtrain.offload_parameters(Model(), tmp_path, {"min_nbytes": 0})
    num_graphs, ours = train(model)
    assert same_bits(plain, ours)
    assert num_graphs == NUM_BLOCKS
    assert not torch._dynamo.utils.counters["recompile_limit"]
    ssdtrain.parameter_offload(model).close()
