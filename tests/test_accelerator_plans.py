"""Plans for tensors of an accelerator: times are its own, the host tier is planned for, and nobody waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import MakeOffload, same_bits
from engine_tools import eventually
from test_adaptive import AUTO, gpt

import ssdtrain
from ssdtrain.adaptation import Adaptation
from ssdtrain.planner import Machine, Plan, Tier, Where
from ssdtrain.simulated import SimulatedDevice
from ssdtrain.timing import DeviceTiming, _ComputeClock

pytest.importorskip("ssdtrain._C", reason="an accelerator needs the extension")

MIB = 1 << 20
NUM_UNTIL_PLAN = 4  # two that look the same, and one in which the second is known


@pytest.fixture
def every_step_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssdtrain.schedule._MOST_UNTIMED", 0)


def planned(offload: ssdtrain.ActivationOffload, step: Callable[[], Any], num: int = NUM_UNTIL_PLAN) -> Plan | None:
    """Takes steps as training does, which looks at every loss."""
    for _ in range(num):
        step()[0].item()
    return offload.plan


@pytest.mark.accelerator_only
def test_a_plan_is_made_and_followed(make_offload: MakeOffload) -> None:
    _, step = gpt()
    with make_offload(**AUTO) as offload:
        plan = planned(offload, step)
        assert plan is not None and not plan.is_declined and plan.peak_nbytes < plan.kept_peak_nbytes
        before = offload.stats.num_offloaded
        step()
        assert offload.stats.num_offloaded - before == sum(where != Where.KEEP for where in plan.placement)
        planned(offload, step, num=1)
        stats = offload.stats
    assert stats.device_step_seconds > stats.device_wait_seconds >= 0
    assert "in the latest step that was timed" in str(stats)


@pytest.mark.accelerator_only
def test_results_are_equal_to_the_bit(make_offload: MakeOffload) -> None:
    """Before there is a plan, under one, when shapes change, and with a host that never looks at a loss."""
    rows = [8] * 6 + [5, 8, 5, 5, 5, 5, 8, 3, 8]
    _, step = gpt()
    expected = [step(n) for n in rows]
    _, step = gpt()
    with make_offload(**AUTO) as offload:
        actual = [step(n) for n in rows]
    assert offload.stats.num_offloaded
    assert same_bits(expected, actual)


@pytest.mark.accelerator_only
def test_endurance_caps_what_is_written(make_offload: MakeOffload) -> None:
    _, step = gpt()
    with make_offload(**AUTO | {"endurance_tbw": 1e-6, "drive_life_years": 100}) as offload:
        plan = planned(offload, step)
        assert plan is not None and plan.is_declined and "endurance" in plan.statement
        before = offload.stats.num_offloaded
        planned(offload, step, num=2)
        assert offload.stats.num_offloaded == before


@pytest.mark.accelerator_only
def test_the_host_tier_takes_what_the_drive_is_too_slow_for(
    make_offload: MakeOffload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is sent there is there, until there is no room: then it is for the drive."""
    machine_now = Adaptation._machine_now
    seen: list[Machine] = []

    def with_a_slow_drive(self: Adaptation, **kind: bool) -> Machine:
        seen.append(machine_now(self, **kind))
        return replace(seen[-1], disk=Tier(1e7, 1e7), host=Tier(5e9, 5e9, 2 * MIB))

    monkeypatch.setattr(Adaptation, "_machine_now", with_a_slow_drive)
    _, step = gpt()
    with make_offload(**AUTO | {"host_nbytes": 2 * MIB}) as offload:
        plan = planned(offload, step)
        assert plan is not None and plan.host_nbytes > 0
        before = offload.stats.hosted_nbytes
        step()[0].item()
        offload._store._transport.engine.drain()  # type: ignore[union-attr]
        hosted = offload.stats.hosted_nbytes - before
    measured = seen[-1]
    assert measured.host is not None and measured.host.capacity_nbytes == 2 * MIB and measured.idle_nbytes == 0
    assert measured.host.write_bandwidth > 1e6 and measured.host.read_bandwidth > 1e6
    assert 0.5 * plan.host_nbytes <= hosted <= plan.host_nbytes, "the rest was forwarded"


@pytest.mark.accelerator_only
def test_a_host_tier_alone_is_planned_for(device: SimulatedDevice | None) -> None:
    policy = ssdtrain.ActivationPolicy(**AUTO | {"host_nbytes": "3MiB"})
    _, step = gpt()
    with ssdtrain.ActivationOffload(None, policy, None, device) as offload:
        plan = planned(offload, step)
        assert plan is not None and plan.host_nbytes > 0 and plan.disk_nbytes == 0
        planned(offload, step, num=3)
    assert offload.stats.peak_host_nbytes <= 3 * MIB
    offload.close()


@pytest.mark.accelerator_only
def test_a_memory_budget_is_planned_for(make_offload: MakeOffload) -> None:
    _, step = gpt()
    with make_offload(**AUTO) as offload:
        plan = planned(offload, step)
    assert plan is not None
    budget = plan.kept_peak_nbytes * 2 // 3
    _, step = gpt()
    with make_offload(**AUTO | {"memory_budget": budget}) as offload:
        plan = planned(offload, step)
    assert plan is not None and plan.peak_nbytes <= budget
    assert 0 < plan.disk_nbytes < plan.kept_peak_nbytes, "what need not leave stays"


@pytest.mark.accelerator_only
def test_the_device_says_when_it_waited(
    make_offload: MakeOffload, device: SimulatedDevice | None, every_step_is_timed: None
) -> None:
    """The stream that brings bytes back is held for a while, although the host goes on."""
    if device is None:
        pytest.skip("a real device's stream cannot be held")
    _, step = gpt()
    with make_offload(**AUTO) as offload:
        planned(offload, step)
        caution = offload._schedule._adaptation._caution  # type: ignore[union-attr]
        device.hold(device.driver.in_stream())
        schedule, before = offload._schedule, offload._schedule._step

        def is_waiting() -> bool:
            timing = schedule._step.timing if schedule._step is not before else None
            return timing is not None and any(began.is_reached for began, _ in timing._waits)

        def let_go_while_it_waits() -> None:
            eventually(is_waiting)
            time.sleep(0.3)
            device.release(device.driver.in_stream())

        other = threading.Thread(target=let_go_while_it_waits)
        other.start()
        step()[0].item()
        other.join()
        waits: list[float] = []
        offload.on_step(lambda _, stats: waits.append(stats.device_wait_seconds))
        planned(offload, step, num=3)
    assert max(waits) >= 0.3
    assert offload._schedule._adaptation._caution < caution, "it is more careful now"  # type: ignore[union-attr]


@pytest.mark.accelerator_only
def test_once_there_is_a_plan_few_steps_are_timed(
    make_offload: MakeOffload, device: SimulatedDevice | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    timings: list[DeviceTiming] = []
    init = DeviceTiming.__init__
    monkeypatch.setattr(DeviceTiming, "__init__", lambda self, of: (timings.append(self), init(self, of))[1])
    _, step = gpt()
    with make_offload(**AUTO) as offload:
        assert planned(offload, step) is not None
        before = len(timings)
        planned(offload, step, num=20)
    assert before >= 3 and 3 <= len(timings) - before <= 12


@pytest.mark.accelerator_only
def test_nobody_waits_for_a_device_that_is_behind(
    make_offload: MakeOffload,
    device: SimulatedDevice | None,
    every_step_is_timed: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps it is not through with are learned from later; of too many nothing is kept."""
    if device is None:
        pytest.skip("a real device's stream cannot be held")
    reviewed: list[bool] = []
    review = Adaptation.review
    monkeypatch.setattr(
        Adaptation, "review", lambda self, *what: (reviewed.append(what[1].is_accelerated), review(self, *what))[1]
    )
    with make_offload(**AUTO | {"staging_nbytes": "64MiB", "prefetch_nbytes": "64MiB"}) as offload:
        weight = torch.nn.Parameter(torch.ones(512, 512))
        device.hold(device.current_stream())
        for _ in range(8):
            (torch.sin(weight * weight.sin()).sum()).backward()
        assert len(offload._schedule._under_way) == 4
        assert offload.plan is None
        device.release(device.current_stream())
        weight.grad.sum().item()  # type: ignore[union-attr]
        for _ in range(3):
            (torch.sin(weight * weight.sin()).sum()).backward()
            weight.grad.sum().item()  # type: ignore[union-attr]
        assert len(offload._schedule._under_way) <= 1
    assert reviewed >= 6 * [True]


@pytest.mark.accelerator_only
def test_waits_are_not_compute_time(device: SimulatedDevice | None) -> None:
    if device is None:
        pytest.skip("a real device's stream cannot be held")
    timing = DeviceTiming(device)
    timing.save()
    began = timing.mark()
    device.synchronize()
    time.sleep(0.1)
    timing.note_wait(began)
    timing.need(0, began)
    timing.release(0)
    end = timing.mark()
    device.synchronize()
    assert timing.is_over
    times = timing.times(end)
    assert times.waited >= 0.1 and times.seconds < 0.05
    assert times.saved == [0.0] and times.saved <= times.needed <= times.released and times.released[0] <= times.seconds


@pytest.mark.parametrize(
    ("waits", "at", "expected"),
    [
        ([], 3.0, 3.0),
        ([(1.0, 2.0)], 0.5, 0.5),
        ([(1.0, 2.0)], 1.0, 1.0),
        ([(1.0, 2.0)], 1.5, 1.0),
        ([(1.0, 2.0)], 4.0, 3.0),
        ([(1.0, 3.0), (2.0, 4.0)], 5.0, 2.0),  # two streams at once
        ([(1.0, 5.0), (2.0, 3.0)], 6.0, 2.0),
        ([(1.0, 2.0), (3.0, 4.0)], 3.5, 2.0),
    ],
)
def test_a_clock_that_stands_still(waits: list[tuple[float, float]], at: float, expected: float) -> None:
    assert _ComputeClock(waits).at(at) == expected


@pytest.mark.accelerator_only
def test_copies_are_counted_by_direction(make_offload: MakeOffload, device: SimulatedDevice | None) -> None:
    """The engine measures its copies: what bandwidth a host tier has is known without a benchmark."""
    _, step = gpt()
    with make_offload(**AUTO) as offload:
        step()[0].item()
        transport = offload._store._transport
        assert transport is not None
        transport.engine.drain()
        (out_nbytes, out_seconds), (in_nbytes, in_seconds) = transport.engine.copies()
        stats = offload.stats
    assert out_seconds > 0 and in_seconds > 0
    assert 0 < out_nbytes <= stats.offloaded_nbytes and 0 < in_nbytes <= stats.offloaded_nbytes
