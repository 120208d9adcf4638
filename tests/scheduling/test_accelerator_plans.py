"""Plans for tensors of an accelerator: times are its own, the host tier is planned for, and nobody waits for it."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import inside
import pytest
import torch
from conftest import MakeOffload, same_bits
from engine_tools import eventually
from test_adaptive import AUTO, gpt

import ssdtrain
from ssdtrain.devices.cuda import _CudaMoment
from ssdtrain.devices.simulated import SimulatedDevice
from ssdtrain.planner import Machine, Plan, Tier, Where
from ssdtrain.scheduling.replanner import Measured, Replanner
from ssdtrain.tracing.device_trace import DeviceTrace, _ComputeClock

pytest.importorskip("ssdtrain._C", reason="an accelerator needs the extension")

MIB = 1 << 20
NUM_UNTIL_PLAN = 5  # a first one, two that look the same, one in which the device gets through them, and the next


@pytest.fixture
def every_step_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssdtrain.scheduling.step_review._MOST_UNTIMED", 0)


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
    machine_now = Replanner._machine_now
    seen: list[Machine] = []

    def with_a_slow_drive(self: Replanner, **kind: bool) -> Machine:
        seen.append(machine_now(self, **kind))
        return replace(seen[-1], disk=Tier(1e7, 1e7), host=Tier(5e9, 5e9, 2 * MIB))

    monkeypatch.setattr(Replanner, "_machine_now", with_a_slow_drive)
    _, step = gpt()
    with make_offload(**AUTO | {"host_nbytes": 2 * MIB}) as offload:
        plan = planned(offload, step)
        assert plan is not None and plan.host_nbytes > 0
        before = offload.stats.hosted_nbytes
        step()[0].item()
        inside.transport(offload).engine.drain()  # type: ignore[union-attr]
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
@pytest.mark.simulated_only
def test_the_device_says_when_it_waited(
    make_offload: MakeOffload,
    device: SimulatedDevice | None,
    every_step_is_timed: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stream that brings bytes back is held for a while, although the host goes on."""
    assert device is not None
    _, step = gpt()
    with make_offload(**AUTO) as offload:
        planned(offload, step)
        waits: list[float] = []
        review = Replanner.review
        monkeypatch.setattr(
            Replanner, "review", lambda self, *what: (waits.append(what[1].stall_seconds), review(self, *what))[1]
        )
        device.hold(device.driver.in_stream())
        schedule, before = inside.schedule(offload), inside.step(offload)

        def is_waiting() -> bool:
            timing = schedule._step.timing if schedule._step is not before else None
            return timing is not None and any(began.is_reached for began, _ in timing._reload_waits)

        def let_go_while_it_waits() -> None:
            eventually(is_waiting)
            time.sleep(0.3)
            device.release(device.driver.in_stream())

        other = threading.Thread(target=let_go_while_it_waits)
        other.start()
        step()[0].item()
        other.join()
        planned(offload, step, num=3)
    assert max(waits) >= 0.3


@pytest.mark.accelerator_only
def test_once_there_is_a_plan_few_steps_are_timed(
    make_offload: MakeOffload, device: SimulatedDevice | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    timings: list[DeviceTrace] = []
    init = DeviceTrace.__init__
    monkeypatch.setattr(DeviceTrace, "__init__", lambda self, of: (timings.append(self), init(self, of))[1])
    _, step = gpt()
    with make_offload(**AUTO) as offload:
        assert planned(offload, step) is not None
        before = len(timings)
        planned(offload, step, num=20)
    assert before >= 2 and 3 <= len(timings) - before <= 12


@pytest.mark.accelerator_only
@pytest.mark.simulated_only
def test_nobody_waits_for_a_device_that_is_behind(
    make_offload: MakeOffload,
    device: SimulatedDevice | None,
    every_step_is_timed: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps it is not through with are learned from later; of too many nothing is kept."""
    assert device is not None
    reviewed: list[bool] = []
    review = Replanner.review
    monkeypatch.setattr(
        Replanner, "review", lambda self, *what: (reviewed.append(what[1].is_accelerated), review(self, *what))[1]
    )
    with make_offload(**AUTO | {"staging_nbytes": "64MiB", "prefetch_nbytes": "64MiB"}) as offload:
        weight = torch.nn.Parameter(torch.ones(512, 512))
        device.hold(device.current_stream())
        for _ in range(8):
            (torch.sin(weight * weight.sin()).sum()).backward()
        assert len(inside.schedule(offload).review._under_way) == 4
        assert offload.plan is None
        device.release(device.current_stream())
        weight.grad.sum().item()  # type: ignore[union-attr]
        for _ in range(3):
            (torch.sin(weight * weight.sin()).sum()).backward()
            weight.grad.sum().item()  # type: ignore[union-attr]
        assert len(inside.schedule(offload).review._under_way) <= 1
    assert reviewed >= 6 * [True]


@pytest.mark.accelerator_only
@pytest.mark.simulated_only
def test_waits_are_not_compute_time(device: SimulatedDevice | None) -> None:
    assert device is not None
    timing = DeviceTrace(device)
    timing.save()
    began = timing.mark()
    device.synchronize()
    time.sleep(0.1)
    timing.note_wait(began, is_for_reload=True)
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
        transport = inside.transport(offload)
        assert transport is not None
        transport.engine.drain()
        (out_nbytes, out_seconds), (in_nbytes, in_seconds) = transport.engine.copies()
        stats = offload.stats
    assert out_seconds > 0 and in_seconds > 0
    assert 0 < out_nbytes <= stats.offloaded_nbytes and 0 < in_nbytes <= stats.offloaded_nbytes


@pytest.mark.accelerator_only
@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.simulated_only
def test_copies_are_timed_whatever_comes_after_them(
    device: SimulatedDevice | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checksum: bool
) -> None:
    """Each copy takes ten milliseconds; who looks after each of them late must not think that it took none."""
    assert device is not None
    memmove = ctypes.memmove
    monkeypatch.setattr(
        "ssdtrain.devices.simulated.driver.ctypes.memmove", lambda *what: (time.sleep(0.01), memmove(*what))[1]
    )
    policy = ssdtrain.ActivationPolicy(min_nbytes=0, mode="all", staging_nbytes="8MiB", checksum=checksum)
    began = time.monotonic()
    with ssdtrain.ActivationOffload([str(tmp_path)], policy, None, device) as offload:
        x = torch.ones(1024, 256, requires_grad=True)
        for _ in range(12):
            x = x.sin()
        transport = inside.transport(offload)
        assert transport is not None
        transport.engine.drain()
        (nbytes, seconds), _ = transport.engine.copies()
        del x
    assert nbytes >= 8 * MIB
    assert 0.9 * 0.01 * nbytes / MIB <= seconds <= time.monotonic() - began, "one copy after the other, for each MiB"
    offload.close()


@pytest.mark.accelerator_only
@pytest.mark.simulated_only
def test_steps_on_several_streams(
    make_offload: MakeOffload, device: SimulatedDevice | None, every_step_is_timed: None
) -> None:
    """One stream is behind when the other is through with the next step: no length is negative."""
    assert device is not None
    streams = [device.current_stream(), device.new_stream()]
    weights: list[torch.nn.Parameter] = []
    for stream in streams:
        with device.stream(stream):
            weights.append(torch.nn.Parameter(torch.ones(512, 512)))
    device.synchronize()
    lengths: list[float] = []
    with make_offload(**AUTO | {"staging_nbytes": "64MiB"}) as offload:
        offload.on_step(lambda _, stats: lengths.append(stats.device_step_seconds))
        for number in range(12):
            if number % 2 == 0:
                device.hold(streams[0])
            with device.stream(streams[number % 2]):
                weight = weights[number % 2]
                torch.sin(weight * weight.sin()).sum().backward()
            if number % 2 == 1:
                device.release(streams[0])
                device.synchronize()
    assert len(lengths) >= 10 and min(lengths) >= 0 and max(lengths) > 0


@pytest.mark.accelerator_only
@pytest.mark.simulated_only
def test_waits_for_copies_out_are_not_compute_time(
    make_offload: MakeOffload, device: SimulatedDevice | None, every_step_is_timed: None
) -> None:
    """Sources that were let go in stream order make what comes later wait for their copies."""
    assert device is not None
    with make_offload(**AUTO) as offload:
        device.hold(device.driver.out_stream())
        device.hold(device.current_stream())
        x = torch.ones(512, 256, requires_grad=True)
        for _ in range(6):  # more than a quarter of staging, and not all of it
            x = x.sin()
        timing = inside.step(offload).timing
        assert timing is not None
        # An engine's thread queues the copies; each hook, and a look at `stats`, lets go of sources that are queued.
        assert eventually(lambda: offload.stats.num_saved > 0 and bool(timing._waits)), "let go"
        device.release(device.current_stream())
        eventually(lambda: timing._waits[0][0].is_reached)
        time.sleep(0.3)
        device.release(device.driver.out_stream())
        end = timing.mark()
        device.synchronize()
        times = timing.times(end)
        assert times.waited >= 0.3 and times.waited_for_reloads == 0.0
        assert times.seconds + times.waited >= 0.3
        del x


@pytest.mark.accelerator_only
@pytest.mark.simulated_only
def test_an_accelerator_that_must_not_be_asked(
    make_offload: MakeOffload, device: SimulatedDevice | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph is captured while another one dies; and one whose moment it does not know is learned nothing from."""
    assert device is not None
    with make_offload(**AUTO) as offload:
        alive = torch.ones(512, 512, requires_grad=True).sin().sin().sin()
        step = inside.step(offload)
        assert step.timing is not None
        monkeypatch.setattr(device, "why_not", lambda: "CUDA graph capture")
        moments = len(step.timing._saved)
        del alive
        offload.stats  # noqa: B018  takes note
        assert step.timing is None and moments
        monkeypatch.undo()

        def refuse(_: DeviceTrace) -> bool:
            raise RuntimeError("operation not permitted on an event last recorded in a capturing stream")

        _, step_of_gpt = gpt()
        with monkeypatch.context() as patch:
            patch.setattr(DeviceTrace, "is_over", property(refuse))
            for _ in range(3):
                step_of_gpt()[0].item()
        assert any("not permitted" in text for text in offload.stats.fallbacks)
        assert planned(offload, step_of_gpt) is not None


@pytest.mark.accelerator_only
@pytest.mark.simulated_only
def test_a_graph_that_dies_in_a_forked_child(
    device: SimulatedDevice | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks the accelerator nothing, and opens nothing."""
    assert device is not None
    policy = ssdtrain.ActivationPolicy(**AUTO)
    with ssdtrain.ActivationOffload([str(tmp_path)], policy, None, device) as offload:
        graph = torch.ones(512, 512, requires_grad=True).sin().sin().sin()
        device.synchronize()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                device.timed_event = None  # type: ignore[assignment, method-assign]  # a call would raise
                del graph
                inside.store(offload).process_releases()
                code = 0 if inside.transport(offload) is None and not inside.counters(offload).fallbacks else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        del graph
    offload.close()


@pytest.mark.accelerator_only
def test_a_step_that_never_ends_is_not_timed_for_ever(
    make_offload: MakeOffload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssdtrain.tracing.step_trace._MAX_RECORDS", 30)
    _, step = gpt()
    with make_offload(**AUTO) as offload:
        alive = torch.ones(256, 256, requires_grad=True).sin().sin()
        timing = inside.step(offload).timing
        assert timing is not None
        for _ in range(4):
            step()[0].item()
        assert inside.step(offload).timing is None and len(timing._saved) == 30
        del alive


@pytest.mark.accelerator_only
def test_waits_before_a_plan_are_not_held_against_it(make_offload: MakeOffload, every_step_is_timed: None) -> None:
    _, step = gpt()
    with make_offload(**AUTO) as offload:
        assert planned(offload, step) is not None
        replanner = inside.replanner(offload)
        assert replanner is not None and replanner.latest is not None
        prepared, caution = replanner.latest, replanner._caution
        waited = Measured(1, prepared.step.seconds, 0.9 * prepared.step.seconds, None, is_accelerated=True)
        replanner.review(prepared.step, waited, inside.store(offload).totals())
        assert replanner._caution >= caution
        plan = replanner.latest.plan  # another one, where the drive's speed has changed
        waited = replace(waited, followed=plan, stall_seconds=waited.stall_seconds + plan.stall_seconds)
        replanner.review(prepared.step, waited, inside.store(offload).totals())
        assert replanner._caution < caution


@pytest.mark.accelerator_only
def test_a_probe_takes_one_step(make_offload: MakeOffload, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few steps are timed."""
    monkeypatch.setattr("ssdtrain.scheduling.replanner.FIRST_PATIENCE", 4)
    machine_now = Replanner._machine_now
    slow = Tier(1e4, 1e4)
    monkeypatch.setattr(Replanner, "_machine_now", lambda self, **kind: replace(machine_now(self, **kind), disk=slow))
    _, step = gpt()
    with make_offload(**AUTO) as offload:
        plan = planned(offload, step)
        assert plan is not None and plan.is_declined
        moved = []
        for _ in range(24):
            before = offload.stats.num_offloaded
            step()[0].item()
            moved.append(offload.stats.num_offloaded > before)
    assert any(moved)
    assert not any(a and b for a, b in pairwise(moved)), moved


@pytest.mark.accelerator_only
@pytest.mark.simulated_only
def test_a_step_on_several_devices_is_not_planned_and_says_so(
    make_offload: MakeOffload, device: SimulatedDevice | None
) -> None:
    assert device is not None
    with make_offload(**AUTO) as offload:
        for _ in range(4):
            x = torch.ones(512, 512, requires_grad=True).sin().sin()
            cpu, inside.devices(offload).cpu = inside.devices(offload).cpu, SecondDevice(device)  # type: ignore[assignment]
            x.sin().sin().sum().backward()
            inside.devices(offload).cpu = cpu
        assert offload.plan is None
        assert any("several devices" in text for text in offload.stats.fallbacks)


class SecondDevice:
    """The same one under another name."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)


class FakeEvent:
    """What CUDA says of events: recorded before they are asked, timed between two that are reached."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self.at: float | None = None
        self.is_reached = False

    def record(self, stream: Any) -> None:
        self.at, self.is_reached = stream.now, False

    def query(self) -> bool:
        assert self.at is not None
        return self.is_reached

    def elapsed_time(self, end: FakeEvent) -> float:
        if not (self.is_reached and end.is_reached):
            raise RuntimeError("device not ready")
        assert self.at is not None and end.at is not None
        return end.at - self.at


def test_timed_events_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events go back to where they came from, and are timed once both are reached."""
    monkeypatch.setattr("torch.cuda.Event", FakeEvent)
    free: list[Any] = []
    stream = SimpleNamespace(cuda_stream=7, now=100.0)
    first = _CudaMoment(free, stream)
    stream.now = 350.0
    second = _CudaMoment(free, stream)
    assert first.stream == 7 and not second.is_reached
    for moment in (first, second):
        moment._event.is_reached = True
    assert second.seconds_since(first) == 0.25
    event = first._event
    del first, moment
    assert event in free
    assert _CudaMoment(free, stream)._event is event and event not in free
