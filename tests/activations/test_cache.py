"""The tensor cache end to end: real files, real engines, real autograd, equal to the bit."""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import inside
import pytest
import torch
from engine_tools import descriptors, eventually, num_threads
from fault_tools import num_kept_files
from torch.nn import functional as F

import ssdtrain
from ssdtrain.tools.demo.model import GPT, GPTConfig

ENGINES = ["io_uring", "threads", "python"]
KIB = 1024


def gpt(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(layers=3, width=64, heads=2, sequence=64))


def batches(num: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(num):
        tokens = torch.randint(0, 256, (4, 65), generator=generator)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def train(offload: ssdtrain.ActivationOffload | None, steps: int = 3) -> list[torch.Tensor]:
    """Losses and final parameters of a small GPT trained with AdamW."""
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    results = []
    for tokens, targets in batches(steps):
        if offload is None:
            loss = model(tokens, targets)
        else:
            with offload:
                loss = model(tokens, targets)
            to_disk(offload)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        results.append(loss.detach())
    return results + [p.detach() for p in model.parameters()]


def to_disk(offload: ssdtrain.ActivationOffload) -> None:
    """Waits until everything under way is written, so that backward has to read it."""
    transport = inside.transport(offload)
    if transport is not None:
        transport.engine.drain()
    offload.stats  # noqa: B018  takes note of what the engine did


def small_policy(**fields: object) -> dict[str, object]:
    return {
        "min_nbytes": "16KiB",
        "mode": "all",
        "staging_nbytes": "1MiB",
        "prefetch_nbytes": "512KiB",
        "decline_below_nbytes": 0,
    } | fields


@pytest.fixture(scope="module")
def plain() -> list[torch.Tensor]:
    return train(None)


@pytest.mark.parametrize("fields", [{}, {"checksum": True}, {"mode": "auto"}, {"min_nbytes": 0}], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_training_is_equal_to_the_bit(
    tmp_path: Path, plain: list[torch.Tensor], engine: str, fields: dict[str, object]
) -> None:
    """Law 1, over engines and policies: losses and parameters after three AdamW steps."""
    offload = ssdtrain.offload_activations(tmp_path, small_policy(engine=engine, **fields))
    for ours, theirs in zip(train(offload), plain, strict=True):
        assert torch.equal(ours, theirs)
    stats = offload.stats
    assert stats.engine == engine
    assert stats.written_nbytes > 0 and stats.read_nbytes > 0
    assert stats.num_live_records == 0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_several_directories_are_striped(tmp_path: Path, plain: list[torch.Tensor], engine: str) -> None:
    directories = [tmp_path / name for name in ("a", "b", "c")]
    for directory in directories:
        directory.mkdir()
    offload = ssdtrain.offload_activations(directories, small_policy(engine=engine, staging_nbytes="64KiB"))
    with offload:
        x = torch.randn(256, 256, requires_grad=True)
        y = torch.exp(x * 1)
        z = torch.exp(y * 1)
        to_disk(offload)
        transport = inside.transport(offload)
        assert transport is not None
        assert all(extents.in_use_nbytes > 0 for extents in transport.space._extents), "every directory takes part"
        z.sum().backward()
    for ours, theirs in zip(train(offload), plain, strict=True):
        assert torch.equal(ours, theirs)


def test_memory_is_let_go_and_comes_back_shared(tmp_path: Path) -> None:
    """The source is freed once its bytes are safe; the saved tensors of one storage come back on one storage."""
    seen: dict[str, torch.Tensor] = {}

    class Save(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x, x[10:20], x.t(), x.view(torch.int32)[5])
            return x.sum()

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            x, rows, transposed, ints = ctx.saved_tensors
            seen.update(x=x, rows=rows, transposed=transposed, ints=ints)
            return grad.expand(64, 64)

    with ssdtrain.offload_activations(tmp_path, small_policy(min_nbytes=1024)) as offload:
        leaf = torch.randn(64, 64, requires_grad=True)
        source = leaf * 2
        expected = source.detach().clone()
        weak = torch.multiprocessing.reductions.StorageWeakRef(source.untyped_storage())
        total = Save.apply(source)
        del source
        (leaf * 2 + total).exp().exp().detach()  # the next operators let the stores start
        fill(offload)
        to_disk(offload)
        assert weak.expired(), "the source's memory is free"
        total.backward()
    assert torch.equal(seen["x"], expected)
    assert torch.equal(seen["rows"], expected[10:20])
    assert torch.equal(seen["transposed"], expected.t())
    assert torch.equal(seen["ints"], expected.view(torch.int32)[5])
    assert len({t.untyped_storage().data_ptr() for t in seen.values()}) == 1
    assert seen["rows"].storage_offset() == 640 and seen["rows"].stride() == (64, 1)
    assert seen["transposed"].stride() == (1, 64)
    stats = offload.stats
    assert stats.deduplicated_nbytes >= 3 * 64 * 4
    assert stats.read_nbytes > 0


def fill(offload: ssdtrain.ActivationOffload) -> None:
    """Small records wait for neighbours; enough of them send the batch off. (Their graph is dropped at once.)"""
    keep = []
    for _ in range(40):
        x = torch.randn(64, 64, requires_grad=True)
        keep.append((x * 1).exp())
    torch.randn(64, 64, requires_grad=True).exp()


def test_forwarding_serves_from_memory_and_cancels_the_write(tmp_path: Path) -> None:
    """Backward that starts while the bytes are still in memory reads nothing and calls the writes off."""
    with ssdtrain.offload_activations(tmp_path, small_policy(staging_nbytes="64MiB")) as offload:
        x = torch.randn(512, 512, requires_grad=True)
        (x * 1).exp().exp().exp().sum().backward()
    stats = offload.stats
    assert stats.read_nbytes == 0 or stats.forwarded_nbytes > 0
    assert stats.num_live_records == 0


def chain(depth: int, size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """A graph of `depth` saved tensors of size*size*4 bytes whose memory only the graph owns."""
    x = torch.randn(size, size, requires_grad=True)
    y = x * 1
    for _ in range(depth):
        y = torch.sin(y)
    return x, y.sum()


def test_prefetch_stays_within_its_budget_and_hides_reloads(tmp_path: Path) -> None:
    """After the first tensor of backward, reloads begin before they are needed, never beyond the budget."""
    budget = 256 * KIB
    with ssdtrain.offload_activations(tmp_path, small_policy(prefetch_nbytes=budget)) as offload:
        _, loss = chain(24)
        to_disk(offload)
        peak = 0
        counters = inside.counters(offload)
        original = inside.reloads(offload).prefetch

        def spying(record):  # type: ignore[no-untyped-def]
            nonlocal peak
            result = original(record)
            peak = max(peak, counters.prefetched_nbytes)
            return result

        inside.reloads(offload).prefetch = spying  # type: ignore[method-assign]
        loss.backward()
        del inside.reloads(offload).prefetch
    stats = offload.stats
    assert 0 < peak <= budget
    assert stats.num_prefetched >= 20
    assert stats.num_demand_reloads <= 2
    assert counters.prefetched_nbytes == 0


def test_without_prefetch_every_reload_is_on_demand(tmp_path: Path) -> None:
    with ssdtrain.offload_activations(tmp_path, small_policy(prefetch_nbytes=0)) as offload:
        _, loss = chain(12)
        to_disk(offload)
        loss.backward()
    assert offload.stats.num_prefetched == 0
    assert offload.stats.num_demand_reloads >= 10


def test_order_is_learned_from_the_last_step(tmp_path: Path) -> None:
    """Two towers that backward visits in another order than the reverse of forward: the first step guesses by the
    neighbour rule, the second knows."""

    def step() -> None:
        xs = [torch.randn(128, 128, requires_grad=True) for _ in range(2)]
        towers = [x * 1 for x in xs]
        for _ in range(12):  # saved alternately, unpacked one tower after the other
            towers = [torch.sin(t) for t in towers]
        losses = [t.sum() for t in towers]
        del towers
        to_disk(offload)
        for loss in losses:
            loss.backward()

    misses = []
    with ssdtrain.offload_activations(tmp_path, small_policy(prefetch_nbytes=256 * KIB)) as offload:
        for _ in range(3):
            before = offload.stats.num_demand_reloads
            step()
            misses.append(offload.stats.num_demand_reloads - before)
    assert misses[1] <= 2 and misses[2] <= 2, misses


def test_pipeline_micro_batches_are_predicted(tmp_path: Path) -> None:
    """1F1B: two forwards, then backwards and forwards in turn. Each backward stalls at its first tensors only."""
    with ssdtrain.offload_activations(tmp_path, small_policy(prefetch_nbytes=256 * KIB)) as offload:
        pending = [chain(16)[1] for _ in range(2)]
        for i in range(6):
            to_disk(offload)
            before = offload.stats.num_demand_reloads
            pending.pop(0).backward()
            assert offload.stats.num_demand_reloads - before <= 3, f"micro-batch {i}"
            if i < 4:
                pending.append(chain(16)[1])
    assert offload.stats.num_live_records == 0


class CountingEngine:
    """Passes everything on and notes how many pieces each write carries."""

    def __init__(self, engine: object) -> None:
        self.engine = engine
        self.num_pieces: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.engine, name)

    def write(self, file: int, offset: int, nbytes: int, pieces: list[tuple[int, int, int]], producer: None) -> object:
        self.num_pieces.append(len(pieces))
        return self.engine.write(file, offset, nbytes, pieces, producer)  # type: ignore[attr-defined]


def test_neighbouring_small_tensors_go_out_as_one_request(tmp_path: Path) -> None:
    with ssdtrain.offload_activations(tmp_path, small_policy(min_nbytes=0, staging_nbytes="4MiB")) as offload:
        transport = inside.transport(offload)
        assert transport is not None
        spy = CountingEngine(transport.engine)
        transport.pending._engine = spy  # type: ignore[assignment]
        _, loss = chain(300, size=32)  # 4 KiB each, slab 256 KiB
        loss.backward()
    assert len(spy.num_pieces) >= 4
    assert min(spy.num_pieces) >= 32


@pytest.mark.parametrize("engine", ENGINES)
def test_everything_is_freed_at_the_end_of_the_last_graph(tmp_path: Path, engine: str) -> None:
    """Laws 4 and 10: after the with block and the last graph, no thread, named file or record is left, and of spill
    files only the empty one that is kept, although the offload object is alive and can be entered again."""
    train(None, steps=1)  # PyTorch's own threads
    threads = num_threads()
    train(ssdtrain.offload_activations(tmp_path, small_policy(engine=engine)), steps=1)
    gc.collect()
    before = descriptors()
    assert eventually(lambda: num_threads() == threads)
    offload = ssdtrain.offload_activations(tmp_path, small_policy(engine=engine))
    for _ in range(2):
        with offload:
            _, loss = chain(8)
        assert descriptors() - before
        assert os.listdir(tmp_path) == []
        loss.backward()
        del loss, _
        assert len(descriptors() - before) == num_kept_files(offload) == 1
        assert eventually(lambda: num_threads() == threads)
    with offload:
        _, loss = chain(8)
    del loss, _  # a graph that backward never visits
    assert len(descriptors() - before) == num_kept_files(offload) == 1
    assert eventually(lambda: num_threads() == threads)
    assert offload.stats.num_live_records == 0


def test_close_is_final_and_says_so(tmp_path: Path) -> None:
    offload = ssdtrain.offload_activations(tmp_path, small_policy())
    with offload:
        _, loss = chain(8)
    to_disk(offload)
    offload.close()
    offload.close()
    with pytest.raises(RuntimeError, match=r"Expected an open offload.*Call close\(\) after the last backward"):
        loss.backward()
    with pytest.raises(RuntimeError, match="Expected an open offload"), offload:
        pass
    assert "engine" in str(offload.stats)


def test_close_keeps_what_never_left(tmp_path: Path) -> None:
    """Bytes whose source is still held when close() calls the write off are simply kept."""
    offload = ssdtrain.offload_activations(tmp_path, small_policy(staging_nbytes="64KiB"))
    with offload:
        x = torch.randn(256, 256, requires_grad=True)
        y = x * 1
        z = y.sin()
    offload.close()
    z.sum().backward()  # y is alive: it is served from there
    assert torch.equal(x.grad, torch.cos(y.detach()))


def test_disk_bound_holds(tmp_path: Path, plain: list[torch.Tensor]) -> None:
    """Law 9: with spill space for a few tensors only, the rest stays in memory, is counted, and nothing changes."""
    offload = ssdtrain.offload_activations(tmp_path, small_policy(disk_nbytes=256 * KIB))
    for ours, theirs in zip(train(offload), plain, strict=True):
        assert torch.equal(ours, theirs)
    stats = offload.stats
    assert 0 < stats.peak_disk_nbytes <= 256 * KIB
    assert stats.skipped["no spill space"].count > 0
    assert stats.kept_nbytes >= stats.skipped["no spill space"].nbytes


@pytest.mark.parametrize("mode", ["auto", "all"])
def test_staging_bound_holds(tmp_path: Path, plain: list[torch.Tensor], mode: str) -> None:
    """The smallest legal staging: tensors larger than all of it still leave, in pieces."""
    offload = ssdtrain.offload_activations(tmp_path, small_policy(mode=mode, staging_nbytes="64KiB"))
    for ours, theirs in zip(train(offload), plain, strict=True):
        assert torch.equal(ours, theirs)
    stats = offload.stats
    assert stats.peak_staging_nbytes <= 64 * KIB
    assert stats.num_offloaded > 0
    if mode == "all":
        assert stats.kept_nbytes == 0


def test_peak_of_held_bytes_is_small(tmp_path: Path) -> None:
    """What is in memory at once: prefetch budget + staging (sources and slabs) + what the running operator uses."""
    policy = small_policy(staging_nbytes=256 * KIB, prefetch_nbytes=128 * KIB)
    with ssdtrain.offload_activations(tmp_path, policy) as offload:
        _, loss = chain(200)  # 200 x 64 KiB = 12.5 MiB
        to_disk(offload)
        loss.backward()
    bound = 128 * KIB + 2 * 256 * KIB + 4 * 64 * KIB
    assert 64 * KIB <= offload.stats.peak_saved_nbytes <= bound


def test_enabled_false_is_a_null_context(tmp_path: Path) -> None:
    before = descriptors()
    with ssdtrain.offload_activations(tmp_path, ssdtrain.ActivationPolicy(enabled=False)) as offload:
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        _, loss = chain(3)
        loss.backward()
        assert not descriptors() - before
    assert offload.stats.num_saved == 0
    offload.close()


def test_keep_resident_leaves_alone(tmp_path: Path) -> None:
    with ssdtrain.offload_activations(tmp_path, small_policy()) as offload:
        with ssdtrain.keep_resident():
            _, loss = chain(5)
        loss.backward()
    assert offload.stats.num_saved <= 1


def test_model_gives_names_and_marks_buffers(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(128, 128))
            self.inner = torch.nn.Linear(128, 128)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x * self.table).sin()

    net = Net()
    with ssdtrain.offload_activations(tmp_path, small_policy(), model=net) as offload:
        net(torch.randn(128, 128, requires_grad=True))
        y = net(torch.randn(128, 128, requires_grad=True))
        assert offload.stats.skipped["weight"].count >= 2
        wheres = {r.where for r in inside.thread(offload).pass_.records if r is not None}  # type: ignore[union-attr]
        assert " of inner" in wheres
        y.sum().backward()
    assert not net.inner._forward_hooks and not net.inner._forward_pre_hooks


def test_read_error_is_raised_in_backward_with_the_place(tmp_path: Path) -> None:
    """Law 2: a truncated spill file gives an OSError in backward that names record, directory, offset and length."""
    with ssdtrain.offload_activations(tmp_path, small_policy(prefetch_nbytes=0)) as offload:
        _, loss = chain(8)
        to_disk(offload)
        os.ftruncate(inside.drive(offload).files[0].fd, 0)  # type: ignore[union-attr]
        with pytest.raises(OSError, match=r"record \d+ \(float32\[128, 128\].*offset \d+") as caught:
            loss.backward()
        assert caught.value.filename == str(tmp_path) and caught.value.errno
    del loss, _, caught
    assert offload.stats.num_live_records == 0


def test_flipped_bit_is_detected_with_checksum(tmp_path: Path) -> None:
    with ssdtrain.offload_activations(tmp_path, small_policy(prefetch_nbytes=0, checksum=True)) as offload:
        _, loss = chain(8)
        to_disk(offload)
        fd = inside.drive(offload).files[0].fd  # type: ignore[union-attr]
        with open(f"/proc/self/fd/{fd}", "r+b", buffering=0) as file:
            for at in range(0, 8 * 64 * KIB, 64 * KIB):
                file.seek(at + 100)
                byte = file.read(1)
                file.seek(at + 100)
                file.write(bytes([byte[0] ^ 1]))
            os.fsync(file.fileno())
        with pytest.raises(OSError, match="checksum"):
            loss.backward()


def bad_missing(path: Path) -> Path:
    return path / "missing"


def bad_file(path: Path) -> Path:
    (path / "file").write_text("x")
    return path / "file"


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [(bad_missing, FileNotFoundError, "does not exist"), (bad_file, NotADirectoryError, "Expected a directory")],
)
def test_bad_directories_are_refused_before_training(
    tmp_path: Path, make: Callable[[Path], Path], error: type[OSError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        ssdtrain.offload_activations(make(tmp_path))
    assert caught.value.filename


def test_no_directory_or_one_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got none"):
        ssdtrain.offload_activations([])
    with pytest.raises(ValueError, match="twice"):
        ssdtrain.offload_activations([tmp_path, tmp_path / "."])


def test_unwise_directory_is_named(caplog: pytest.LogCaptureFixture) -> None:
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no /dev/shm on this machine")
    with caplog.at_level(logging.WARNING, logger="ssdtrain"):
        offload = ssdtrain.offload_activations("/dev/shm", small_policy())
    assert any("tmpfs" in text and "memory" in text for text in offload.stats.fallbacks)
    assert "tmpfs" in caplog.text
    with offload:
        x, loss = chain(4)
        to_disk(offload)
        loss.backward()
    assert x.grad is not None


def test_threads_train_at_once_with_one_offload(tmp_path: Path) -> None:
    offload = ssdtrain.offload_activations(tmp_path, small_policy())

    def work(model: GPT, context: AbstractContextManager[object], results: list[torch.Tensor]) -> None:
        for tokens, targets in batches(3):
            with context:
                loss = model(tokens, targets)
            loss.backward()
            results += [loss.detach()] + [p.grad.clone() for p in model.parameters()]
            model.zero_grad()

    expected: list[list[torch.Tensor]] = [[], [], []]
    for i in range(3):
        work(gpt(i), nullcontext(), expected[i])
    results: list[list[torch.Tensor]] = [[], [], []]
    threads = [threading.Thread(target=work, args=(gpt(i), offload, results[i])) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(3):
        assert all(torch.equal(a, b) for a, b in zip(results[i], expected[i], strict=True))
    assert offload.stats.num_live_records == 0


def test_dataloader_workers_leave_the_engine_alone(tmp_path: Path, plain: list[torch.Tensor]) -> None:
    """A forked worker inherits the hooks and the engine object; it must neither use nor close them."""

    class Data(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> torch.Tensor:
            x = torch.randn(128, 128, requires_grad=True)
            (x * 1).sin().sum().backward()  # hooks are active in the child
            return torch.tensor(i)

    offload = ssdtrain.offload_activations(tmp_path, small_policy())
    with offload:
        _, loss = chain(8)
        loader = torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context="fork")
        assert sorted(int(i) for i in loader) == [0, 1, 2, 3]
        loss.backward()
    for ours, theirs in zip(train(offload), plain, strict=True):
        assert torch.equal(ours, theirs)


def test_autocast_and_weights_stay(tmp_path: Path) -> None:
    """Law 6: weights, their transposes and autocast's copies of them are recognised and left alone."""
    layer = torch.nn.Linear(128, 128)
    frozen = torch.nn.Linear(128, 128).requires_grad_(False)
    x = torch.randn(4, 128, requires_grad=True)
    with ssdtrain.offload_activations(tmp_path, small_policy()) as offload:
        y = F.relu(frozen(layer(x)))
        assert offload.stats.skipped["weight"].count == 2
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            z = layer(x)
        assert offload.stats.skipped["weight"].count == 3
        (y.sum() + z.sum()).backward()
    assert offload.stats.offloaded_nbytes == 0
