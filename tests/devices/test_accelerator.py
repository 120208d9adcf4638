"""Tensors of an accelerator: host tier and drive, streams, a process far ahead, faults of its copies.

On the simulated accelerator, which checks every access and runs its streams late, in an order drawn from a seed. The
engine, its threads and the store are the real ones.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
from conftest import same_bits
from torch.nn import functional as F

import ssdtrain
from ssdtrain.devices.simulated import SimulatedDevice
from ssdtrain.io.drive import Drive
from ssdtrain.planner import buffers
from ssdtrain.policy import ActivationPolicy
from ssdtrain.store.pending import Pending
from ssdtrain.store.record import Residency
from ssdtrain.tools.demo.model import GPT, GPTConfig

pytest.importorskip("ssdtrain._C", reason="an accelerator needs the extension")

KIB = 1024
Make = Callable[..., ssdtrain.ActivationOffload]


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    simulated = SimulatedDevice(seed=3)
    yield simulated
    simulated.close()


@pytest.fixture
def make(tmp_path: Path, device: SimulatedDevice) -> Iterator[Make]:
    """Contexts for the simulated accelerator; at the end nothing may be left of any."""
    made: list[ssdtrain.ActivationOffload] = []

    def one(directory: Path | None = tmp_path, on: SimulatedDevice = device, **fields: Any) -> Any:
        policy = {
            "min_nbytes": 0,
            "mode": "all",
            "staging_nbytes": 64 * KIB,
            "prefetch_nbytes": 64 * KIB,
            "decline_below_nbytes": 0,
        } | fields
        paths = None if directory is None else [str(directory)]
        made.append(ssdtrain.ActivationOffload(paths, ActivationPolicy(**policy), None, on))
        return made[-1]

    yield one
    device.release()  # a test that failed holds streams that what follows would wait for
    gc.collect()
    for offload in made:
        assert offload.stats.num_live_records == 0
        offload.close()


def train(offload: ssdtrain.ActivationOffload | None, steps: int = 3) -> list[torch.Tensor]:
    """Losses and parameters of a small GPT with dropout after each is the same program, with and without."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=2, width=32, heads=2, sequence=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        tokens = torch.randint(0, 256, (4, 33), generator=torch.Generator().manual_seed(step))
        if offload is None:
            loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        else:
            with offload:
                loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses + [p.detach() for p in model.parameters()]


@pytest.fixture(scope="module")
def plain() -> list[torch.Tensor]:
    return train(None)


def layers(num: int, size: int = 2048) -> tuple[torch.Tensor, torch.Tensor]:
    """A chain of `num` operators, each of which saves its own result (8 KiB by default)."""
    x = torch.linspace(0, 1, size).requires_grad_()
    y = x * 1
    for _ in range(num):
        y = (y * 1).tanh()
    return x, y.sum()


def grad_of(num: int, size: int = 2048) -> torch.Tensor:
    x, loss = layers(num, size)
    loss.backward()
    assert x.grad is not None
    return x.grad


TIERS = {
    "drive": {},
    "drive, checksum": {"checksum": True},
    "drive, threads": {"engine": "threads"},
    "auto": {"mode": "auto"},
    "host": {"directory": None},
    "host then drive": {"host_nbytes": 200 * KIB},
}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_training_is_equal_to_the_bit(make: Make, plain: list[torch.Tensor], tier: str, seed: int) -> None:
    """Law 1 and 8: whatever the order of streams, through every tier, with no access out of order."""
    device = SimulatedDevice(seed=seed)
    offload = make(on=device, **TIERS[tier])
    with device:
        ours = train(offload)
    assert same_bits(ours, plain)
    stats = offload.stats
    assert stats.num_offloaded > 0 and stats.num_prefetched > 0
    assert (stats.read_nbytes > 0) == (tier != "host"), str(stats)
    assert (stats.host_read_nbytes > 0) == tier.startswith("host"), str(stats)
    device.close()


# -- ahead of the accelerator ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["all", "auto"])
def test_memory_falls_although_training_runs_far_ahead(make: Make, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of forward has run when the last of it is queued, and PyTorch's allocator gives out memory in that order:
    kept, 64 layers map 64 activations; offloaded, what is in flight and a few more.

    "auto" keeps what copies have no time for once the accelerator has nothing more to do. Simulated copies take as long
    as the machine is busy, so here they are given it."""
    reserved, has_room = {}, Pending.has_room

    def in_time(pending: Pending, nbytes: int) -> bool:
        if not has_room(pending, nbytes) and inside.transport(offload).next_point() is None:
            inside.transport(offload).engine.drain()
        return has_room(pending, nbytes)

    if mode == "auto":
        monkeypatch.setattr(Pending, "has_room", in_time)
    for name in ("kept", "offloaded"):
        device = SimulatedDevice(seed=0)
        offload = make(on=device, mode=mode, enabled=name == "offloaded")
        with device, offload:
            x, loss = layers(64)
            reserved[name] = device.peak_reserved_nbytes
            del loss, x
        device.close()
    in_flight = 64 * KIB  # staging: sources of what is on its way
    working = 6 * 8 * KIB  # x, and results of the operators that are just being queued
    assert reserved["kept"] >= 64 * 8 * KIB
    assert reserved["offloaded"] <= in_flight + working, reserved


def test_auto_waits_for_the_accelerator(make: Make, device: SimulatedDevice) -> None:
    """A process that is ahead loses nothing by waiting, and memory falls; a drive that is behind is another matter."""
    offload = make(mode="auto")
    stream = device.current_stream()
    device.hold(stream)
    with device, offload:
        x, loss = layers(5)
        assert inside.transport(offload) is not None
        assert inside.transport(offload).next_point() is not None, "the accelerator has work to do"
        threading.Timer(0.3, device.release, [stream]).start()
        x, loss = layers(64)
        device.synchronize()
        assert inside.transport(offload).next_point() is None
        loss.backward()
    assert offload.stats.ahead_seconds > 0
    assert torch.equal(x.grad, grad_of(64))  # type: ignore[arg-type]


def test_sources_are_let_go_in_stream_order(make: Make, device: SimulatedDevice) -> None:
    """While the accelerator has run nothing, a source's memory serves later work, after its copy."""
    device.hold(device.current_stream())
    offload = make(staging_nbytes=512 * KIB)
    with device:
        with offload:
            x, loss = layers(40)
            held = offload.stats.peak_device_nbytes
        device.release(device.current_stream())
        loss.backward()
    assert held < 40 * 8 * KIB
    assert torch.equal(x.grad, grad_of(40))  # type: ignore[arg-type]


# -- streams -----------------------------------------------------------------------------------------------------------


def test_training_on_a_side_stream(make: Make, device: SimulatedDevice) -> None:
    """TRL and cosmos-rl ordered their copies after the default stream, whatever stream training was on."""
    offload = make()
    side = device.new_stream()
    with device:
        with device.stream(side), offload:
            x, loss = layers(24)
            loss.backward()
        device.synchronize()
    assert torch.equal(x.grad, grad_of(24))  # type: ignore[arg-type]
    assert offload.stats.read_nbytes > 0


@pytest.mark.parametrize("tier", ["drive", "host"])
def test_forward_on_one_stream_and_backward_on_another(make: Make, device: SimulatedDevice, tier: str) -> None:
    """What was prefetched for one stream is ordered again for the stream that asks, and its memory shared with it."""
    offload = make(**TIERS[tier])
    side = device.new_stream()
    with device:
        with offload:
            x, loss = layers(24)
        event = device.driver.record(device.current_stream())
        device.driver.wait(side, event)
        with device.stream(side):
            loss.backward(retain_graph=True)
        event = device.driver.record(side)
        device.driver.wait(device.current_stream(), event)
        loss.backward()
    assert torch.equal(x.grad, 2 * grad_of(24))  # type: ignore[arg-type]


def test_prefetched_on_one_stream_and_used_on_another(
    make: Make, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward of the second graph brings the first one's tensors too, into memory of its own stream. The stream that
    uses them is another: the memory may serve the first one again only after what is queued there."""
    offload = make(prefetch_nbytes=1024 * KIB)
    side, shared = device.new_stream(), []
    share = device.share
    monkeypatch.setattr(device, "share", lambda storage, stream: [shared.append(stream), share(storage, stream)])
    with device:
        with offload:
            x, first = layers(16)
            _y, second = layers(16)
        device.synchronize()
        second.backward()
        assert side not in shared
        device.driver.wait(side, device.driver.record(device.current_stream()))
        with device.stream(side):
            first.backward()
        device.driver.wait(device.current_stream(), device.driver.record(side))
    assert shared.count(side) >= 8
    assert torch.equal(x.grad, grad_of(16))  # type: ignore[arg-type]


def test_memory_of_a_dropped_reload_is_kept_until_it_is_filled(make: Make, device: SimulatedDevice) -> None:
    """The graph is gone in the middle of backward; copies into memory of its reloads are queued all the same."""
    offload = make(prefetch_nbytes=1024 * KIB)
    store = inside.store(offload)
    with device, offload:
        x, loss = layers(16)
        device.synchronize()
        assert inside.transport_of(store) is not None
        inside.transport_of(store).engine.drain()
        offload.stats  # noqa: B018  takes note of what the engine did
        device.hold(device.driver.in_stream())
        record = next(r for r in _records(offload) if r.residency == Residency.DISK)
        assert store.reloads.prefetch(record) and record.pending_read.reads[0].wait_issued(30)
        del loss, x, record
        assert offload.stats.num_live_records == 0
        assert inside.transport_of(store).pending.reads and not store.reloads._under_way
        device.release(device.driver.in_stream())


@pytest.mark.parametrize("is_drained", [True, False], ids=["drive", "slabs"])
def test_what_backward_got_is_counted_while_its_copies_are_queued(
    make: Make, device: SimulatedDevice, is_drained: bool
) -> None:
    """The process is ahead of the accelerator; the numbers say at once where the bytes came from."""
    offload = make(staging_nbytes=1024 * KIB)
    with device, offload:
        x, loss = layers(16)
        device.synchronize()
        assert inside.transport(offload) is not None
        if is_drained:
            inside.transport(offload).engine.drain()
        device.hold(device.driver.in_stream())
        loss.backward()
        stats = offload.stats
        device.release(device.driver.in_stream())
    assert stats.read_nbytes + stats.forwarded_nbytes >= stats.offloaded_nbytes > 0
    assert not is_drained or stats.read_nbytes > 0
    assert torch.equal(x.grad, grad_of(16))  # type: ignore[arg-type]


def test_what_is_waited_for_gets_the_next_slab(make: Make, device: SimulatedDevice) -> None:
    """Reloads queue for slabs while copies do; the last of them is wanted now."""
    offload = make(staging_nbytes=64 * KIB, prefetch_nbytes=1024 * KIB)
    with device, offload:
        x, loss = layers(32)
        device.synchronize()
        assert inside.transport(offload) is not None
        inside.transport(offload).engine.drain()
        offload.stats  # noqa: B018  takes note of what the engine did
        device.hold(device.driver.in_stream())
        records = [
            r for r in _records(offload) if r.residency == Residency.DISK and inside.reloads(offload).prefetch(r)
        ]
        reads = [record.pending_read.reads[0] for record in records]
        num_staged = settled(lambda: sum(read.moments[1] > 0 for read in reads))
        assert 0 < num_staged < len(reads) - 1
        reads[-1].expedite()
        num_staged = sum(read.moments[1] > 0 for read in reads)  # one more may have begun, on a busy machine
        device.release(device.driver.in_stream())
        assert all(read.wait(30) for read in reads)
        begun = [read.moments[1] for read in reads]
        assert sum(0 < moment < begun[-1] for moment in begun) <= num_staged  # 0: forwarded, it needed no slab
        loss.backward()
    assert torch.equal(x.grad, grad_of(32))  # type: ignore[arg-type]


def settled(count: Callable[[], int]) -> int:
    """What `count` says when it has said so for a while."""
    seen, since = count(), time.monotonic()
    while time.monotonic() - since < 1:
        if (now := count()) != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.01)
    return seen


def test_a_reload_waits_for_its_own_store(make: Make, device: SimulatedDevice) -> None:
    """Megatron#7398: the source was let go in stream order, the copy out has not run, and backward wants the bytes."""
    offload = make(staging_nbytes=512 * KIB)
    with device:
        device.hold(device.driver.out_stream())
        with offload:
            x, loss = layers(40)
            assert any(r.residency == Residency.OFFLOADING and r.storage is None for r in _records(offload))
        loss.backward()
        device.release(device.driver.out_stream())
    assert torch.equal(x.grad, grad_of(40))  # type: ignore[arg-type]


def test_two_streams_take_turns(make: Make, device: SimulatedDevice) -> None:
    """Records of two streams never share a request: each is copied after its own producer."""
    offload = make()
    side = device.new_stream()
    with device, offload:
        x, y = torch.ones(512).requires_grad_(), torch.ones(512).requires_grad_()
        a = x * 1
        device.driver.wait(side, device.driver.record(device.current_stream()))
        with device.stream(side):
            b = y * 1
        for _ in range(24):
            a = (a * 1).tanh()
            with device.stream(side):
                b = (b * 1).tanh()
        device.driver.wait(device.current_stream(), device.driver.record(side))
        (a.sum() + b.sum()).backward()
    assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]


# -- graphs ------------------------------------------------------------------------------------------------------------


def test_a_graph_dropped_while_its_copies_are_queued(make: Make, device: SimulatedDevice) -> None:
    """torchtune#1867: the tensor is gone, its memory is another's, and a stream still reads it."""
    offload = make(staging_nbytes=512 * KIB)
    with device, offload:
        device.hold(device.current_stream())
        x, loss = layers(16)
        del loss, x
        later = [torch.zeros(2048) for _ in range(16)]
        device.release(device.current_stream())
        assert all(not bool(tensor.any()) for tensor in later)


def test_what_a_write_still_reads_is_nobodys_to_keep(make: Make, device: SimulatedDevice) -> None:
    """What outlives its graph twice is somebody's, and left alone from then on. The source of a write that is under way
    outlives it too, and says nothing."""
    offload = make(mode="auto", staging_nbytes=512 * KIB)
    with device:
        for _ in range(4):
            before = offload.stats.num_offloaded
            with offload:
                device.hold(device.current_stream())
                x, loss = layers(16)
                assert offload.stats.num_offloaded > before + 8  # the last ones are yet to set out
                del loss, x
                assert offload.stats.num_live_records == 0
            device.release(device.current_stream())
            device.synchronize()


def test_what_is_still_in_memory_is_forwarded(make: Make, device: SimulatedDevice) -> None:
    offload = make(staging_nbytes=512 * KIB)
    with device, offload:
        device.hold(device.current_stream())
        x, loss = layers(4)
        loss.backward()
        device.release(device.current_stream())
    assert torch.equal(x.grad, grad_of(4))  # type: ignore[arg-type]
    assert offload.stats.read_nbytes == 0


def test_capture_is_left_alone(make: Make, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph replays must not depend on what moved while it was captured."""
    monkeypatch.setattr(device, "why_not", lambda: "CUDA graph capture")
    offload = make()
    monkeypatch.setattr(inside.devices(offload), "of", lambda tensor: device.why_not() or device)
    with device, offload:
        x, loss = layers(8)
        loss.backward()
    assert offload.stats.num_offloaded == 0
    assert offload.stats.skipped["CUDA graph capture"].count > 0
    assert torch.equal(x.grad, grad_of(8))  # type: ignore[arg-type]


# -- the host tier -----------------------------------------------------------------------------------------------------


def test_the_host_tier_holds_what_backward_needs_first(make: Make, device: SimulatedDevice) -> None:
    """The first pass fills it as it comes; the second knows the order and puts the last saved there, the rest on the
    drive."""
    offload = make(host_nbytes=64 * KIB, prefetch_nbytes=16 * KIB)
    with device:
        for _ in range(2):
            with offload:
                x, loss = layers(24)
            device.synchronize()
            homes = ["host" if r.prefers_host else "drive" for r in _records(offload)]
            loss.backward()
            x.grad = None
    sent = [home for home in homes if home]
    assert sent == sorted(sent), "on the drive what comes first, then the host tier"
    assert 4 <= sent.count("host") <= 8
    assert offload.stats.peak_host_nbytes <= 64 * KIB


def _records(offload: ssdtrain.ActivationOffload) -> list[Any]:
    pass_ = inside.thread(offload).pass_
    assert pass_ is not None
    return [record for record in pass_.records if record is not None]


def test_a_full_host_tier_keeps(make: Make, device: SimulatedDevice) -> None:
    """Law 9: bounded. Without a drive behind it, what does not fit stays where it is."""
    offload = make(directory=None, host_nbytes=64 * KIB)
    with device, offload:
        x, loss = layers(24)
        loss.backward()
    stats = offload.stats
    assert torch.equal(x.grad, grad_of(24))  # type: ignore[arg-type]
    assert stats.peak_host_nbytes <= 64 * KIB
    assert stats.skipped["host tier full"].count > 0 and stats.written_nbytes == 0


def test_a_host_tier_alone_is_for_accelerators(make: Make) -> None:
    """Law 11: tensors in host memory would go nowhere."""
    offload = ssdtrain.offload_activations(None, {"min_nbytes": 0, "decline_below_nbytes": 0})
    with offload:
        _x, loss = layers(4)
        loss.backward()
    assert offload.stats.num_offloaded == 0
    assert offload.stats.skipped["in host memory already"].count > 0
    assert offload.stats.engine == "host"


def test_neither_directory_nor_host_tier() -> None:
    with pytest.raises(ValueError, match="directory=None and host_nbytes=0"):
        ssdtrain.offload_activations(None, {"host_nbytes": 0})


# -- faults ------------------------------------------------------------------------------------------------------------


class Breaking:
    """Makes a driver's method fail from the `first`-th call on."""

    def __init__(self, device: SimulatedDevice, name: str, first: int = 1) -> None:
        self.num_calls = 0
        self._lock = threading.Lock()
        right = getattr(device.driver, name)

        def wrong(*args: Any) -> Any:
            with self._lock:
                self.num_calls += 1
                is_broken = self.num_calls >= first
            if is_broken:
                raise RuntimeError("the device is gone")
            return right(*args)

        setattr(device.driver, name, wrong)


def test_a_copy_out_that_fails_leaves_the_bytes_where_they_are(make: Make, device: SimulatedDevice) -> None:
    """Law 2: nothing is lost, training goes on, and the report says so. In mode "auto" the source is held until its
    copy is over, so that it is still there."""
    offload = make(mode="auto")
    Breaking(device, "copy_out", first=3)
    with device, offload:
        x, loss = layers(24)
        device.synchronize()
        loss.backward()
    assert torch.equal(x.grad, grad_of(24))  # type: ignore[arg-type]
    assert any("could not copy tensors out" in text for text in offload.stats.fallbacks)


@pytest.mark.parametrize("tier", ["drive", "host"])
def test_a_copy_in_that_fails_is_raised_in_backward(make: Make, device: SimulatedDevice, tier: str) -> None:
    """Law 2: never zeros, never a hang."""
    offload = make(**TIERS[tier])
    Breaking(device, "copy_in")
    with device:
        with offload:
            x, loss = layers(24)
        device.synchronize()
        with pytest.raises(OSError, match=r"copy to the device: .*the device is gone"):
            loss.backward()
        del loss, x


def test_memory_that_cannot_be_pinned(make: Make, device: SimulatedDevice) -> None:
    """Law 12: pageable memory works, slower, and is named."""
    device.driver.pin = lambda address, nbytes: "host memory is not pinned, copies block"  # type: ignore[method-assign]
    offload = make()
    with device, offload:
        x, loss = layers(24)
        loss.backward()
    assert torch.equal(x.grad, grad_of(24))  # type: ignore[arg-type]
    assert "host memory is not pinned, copies block" in offload.stats.fallbacks


def test_no_device_memory_for_a_prefetch(make: Make, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not needed yet waits; PyTorch's error comes only when backward itself finds no memory."""
    offload = make()
    allocate, num_refused = device.allocate, 0

    def refuse_ahead(nbytes: int, alignment: int, block_nbytes: int) -> Any:
        nonlocal num_refused
        if inside.counters(offload).num_demand_reloads + 1 > num_refused:
            num_refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return allocate(nbytes, alignment, block_nbytes)

    with device:
        with offload:
            x, loss = layers(24)
        device.synchronize()
        prefetch = inside.reloads(offload).prefetch

        def watched(record: Any) -> bool:
            monkeypatch.setattr(device, "allocate", refuse_ahead)
            try:
                return prefetch(record)
            finally:
                monkeypatch.setattr(device, "allocate", allocate)

        monkeypatch.setattr(inside.reloads(offload), "prefetch", watched)
        loss.backward()
    assert num_refused > 0
    assert torch.equal(x.grad, grad_of(24))  # type: ignore[arg-type]


def test_the_python_engine_leaves_accelerators_alone(make: Make, device: SimulatedDevice) -> None:
    offload = make(engine="python")
    with device, offload:
        x, loss = layers(8)
        loss.backward()
    assert offload.stats.num_offloaded == 0
    assert offload.stats.skipped["engine python moves host memory only"].count > 0
    assert torch.equal(x.grad, grad_of(8))  # type: ignore[arg-type]


def test_gated_units_that_share_a_storage(make: Make, device: SimulatedDevice) -> None:
    """A GRU's gates are chunks of one storage with version counters of their own, and are changed in place after
    others were saved: a device must not copy what lies between."""
    offload = make()
    torch.manual_seed(0)
    cell = torch.nn.GRU(16, 16)
    x = torch.randn(5, 3, 16)

    def run() -> list[torch.Tensor]:
        cell.zero_grad()
        out, _ = cell(x)
        F.mse_loss(out, torch.zeros_like(out)).backward()
        return [p.grad.clone() for p in cell.parameters() if p.grad is not None]

    expected = run()
    with device, offload:
        ours = run()
    assert same_bits(ours, expected)
    assert offload.stats.skipped["interleaved with other tensors"].count > 0


def test_staging_is_pinned_while_others_may_use_the_records(
    make: Make, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pinning more of it takes long, and was done with the lock that every hook and every thread of backward takes."""
    monkeypatch.setattr(buffers, "_LEAST_NBYTES", 64 * KIB)
    offload, grow, are_free = make(staging_nbytes=1024 * KIB), Drive.grow_staging, list[bool]()

    def watched(drive: Drive, nbytes: int) -> None:
        mutex = inside.store(offload).lock.mutex

        def look() -> None:
            are_free.append(mutex.acquire(timeout=5))
            if are_free[-1]:
                mutex.release()

        other = threading.Thread(target=look)
        other.start()
        other.join()
        grow(drive, nbytes)

    monkeypatch.setattr(Drive, "grow_staging", watched)
    x = torch.linspace(0, 1, 32 * KIB).requires_grad_()
    with device:
        with offload:
            y = x
            for _ in range(48):
                y = y.sin()
        y.sum().backward()
    assert are_free
    assert all(are_free)
