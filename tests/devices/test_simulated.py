"""The simulated accelerator: computes the same, later; hands out memory as an accelerator does; sees missing waits."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from conftest import same_bits
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils.checkpoint import checkpoint

from ssdtrain.devices.simulated import SimulatedDevice, SimulationStuckError, UnorderedAccessError
from ssdtrain.devices.simulated.streams import Item

MakeDevice = Callable[..., SimulatedDevice]
PAGE = 4096
RUN_AHEAD = [0, 7, 1 << 30]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Teams of threads that spin cost minutes on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def make_device() -> Iterator[MakeDevice]:
    """Makes devices; at the end each runs dry and its thread ends."""
    made: list[SimulatedDevice] = []

    def make(seed: int = 0, **options: float) -> SimulatedDevice:
        made.append(SimulatedDevice(seed, **options))
        return made[-1]

    yield make
    for device in made:
        device.close()
    assert not [t for t in threading.enumerate() if t.name == "ssdtrain-simulated"], "a thread was left behind"


@pytest.fixture
def device(make_device: MakeDevice) -> SimulatedDevice:
    return make_device(timeout_seconds=10.0)


# -- computes the same ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (part.view(batch, length, 4, width // 4).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width)
        x = x + F.dropout(self.out(mixed), 0.1)
        return x + self.mlp(self.norm2(x))


def train_mlp() -> list[torch.Tensor]:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.2), nn.LayerNorm(64), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        loss = F.cross_entropy(model(torch.randn(8, 32)), torch.randint(0, 10, (8,)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [loss.detach(), *model.state_dict().values()]


def train_conv() -> list[torch.Tensor]:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)]
    model = nn.Sequential(*layers, nn.RReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, foreach=True)
    for _ in range(3):
        loss = model(torch.randn(8, 3, 16, 16)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return [loss.detach(), *model.state_dict().values()]


def train_gpt() -> list[torch.Tensor]:
    """Weights are tied; the middle block is recomputed, with its dropout as it was."""
    embedding, blocks = nn.Embedding(50, 32), nn.ModuleList(Block() for _ in range(3))
    parameters = [*embedding.parameters(), *blocks.parameters()]
    for _ in range(2):
        tokens = torch.randint(0, 50, (4, 17))
        x = blocks[0](embedding(tokens[:, :-1]))
        x = blocks[2](checkpoint(blocks[1], x, use_reentrant=False))
        loss = F.cross_entropy((x @ embedding.weight.t()).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        with torch.no_grad():
            for parameter in parameters:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return [loss.detach(), *(p.detach() for p in parameters)]


def seeded(run: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return run()


@pytest.mark.parametrize("run_ahead", RUN_AHEAD)
@pytest.mark.parametrize("run", [train_mlp, train_conv, train_gpt])
def test_training_is_the_same_to_the_bit(make_device: MakeDevice, run: Callable, run_ahead: int) -> None:
    expected = seeded(run)
    with make_device(run_ahead, run_ahead=run_ahead) as device:
        actual = seeded(run)
    assert same_bits(expected, actual)
    assert device.num_allocated_nbytes > 0


def test_generator_moves_in_the_order_of_the_program(device: SimulatedDevice) -> None:
    """Checkpoint saves and restores its state on the host while nothing has run yet."""

    def run() -> list[torch.Tensor]:
        x = F.dropout(torch.randn(100), 0.5)
        state = torch.get_rng_state()
        y = torch.rand_like(x) + torch.randperm(100) + torch.empty(10, 20)[:, ::2].normal_().flatten()
        probabilities = torch.bernoulli(torch.full((100,), 0.3)) + torch.multinomial(torch.ones(100), 100)
        torch.set_rng_state(state)
        return [x, y, probabilities, torch.rand(3, dtype=torch.float64), F.rrelu(x, training=True)]

    expected = seeded(run)
    with device:
        device.hold(device.new_stream())
        actual = seeded(run)
    assert same_bits(expected, actual)


def test_data_on_the_host_is_waited_for(make_device: MakeDevice) -> None:
    with make_device(run_ahead=1 << 30):
        x = torch.arange(10.0)
        x += 1
        assert x.sum().item() == 55.0
        assert x.nonzero().shape == (10, 1)
        assert torch.equal(x[x > 5], torch.tensor([6.0, 7.0, 8.0, 9.0, 10.0]))
        assert not torch.equal(x, x + 1)
        assert torch.unique(x // 5).numel() == 3
        assert (x * 2).tolist() == [2.0 * i for i in range(1, 11)]
        assert repr(x[:2] * 3) == "tensor([3., 6.])"
        assert [part.numel() for part in x.tensor_split(torch.tensor([3, 4]))] == [3, 1, 6]


def test_host_tensor_is_filled_when_the_copy_returns(device: SimulatedDevice) -> None:
    on_host = torch.zeros(8)
    with device:
        on_host.copy_(torch.ones(8) * 3)
        assert ctypes.c_float.from_address(on_host.data_ptr()).value == 3.0
        on_host.copy_(torch.ones(8) * 4, non_blocking=True)
        assert ctypes.c_float.from_address(on_host.data_ptr()).value == 3.0
    assert on_host.tolist() == [4.0] * 8


def test_modes_of_pytorch(device: SimulatedDevice) -> None:
    def run() -> list[torch.Tensor]:
        layer, x = nn.Linear(8, 8), torch.randn(4, 8)
        with torch.inference_mode():
            inferred = layer(x).clone()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = layer(x)
        low.sum().backward()
        complex_ = torch.fft.rfft(x).conj() * 2
        return [inferred.clone(), low.detach(), layer.weight.grad, complex_.resolve_conj(), x.to_sparse().to_dense()]

    expected = seeded(run)
    with device:
        actual = seeded(run)
    assert same_bits(expected, actual)


def test_wrong_arguments_raise_at_the_call(device: SimulatedDevice) -> None:
    with device, pytest.raises(RuntimeError, match="cannot be multiplied"):
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_error_of_queued_work_comes_with_the_next_synchronisation(device: SimulatedDevice) -> None:
    with device:
        F.embedding(torch.tensor([7]), torch.ones(3, 2))
        with pytest.raises(IndexError, match="out of range"):
            device.synchronize()
        device.synchronize()


NOT_COMPARABLE = set(
    "empty_permuted empty_strided new_empty_strided empty empty_like new_empty"  # what they return is not defined
    " cholesky cross stft lu lu_solve qr triangular_solve to_sparse prod"  # warn or need a special loss
    " sparse.sampled_addmm nn.functional.upsample_bilinear nn.functional.upsample_nearest chalf linalg.eig".split()
)
OPERATORS = [
    op
    for op in op_db
    if torch.float64 in op.supported_dtypes("cpu") and op.name not in NOT_COMPARABLE and "jiterator" not in op.name
]


@pytest.mark.parametrize("op", OPERATORS[::12], ids=lambda op: op.formatted_name)
def test_operators_of_pytorch_are_the_same(op, device: SimulatedDevice) -> None:
    """One sample of every twelfth operator, forward and backward."""

    def run() -> list:
        sample = next(iter(op.sample_inputs("cpu", torch.float64, requires_grad=op.supports_autograd)))
        result = op(sample.input, *sample.args, **sample.kwargs)
        leaves = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        wanted = [t for t in leaves if t.requires_grad]
        if wanted:
            inputs = [t for t in torch.utils._pytree.tree_leaves((sample.input, sample.args)) if _is_leaf(t)]
            grads = torch.autograd.grad(wanted, inputs, [torch.ones_like(t) for t in wanted], allow_unused=True)
            leaves += [grad for grad in grads if grad is not None]
        return [t.detach() for t in leaves]

    expected = seeded(run)
    with device:
        actual = seeded(run)
    assert same_bits(expected, actual)


def _is_leaf(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


# -- order -----------------------------------------------------------------------------------------------------------


def kept_on(device: SimulatedDevice, work: Callable[[], object]) -> None:
    """Runs `work` in a thread that does not train, as an engine's threads do not."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def two_streams(device: SimulatedDevice) -> tuple[torch.Tensor, int, int]:
    return torch.ones(1024), device.current_stream(), device.new_stream()


def test_missing_wait_between_compute_streams_names_both(device: SimulatedDevice) -> None:
    with device:
        x, main, side = two_streams(device)
        with device.stream(side):
            with pytest.raises(UnorderedAccessError) as caught:
                x.mul_(2)
            text = str(caught.value)
            assert f"`aten.ones.default` on stream {main}" in text
            assert f"`aten.mul_.Tensor` on stream {side}" in text
            assert f"4096 bytes at {x.data_ptr():#x}" in text
            assert text.count("test_simulated.py:") == 2
            assert f"make stream {side} wait for an event recorded on stream {main}" in text


@pytest.mark.parametrize("how", ["wait", "synchronize", "poll", "over a third stream", "device"])
def test_what_makes_an_order(make_device: MakeDevice, how: str) -> None:
    device = make_device(seed=5)
    driver = device.driver
    with device:
        x, main, side = two_streams(device)
        event = driver.record(main)
        if how == "wait":
            driver.wait(side, event)
        elif how == "synchronize":
            driver.synchronize(event)
        elif how == "poll":
            while not driver.is_complete(event):
                pass
        elif how == "device":
            device.synchronize()
        else:
            driver.wait(driver.in_stream(), event)
            driver.wait(side, driver.record(driver.in_stream()))
        with device.stream(side):
            y = x * 2
    assert torch.equal(y, torch.full((1024,), 2.0))


def test_wait_covers_only_what_was_queued_before_the_event(device: SimulatedDevice) -> None:
    """And an event that is complete says nothing as long as nobody asked."""
    with device:
        x, main, side = two_streams(device)
        device.driver.wait(side, device.driver.record(main))
        x.add_(1)
        with device.stream(side), pytest.raises(UnorderedAccessError, match=r"aten.add_.*writes.*aten.mul.*reads"):
            x * 2


def test_readers_need_no_order_among_themselves_but_the_writer_needs_all(device: SimulatedDevice) -> None:
    with device:
        x, main, side = two_streams(device)
        device.driver.wait(side, device.driver.record(main))
        with device.stream(side):
            a = x * 2
        b = x * 3
        with pytest.raises(
            UnorderedAccessError, match=r"aten.mul.*on stream 3.*reads.*aten.zero_.*on stream 0.*writes"
        ):
            x.zero_()
        device.driver.wait(main, device.driver.record(side))
        x.fill_(5)
    assert torch.equal(a + b, torch.full((1024,), 5.0))


def test_only_bytes_that_overlap_count(device: SimulatedDevice) -> None:
    """Halves, and interleaved columns, of one storage on two streams; then one element in common."""
    with device:
        x, main, side = torch.zeros(8, 32), device.current_stream(), device.new_stream()
        device.driver.wait(side, device.driver.record(main))
        for left, right in [(x[:4], x[4:]), (x[:, :16], x[:, 16:]), (x[:, ::2], x[:, 1::2])]:
            left.add_(1)
            with device.stream(side):
                right.add_(2)
            device.synchronize()
        x.view(-1)[100:200].add_(1)
        with device.stream(side), pytest.raises(UnorderedAccessError, match=r"add_.*add_"):
            x.view(-1)[199:300].add_(1)
    assert x.sum().item() == 8 * 32 * 4.5 + 100


def test_host_accesses_are_checked(device: SimulatedDevice) -> None:
    driver, host = device.driver, ctypes.create_string_buffer(4096)
    address = ctypes.addressof(host)
    with device:
        x = torch.full((1024,), 7.0)
        driver.wait(driver.out_stream(), driver.record(0))
        driver.copy_out(driver.out_stream(), address, x.data_ptr(), 4096)
        copied = driver.record(driver.out_stream())
        with pytest.raises(UnorderedAccessError, match=r"copy_out.*writes.*`pwrite` on the host.*synchronize with"):
            driver.host_read(address + 4000, 96, "pwrite")
        driver.synchronize(copied)
        driver.host_read(address, 4096, "pwrite")
        driver.host_write(address, 4096, "pread")
    assert (ctypes.c_float * 1024).from_buffer(host)[:] == [7.0] * 1024


def test_error_of_an_engine_thread_is_kept_for_the_training_thread(device: SimulatedDevice) -> None:
    with device:
        x = torch.ones(1024)
        for _ in range(2):
            kept_on(device, lambda: device.driver.host_read(x.data_ptr(), 4096, "pwrite"))
        with pytest.raises(UnorderedAccessError, match=r"aten.ones.*`pwrite`"):
            device.check()
        device.check()
        kept_on(device, lambda: device.driver.host_read(x.data_ptr(), 4096, "pwrite"))
        with pytest.raises(UnorderedAccessError, match="pwrite"):
            x.sum().item()
        device.synchronize()


def test_copies_use_memory_of_live_tensors_only(device: SimulatedDevice) -> None:
    host = ctypes.create_string_buffer(8192)
    with device:
        x = torch.ones(1024)
        address = x.data_ptr()
        with pytest.raises(RuntimeError, match="ends before that"):
            device.driver.copy_out(0, ctypes.addressof(host), address, 8192)
        del x
        with pytest.raises(RuntimeError, match=r"live tensor for `copy_out`.*is freed"):
            device.driver.copy_out(0, ctypes.addressof(host), address, 4096)


def test_events_are_handles(device: SimulatedDevice) -> None:
    driver = device.driver
    first = driver.record(0)
    driver.release(first)
    assert driver.record(driver.in_stream()) == first
    assert driver.is_complete(first)
    for use in (driver.synchronize, driver.release, driver.is_complete, lambda event: driver.wait(0, event)):
        with pytest.raises(ValueError, match="Expected an event"):
            use(99)
    with pytest.raises(ValueError, match="Expected the handle of a stream"):
        driver.record(99)
    assert driver.pin(4096, 4096) == ""
    driver.unpin(4096)


# -- time --------------------------------------------------------------------------------------------------------------


def test_held_stream_does_not_run_and_others_do(make_device: MakeDevice) -> None:
    with make_device(run_ahead=0) as device:
        x, main, side = two_streams(device)
        device.synchronize()
        device.hold(main)
        later = x.add(1)
        with device.stream(side):
            device.driver.synchronize(device.driver.record(side))
            y = torch.ones(1024) * 3
            assert y.sum().item() == 3 * 1024
        assert "aten.add.Tensor" in device.describe()
        assert not device.driver.is_complete(device.driver.record(main))
        device.release(main)
    assert torch.equal(later, torch.full((1024,), 2.0))


def test_stuck_simulation_says_what_is_queued(make_device: MakeDevice) -> None:
    device = make_device(timeout_seconds=0.2)
    with device:
        device.hold(0)
        x = torch.ones(8)
        device.driver.wait(1, device.driver.record(0))
        with pytest.raises(SimulationStuckError, match=r"stream 0 compute \(held\): .*aten.ones.*stream 1 out: .*wait"):
            x.sum().item()
        with pytest.raises(SimulationStuckError, match="all streams to end"):
            device.drain()
        device.release(0)


def test_all_that_is_held_is_let_go_at_once(make_device: MakeDevice) -> None:
    with make_device(timeout_seconds=60) as device:
        x, main, side = two_streams(device)
        device.synchronize()
        for stream in (main, side, device.driver.out_stream()):
            device.hold(stream)
        with device.stream(side):
            y = x.add(1)
        device.driver.wait(device.driver.out_stream(), device.driver.record(side))
        device.driver.wait(main, device.driver.record(device.driver.out_stream()))
        device.release()
        assert torch.equal(y, torch.full((1024,), 2.0))


def test_order_of_streams_depends_on_the_seed(make_device: MakeDevice) -> None:
    orders = set()
    for seed in range(8):
        device, order = make_device(seed), []
        for stream in (0, 1, 2):
            for i in range(3):
                device._machine.executor.put(device._machine.stream(stream), _append(order, (stream, i)))
        device.synchronize()
        assert sorted(order) == [(s, i) for s in range(3) for i in range(3)]
        assert all(order.index((s, i)) < order.index((s, i + 1)) for s in range(3) for i in range(2))
        orders.add(tuple(order))
    assert len(orders) > 4


def _append(order: list, what: object) -> Item:
    return Item("append", lambda: order.append(what))


@pytest.mark.parametrize("seed", range(6))
def test_several_compute_streams(make_device: MakeDevice, seed: int) -> None:
    """Two branches on streams of their own, joined before the loss; backward is in one stream."""

    def run(device: SimulatedDevice | None) -> list[torch.Tensor]:
        left, right, x = nn.Linear(16, 16), nn.Linear(16, 16), torch.randn(8, 16)
        if device is None:
            joined = left(x).tanh() + right(x).sigmoid()
        else:
            side, driver = device.new_stream(), device.driver
            driver.wait(side, driver.record(0))
            a = left(x).tanh()
            with device.stream(side):
                b = right(x).sigmoid()
            driver.wait(0, driver.record(side))
            joined = a + b
        joined.square().sum().backward()
        return [joined.detach(), left.weight.grad, right.weight.grad]

    expected = seeded(lambda: run(None))
    with make_device(seed, run_ahead=[0, 3, 1 << 30][seed % 3]) as device:
        actual = seeded(lambda: run(device))
    assert same_bits(expected, actual)


# -- memory ----------------------------------------------------------------------------------------------------------


def test_memory_falls_although_the_host_runs_far_ahead(device: SimulatedDevice) -> None:
    """A chain of 200 tensors of one page each: two are alive at a time, while not one operation has run."""
    with device:
        device.hold(0)
        x = torch.zeros(1024)
        for _ in range(200):
            x = x + 1
        assert device.peak_allocated_nbytes == 2 * PAGE
        assert device.peak_reserved_nbytes == 2 * PAGE
        assert device.num_allocated_nbytes == PAGE
        device.release(0)
    assert torch.equal(x, torch.full((1024,), 200.0))


def test_reuse_is_poisoned_in_stream_order(device: SimulatedDevice) -> None:
    with device:
        x = torch.ones(1024)
        address = x.data_ptr()
        y = x * 2
        del x
        z = torch.empty(1024)
        n = torch.empty(512, dtype=torch.int64)
    assert z.data_ptr() == address
    assert z.isnan().all()
    assert torch.equal(y, torch.full((1024,), 2.0))
    assert (n.view(torch.uint8) == 0xA5).all()


def test_other_streams_do_not_get_the_memory(device: SimulatedDevice) -> None:
    with device:
        x, _, side = two_streams(device)
        address = x.data_ptr()
        del x
        with device.stream(side):
            assert torch.empty(1024).data_ptr() != address
        assert torch.empty(1024).data_ptr() == address


def test_freed_while_another_stream_reads_is_an_error_of_the_reuse(device: SimulatedDevice) -> None:
    with device:
        x, main, side = two_streams(device)
        device.driver.wait(side, device.driver.record(main))
        with device.stream(side):
            y = x * 2
        del x
        with pytest.raises(UnorderedAccessError, match=r"aten.mul.*on stream 3.*reads.*`reuse of a block` on stream 0"):
            torch.empty(1024)
        del y


def test_shared_memory_waits_for_the_other_stream(device: SimulatedDevice) -> None:
    with device:
        x, main, side = two_streams(device)
        address = x.data_ptr()
        device.driver.wait(side, device.driver.record(main))
        device.hold(side)
        with device.stream(side):
            y = x * 2
        device.share(x.untyped_storage(), side)
        del x
        assert device.num_allocated_nbytes == PAGE
        assert torch.empty(1024).data_ptr() != address
        device.release(side)
        device.driver.synchronize(device.driver.record(side))
        kept = [torch.empty(1024), torch.empty(1024)]
        assert address in [t.data_ptr() for t in kept]
    assert torch.equal(y, torch.full((1024,), 2.0))


def test_blocks_are_split_joined_and_given_back(device: SimulatedDevice) -> None:
    with device:
        big = torch.empty(4096)
        address = big.data_ptr()
        del big
        parts = [torch.empty(1024) for _ in range(4)]
        assert sorted(p.data_ptr() for p in parts) == [address + i * PAGE for i in range(4)]
        assert device.idle_nbytes() == 0
        del parts[2], parts[0]
        assert device.idle_nbytes() == 2 * PAGE
        device.trim()
        assert device.idle_nbytes() == 2 * PAGE
        parts.clear()
        again = torch.empty(4096)
        assert again.data_ptr() == address
        del again
        device.trim()
        assert device.idle_nbytes() == 0
        assert device.peak_reserved_nbytes == 4 * PAGE


@pytest.mark.parametrize("nbytes", [1, 511, 512, 4097, 100_000])
@pytest.mark.parametrize("alignment", [512, 4096, 1 << 16])
def test_allocations_for_reloads(device: SimulatedDevice, nbytes: int, alignment: int) -> None:
    with device:
        hold = torch.empty(37)
        allocation = device.allocate(nbytes, alignment, 4096)
        assert allocation.address % alignment == 0
        assert allocation.storage.nbytes() == nbytes
        assert allocation.storage.data_ptr() == allocation.address
        assert allocation.capacity >= nbytes and allocation.capacity % 512 == 0
        device.synchronize()
        assert (torch.empty(0, dtype=torch.uint8).set_(allocation.storage) == 0xFF).all()
        del hold


def test_copies_there_and_back(device: SimulatedDevice) -> None:
    driver, host = device.driver, ctypes.create_string_buffer(PAGE)
    with device:
        x = torch.arange(1024.0)
        driver.wait(1, driver.record(0))
        driver.copy_out(1, ctypes.addressof(host), x.data_ptr(), PAGE)
        driver.wait(2, driver.record(1))
        place = device.allocate(PAGE, 512, 512)
        driver.wait(2, driver.record(0))
        driver.copy_in(2, place.address, ctypes.addressof(host), PAGE)
        driver.wait(0, driver.record(2))
        y = torch.empty(0).set_(place.storage, 0, (1024,), (1,)) + 1
    assert torch.equal(y, torch.arange(1024.0) + 1)


def test_claims(device: SimulatedDevice) -> None:
    outside = torch.ones(2)
    with device:
        inside = torch.ones(2)
        assert device.claims(outside)
        assert not device.claims(torch.ones(2, device="meta"))
    assert device.claims(inside)
    assert not device.claims(outside)
    assert device.why_not() is None
    assert device.kind == "simulated"


# -- life --------------------------------------------------------------------------------------------------------------


def test_memory_outlives_the_device() -> None:
    with SimulatedDevice() as device:
        x = torch.ones(4096) * 2
    device.close()
    gone = weakref.ref(device)
    del device
    assert torch.equal(x, torch.full((4096,), 2.0))
    x += 1
    assert gone() is None or x[0] == 3


def test_graph_dropped_and_exception_in_the_middle(device: SimulatedDevice) -> None:
    class Boom(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ArithmeticError("boom")

    weight = torch.ones(1024, requires_grad=True)
    with device:
        before = device.num_allocated_nbytes
        loss = (weight * 2).exp().sum()
        del loss
        with pytest.raises(ArithmeticError, match="boom"):
            Boom.apply(weight * 2).exp().sum().backward()

    def step_on_held_stream() -> None:
        with device:
            device.hold(0)
            (weight * 2).sum().backward()
            raise KeyError

    with pytest.raises(KeyError):
        step_on_held_stream()
    weight.grad = None
    assert device.num_allocated_nbytes == before == 0


def test_threads_train_side_by_side(make_device: MakeDevice) -> None:
    device = make_device(seed=1, run_ahead=3)

    def run(stream: int, results: list) -> None:
        with device, device.stream(stream):
            x = torch.full((64, 64), 0.5, requires_grad=True)
            for _ in range(5):
                (x @ x).tanh().sum().backward()
        results.append(x.grad)

    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=run, args=(device.new_stream(), results)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    x = torch.full((64, 64), 0.5, requires_grad=True)
    for _ in range(5):
        (x @ x).tanh().sum().backward()
    assert len(results) == 3
    assert all(torch.equal(result, x.grad) for result in results)


def test_marks_for_the_profiler_wait_for_nothing() -> None:
    """They are about what the host does: on an accelerator, too, what is queued stays queued."""
    with SimulatedDevice() as device:
        x = torch.ones(4) * 2
        with torch.profiler.record_function("a phase"):
            assert "aten.mul" in device.describe()
        assert x.tolist() == [2.0] * 4
    device.close()
