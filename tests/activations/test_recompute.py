"""Blocks that run a second time in backward: same numbers, less memory, chosen by budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import inside
import pytest
import torch
from conftest import MakeOffload, grads_of, same_bits, send
from torch import nn

import ssdtrain
from ssdtrain.model_blocks import find_blocks
from ssdtrain.planner import Goal, Lifetime, Machine, Step, Tier, choose, make_plan
from ssdtrain.planner.recompute import recomputed
from ssdtrain.tools.demo.model import GPT, GPTConfig

pytestmark = pytest.mark.cpu_only  # wraps modules: nothing in it depends on the kind of device

MIB = 1 << 20


class Block(nn.Module):
    """Keyword and nested tensor arguments, dropout, and a result that is a tuple."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.5), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor, *, scales: tuple[torch.Tensor, torch.Tensor], flag: bool = True) -> Any:
        return x + self.layers(x * scales[0]) * scales[1], flag


class Model(nn.Module):
    def __init__(self, num: int = 4, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block() for _ in range(num)])
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x, _ = block(x, scales=(self.scale * 2, self.scale + 1))
        return x.square().mean()


class Statistics(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(32)

    def forward(self, x: torch.Tensor, **arguments: Any) -> Any:
        x, flag = super().forward(x, **arguments)
        return self.norm(x), flag


class Counting(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor, **arguments: Any) -> Any:
        self.calls += 1
        return super().forward(x, **arguments)


def train(model: nn.Module, *, steps: int = 3, context: Any = None) -> list[Any]:
    results = []
    for number in range(steps):
        torch.manual_seed(number)
        x = torch.randn(64, 32)
        model.zero_grad()
        if context is None:
            model(x).backward()
        else:
            with context:
                model(x).backward()
        results.append([*[g.clone() for g in grads_of(model) if g is not None], *model.buffers()])
    return results


def make(block: Callable[[], nn.Module] = Block) -> Model:
    torch.manual_seed(0)
    return Model(block=block)


@pytest.mark.parametrize("mode", ["auto", "all"])
def test_all_blocks_run_twice_and_results_are_equal(make_offload: MakeOffload, mode: str) -> None:
    expected = train(make())
    model = make()
    num_calls: list[int] = []
    model.blocks[0].layers.register_forward_hook(lambda *_: num_calls.append(1))
    offload = make_offload(model, recompute="all", mode=mode)
    assert same_bits(train(model, context=offload), expected)
    assert len(num_calls) == 6
    assert "forward" not in model.blocks[0].__dict__, "outside the context the model is as it was"


def test_inputs_of_blocks_are_offloaded_and_nothing_else(make_offload: MakeOffload) -> None:
    """Positional, keyword and nested: the checkpoint's closure must not hold them."""
    model = make()
    offload = make_offload(model, recompute="all")
    with offload:
        loss = model(torch.randn(64, 32))
        alive = offload.stats.num_live_records
        kinds = {record.where for records in inside.index(offload)._records.values() for record in records}
        send()
        loss.backward()
    assert alive == 4 + 2 * 4 + 1  # x and two scales for every block, and what `square` saved
    assert kinds >= {" of blocks.0", " of blocks.3"}
    assert offload.stats.read_nbytes > 0


def test_a_block_with_running_statistics_runs_once(make_offload: MakeOffload) -> None:
    expected = train(make(Statistics))
    model = make(Statistics)
    offload = make_offload(model, recompute="all")
    assert same_bits(train(model, context=offload), expected)
    assert any("blocks.0" in text and "buffers" in text for text in offload.stats.fallbacks)


def test_a_block_that_changes_a_buffer_runs_once(make_offload: MakeOffload) -> None:
    expected = train(make(Counting))
    model = make(Counting)
    offload = make_offload(model, recompute="all")
    assert same_bits(train(model, context=offload), expected)
    assert any("blocks.0" in text and "buffers" in text for text in offload.stats.fallbacks)


def test_arguments_that_may_change_are_not_used_twice(make_offload: MakeOffload) -> None:
    class Cached(Block):
        def forward(self, x: torch.Tensor, *, cache: Any = None, **arguments: Any) -> Any:
            cache.seen.append(1)
            return super().forward(x, **arguments)

    class Cache:
        def __init__(self) -> None:
            self.seen: list[int] = []

    class Caller(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            cache = Cache()
            for block in self.blocks:
                x, _ = block(x, scales=(self.scale, self.scale), cache=cache)
            self.cache = cache
            return x.sum()

    torch.manual_seed(0)
    model = Caller(block=Cached)
    offload = make_offload(model, recompute="all")
    train(model, steps=1, context=offload)
    assert len(model.cache.seen) == 4
    assert any("Cache" in text for text in offload.stats.fallbacks)


def test_auto_recomputes_what_the_budget_needs(make_offload: MakeOffload, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that this drive cannot meet in time, by far: blocks are recomputed, and results stay equal."""

    def gpt() -> tuple[nn.Module, Callable[[], list[torch.Tensor]]]:
        torch.manual_seed(0)
        model = GPT(GPTConfig(layers=4, width=64, heads=4, sequence=64))
        tokens = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(1))

        def step() -> list[torch.Tensor]:
            model.zero_grad()
            loss = model(tokens, tokens)
            loss.backward()
            return [loss.detach(), *[g.clone() for g in grads_of(model) if g is not None]]

        return model, step

    drive = Machine(Tier(2e6, 2e6), staging_nbytes=MIB, prefetch_nbytes=MIB)
    monkeypatch.setattr("ssdtrain.scheduling.replanner.Replanner._machine_now", lambda _, **kind: drive)
    _, step = gpt()
    expected = [step() for _ in range(8)]
    model, step = gpt()
    policy = {"mode": "auto", "min_nbytes": "4KiB", "staging_nbytes": "1MiB", "memory_budget": "3MiB"}
    with make_offload(model, recompute="auto", **policy) as offload:
        actual = [step() for _ in range(8)]
        plan = offload.plan
    assert same_bits(actual, expected)
    assert plan is not None and plan.recomputed and "recomputed" in str(plan) and "recomputed" in offload.stats.plan


@pytest.mark.parametrize(
    "policy, match",
    [({"recompute": "auto"}, "memory_budget"), ({"recompute": "sometimes"}, "never"), ({"recompute": "all"}, "model")],
)
def test_bad_policies(tmp_path: Any, policy: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ssdtrain.offload_activations(tmp_path, policy)


def test_a_model_without_blocks_says_so(make_offload: MakeOffload) -> None:
    offload = make_offload(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), recompute="all")
    assert any("no repeated blocks" in text for text in offload.stats.fallbacks)


# -- blocks ------------------------------------------------------------------------------------------------------------


def test_blocks_are_found() -> None:
    assert list(find_blocks(GPT(GPTConfig(layers=3, width=64, heads=4, sequence=64)))) == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
    ]
    shape = {"num_encoder_layers": 2, "num_decoder_layers": 3, "dim_feedforward": 16, "batch_first": True}
    transformer = nn.Transformer(16, 2, **shape)
    assert list(find_blocks(transformer)) == [
        *[f"encoder.layers.{i}" for i in range(2)],
        *[f"decoder.layers.{i}" for i in range(3)],
    ]
    assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == {}


def test_a_shared_block_counts_once() -> None:
    block = Block()
    assert list(find_blocks(nn.Sequential(block, block, Block()))) == ["0", "2"]


# -- the choice --------------------------------------------------------------------------------------------------------


def tower(num: int = 8, per_block: int = 4) -> Step:
    """Every block saves 4 x 10 MiB in 0.1 s; backward takes twice as long."""
    forward = num * 0.1
    records = []
    for i in range(num):
        for k in range(per_block):
            saved = 0.1 * i + 0.025 * k
            needed = forward + 2 * (forward - saved - 0.025)
            records.append(Lifetime(10 * MIB, saved, needed, needed + 0.01, module=f"h.{i}.mlp"))
    return Step(tuple(records), 3 * forward)


BLOCKS = [f"h.{i}" for i in range(8)]
SLOW = Machine(Tier(20e6, 20e6), staging_nbytes=16 * MIB, prefetch_nbytes=32 * MIB)


def test_nothing_is_recomputed_where_the_drive_suffices() -> None:
    chosen, plan = choose(tower(), BLOCKS, Machine(Tier(4e9, 4e9)), Goal(memory_budget=100 * MIB))
    assert not chosen and plan.peak_nbytes <= 100 * MIB and not plan.recomputed


def test_without_a_budget_nothing_is_recomputed() -> None:
    assert not choose(tower(), BLOCKS, SLOW, Goal())[0]


@pytest.mark.parametrize("budget", [100, 150, 200, 250])
def test_a_budget_is_met_for_less_than_waiting_costs(budget: int) -> None:
    goal = Goal(memory_budget=budget * MIB)
    waiting = make_plan(tower(), SLOW, goal)
    chosen, plan = choose(tower(), BLOCKS, SLOW, goal)
    assert chosen and plan.peak_nbytes <= goal.memory_budget
    assert plan.step_seconds < waiting.step_seconds
    assert plan.compute_seconds == pytest.approx(2.4 + 0.1 * len(chosen), rel=0.05)


def test_less_memory_costs_more_time() -> None:
    """The curve of recompute, offload and keep: monotone in the budget."""
    seconds = [choose(tower(), BLOCKS, SLOW, Goal(memory_budget=b * MIB))[1].step_seconds for b in (90, 150, 250, 330)]
    assert seconds == sorted(seconds, reverse=True) and seconds[-1] == pytest.approx(2.4)


def test_what_was_chosen_stays_unless_another_choice_is_clearly_better() -> None:
    goal = Goal(memory_budget=150 * MIB)
    chosen, _ = choose(tower(), BLOCKS, SLOW, goal)
    again, _ = choose(tower(), BLOCKS, replace(SLOW, disk=Tier(20.1e6, 20.1e6)), goal, chosen)
    assert again == chosen


def test_small_tensors_of_a_block_go_when_it_is_recomputed() -> None:
    """No record stands for them and nothing moves them, so that a budget may be met by recomputation alone."""
    levels = tuple((0.1 * i + 0.025 * k, (4 * i + k) * 10 * MIB) for i in range(8) for k in range(4))
    step = replace(tower(), other=levels)
    fast, goal = Machine(Tier(100e9, 100e9)), Goal(memory_budget=160 * MIB)
    assert make_plan(step, fast, goal).peak_nbytes >= 300 * MIB
    chosen, plan = choose(step, BLOCKS, fast, goal)
    assert chosen and plan.peak_nbytes <= 160 * MIB and "cannot be met" not in plan.statement


def test_a_recomputed_step() -> None:
    """Only inputs stay; backward of the block begins with its forward; then all it saved is in memory."""
    step = recomputed(tower(2), frozenset({"h.1"}))
    assert [r.module for r in step.records] == ["h.0.mlp"] * 4 + ["h.1.mlp"]
    assert step.seconds == pytest.approx(tower(2).seconds + 0.1)
    assert max(nbytes for _, nbytes in step.other) == 40 * MIB and step.other[-1][1] == 0
    assert step.records[0].needed == pytest.approx(tower(2).records[0].needed + 0.1)
