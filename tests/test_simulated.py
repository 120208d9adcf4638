"""The simulated accelerator: computes the same, later; hands out memory as an accelerator does; sees missing waits."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from conftest import same_bits
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils.checkpoint import checkpoint

from ssdtrain.simulated import SimulatedDevice, SimulationStuckError, UnorderedAccessError

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
