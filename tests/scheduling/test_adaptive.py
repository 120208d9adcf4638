"""Mode "auto" in training: a plan from measurement, followed, given up when the step changes, made anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import inside
import pytest
import torch
from conftest import MakeOffload, grads_of, same_bits

import ssdtrain
from ssdtrain.planner import Tier
from ssdtrain.scheduling.replanner import Replanner
from ssdtrain.tools.demo.model import GPT, GPTConfig

pytestmark = pytest.mark.cpu_only  # what an accelerator does when is not known to the host that feeds it

AUTO = {
    "mode": "auto",
    "min_nbytes": "16KiB",
    "staging_nbytes": "4MiB",
    "prefetch_nbytes": "4MiB",
    "decline_below_nbytes": 0,
}
Step = Callable[[], Any]


def gpt(length: int = 64) -> tuple[GPT, Callable[[int], list[torch.Tensor]]]:
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=3, width=64, heads=4, sequence=length))

    def step(rows: int = 8) -> list[torch.Tensor]:
        tokens = torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(rows))
        model.zero_grad()
        loss = model(tokens, tokens)
        loss.backward()
        return [loss.detach(), *[grad.clone() for grad in grads_of(model) if grad is not None]]

    return model, step


def until_planned(offload: Any, step: Step) -> None:
    """At least three steps; more where a busy machine sends less than the 1 MiB that says how fast a drive is."""
    for _ in range(3):
        step()
    for _ in range(10):
        if offload.plan is None:
            step()


def one_f_one_b(num: int = 6, depth: int = 3) -> Step:
    torch.manual_seed(0)
    stage = torch.nn.Sequential(*[m for _ in range(4) for m in (torch.nn.Linear(64, 64), torch.nn.GELU())])
    inputs = torch.randn(num, 256, 64)

    def step() -> Any:
        stage.zero_grad()
        alive = [stage(inputs[i]).square().mean() for i in range(depth)]
        for i in range(num):
            alive.pop(0).backward()
            if i + depth < num:
                alive.append(stage(inputs[i + depth]).square().mean())
        return grads_of(stage)

    return step


def offloaded(offload: ssdtrain.ActivationOffload, step: Step) -> int:
    before = offload.stats.num_offloaded
    step()
    return offload.stats.num_offloaded - before


def test_a_plan_comes_with_the_third_step(make_offload: MakeOffload) -> None:
    """And what it says is what happens: as many records leave as it sends, and the next step begins with a look back.

    On a busy machine that step may wait, and the next one have another plan.
    """
    _, step = gpt()
    with make_offload(**AUTO) as offload:
        step()
        assert offload.plan is None
        step()
        count = offloaded(offload, step)
        plan = offload.plan
        step()
        stats = offload.stats
    assert plan is not None and not plan.is_declined and plan.peak_nbytes < plan.kept_peak_nbytes
    assert count == sum(where != 0 for where in plan.placement)
    assert stats.predicted_peak_nbytes == plan.peak_nbytes and "predicted" in str(stats)
    assert stats.plan and stats.plan in str(stats)


def test_a_plan_says_what_was_measured_beside_what_it_predicts(make_offload: MakeOffload) -> None:
    _, step = gpt()
    with make_offload(**AUTO) as offload:
        for _ in range(6):
            step()
            plan = offload.plan
            if plan is not None and plan.measured_seconds:
                break
    assert plan is not None and plan.measured_seconds > 0 and plan.measured_peak_nbytes > 0
    assert "predicted" not in str(plan) and "in the last step that followed it" in str(plan)


def test_steps_that_are_never_alike_are_sent_by_a_rule_which_is_said(make_offload: MakeOffload) -> None:
    """Other lengths every time: packing, experts."""
    rows = [8, 5, 7, 3, 6, 4]
    _, step = gpt()
    expected = [step(n) for n in rows]
    _, step = gpt()
    with make_offload(**AUTO) as offload:
        actual = [step(n) for n in rows]
        assert offload.plan is None and offload.stats.plan.startswith("no two steps were alike")
    assert same_bits(expected, actual) and offload.stats.num_offloaded > len(rows)


def test_results_are_equal_to_the_bit(make_offload: MakeOffload) -> None:
    """Before there is a plan, under one, and when shapes change back and forth."""
    rows = [8, 8, 8, 8, 5, 8, 5, 5, 8, 3, 8]
    _, step = gpt()
    expected = [step(n) for n in rows]
    _, step = gpt()
    with make_offload(**AUTO) as offload:
        actual = [step(n) for n in rows]
    assert offload.plan is not None and offload.stats.num_offloaded
    assert same_bits(expected, actual)


def test_a_changed_step_falls_back_at_once(make_offload: MakeOffload) -> None:
    """Half of the batch: nothing of it follows the plan for the whole, and its like gets a plan of its own."""
    _, step = gpt()
    with make_offload(**AUTO) as offload:
        until_planned(offload, step)
        whole = offload.plan
        before = offload.stats.skipped.get("planned to stay")
        step(4)
        assert offload.stats.skipped.get("planned to stay") == before
        inside.replanner(offload)._no_plan_before = 0.0  # type: ignore[union-attr]
        for _ in range(3):
            step(4)
        half = offload.plan
        step()
        assert offload.plan is whole
    assert whole is not None and half is not None and half is not whole
    assert half.kept_peak_nbytes < whole.kept_peak_nbytes


def test_an_evaluation_in_between_changes_nothing(make_offload: MakeOffload) -> None:
    model, step = gpt()
    tokens = torch.zeros(8, 64, dtype=torch.long)
    with make_offload(**AUTO) as offload:
        until_planned(offload, step)
        plan = offload.plan
        with torch.no_grad():
            model(tokens, tokens)
        model(tokens, tokens)  # a graph that nobody walks
        step()
        same = offload.plan
        assert plan is not None and same is not None and same.starts == plan.starts


@pytest.mark.parametrize("make", [lambda: gpt()[1], one_f_one_b], ids=["gpt", "1f1b"])
def test_hardly_any_reload_is_on_demand(make_offload: MakeOffload, make: Callable[[], Step]) -> None:
    """After the first steps less than one in a hundred."""
    step = make()
    with make_offload(**AUTO) as offload:
        for _ in range(4):
            step()
        before = offload.stats
        for _ in range(12):
            step()
        after = offload.stats
    demanded = after.num_demand_reloads - before.num_demand_reloads
    prefetched = after.num_prefetched - before.num_prefetched
    assert prefetched > 0 and demanded <= 0.01 * (demanded + prefetched), str(after)


def test_reloads_wait_for_their_time(make_offload: MakeOffload, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan brings back what is needed next, not all that `prefetch_nbytes` allows.

    It plans for a drive that is fast whatever else this machine does: a slow one has to begin early.
    """
    machine_now = Replanner._machine_now
    fast = Tier(4e9, 4e9)
    monkeypatch.setattr(Replanner, "_machine_now", lambda self, **kind: replace(machine_now(self, **kind), disk=fast))
    _, step = gpt()
    seen: list[int] = []
    with make_offload(**AUTO | {"prefetch_nbytes": "64MiB"}) as offload:
        until_planned(offload, step)
        prefetch = inside.reloads(offload).prefetch
        inside.reloads(offload).prefetch = lambda record: (  # type: ignore[method-assign]
            prefetch(record),
            seen.append(inside.counters(offload).prefetched_nbytes),
        )[0]
        step()
        plan = offload.plan
    assert plan is not None and seen
    assert max(seen) < 0.5 * plan.disk_nbytes


def test_a_memory_budget_is_kept(make_offload: MakeOffload) -> None:
    """Training waits for the drive rather than exceed it, from the first step on; less moves than in mode "all"."""
    _, step = gpt()
    with make_offload(**AUTO) as offload:
        until_planned(offload, step)
        assert offload.plan is not None
        kept = offload.plan.kept_peak_nbytes
    _, step = gpt()
    with make_offload(**AUTO | {"memory_budget": kept // 2, "staging_nbytes": "1MiB"}) as offload:
        until_planned(offload, step)
        plan, stats = offload.plan, offload.stats
        step()
        offload.stats  # noqa: B018
    assert plan is not None and (plan.is_patient or not plan.stall_seconds)
    assert plan.peak_nbytes <= kept // 2 and 0 < plan.disk_nbytes < kept
    assert stats.peak_saved_nbytes <= kept


def test_endurance_caps_the_plan(make_offload: MakeOffload) -> None:
    _, step = gpt()
    with make_offload(**AUTO | {"endurance_tbw": 1e-6, "drive_life_years": 100}) as offload:
        until_planned(offload, step)
        plan = offload.plan
    assert plan is not None and plan.is_declined and "endurance" in plan.statement


def test_mode_all_plans_nothing(make_offload: MakeOffload) -> None:
    _, step = gpt()
    with make_offload(**AUTO | {"mode": "all"}) as offload:
        for _ in range(4):
            step()
    assert offload.plan is None and "planned to stay" not in offload.stats.skipped


def test_a_hint_brings_a_micro_batch_back(make_offload: MakeOffload) -> None:
    """Backward of the first of two micro-batches: without the hint its first reload would be on demand."""
    torch.manual_seed(0)
    stage = torch.nn.Sequential(*[m for _ in range(3) for m in (torch.nn.Linear(64, 64), torch.nn.GELU())])
    with make_offload(prefetch_nbytes="64MiB") as offload:
        first = stage(torch.randn(256, 64)).square().mean()
        inside.thread(offload).pass_.is_closed = True  # type: ignore[union-attr]  # another micro-batch begins
        second = stage(torch.randn(256, 64)).square().mean()
        transport = inside.transport(offload)
        assert transport is not None
        transport.engine.drain()
        offload.stats  # noqa: B018  takes note of what was written
        offload.hint_backward(0)
        assert offload.stats.num_prefetched > 0
        first.backward()
        assert offload.stats.num_demand_reloads == 0
        second.backward()
