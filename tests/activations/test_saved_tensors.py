"""Kinds of saved tensors: what comes back is what was saved, with its dtype, sizes, strides, offset and aliases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import same_bits, send
from torch.nn import functional as F

import ssdtrain

Offload = ssdtrain.ActivationOffload

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.complex32, torch.complex64, torch.complex128, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
]


class Inspect(torch.autograd.Function):
    """Saves what it is given and shows in backward what came back."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, seen: list[Any], *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        ctx.seen = seen
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.seen.append(ctx.saved_tensors)
        return grad, None, *[None] * len(ctx.saved_tensors)


def save_and_reload(offload: Offload, make: Callable[[], list[torch.Tensor]], backwards: int = 1) -> list[Any]:
    """What backward gets of the tensors of `make`, which nobody else holds meanwhile."""
    anchor, seen = torch.zeros(1, requires_grad=True), []
    with offload:
        output = Inspect.apply(anchor, seen, *make())
        send()
        for i in range(backwards):
            output.backward(retain_graph=i + 1 < backwards)
    return seen


def assert_same_views(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours.dtype, ours.layout, ours.device) == (theirs.dtype, theirs.layout, theirs.device)
    assert (ours.is_conj(), ours.is_neg()) == (theirs.is_conj(), theirs.is_neg())
    if not ours.is_nested:  # jagged sizes are symbols, another one for each tensor
        assert ours.size() == theirs.size()
    if ours.layout is torch.strided and not ours.is_nested:
        assert (ours.stride(), ours.storage_offset()) == (theirs.stride(), theirs.storage_offset())
    assert same_bits(ours, theirs)


def random_bytes(numel: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(numel)
    if dtype is torch.bool:
        return torch.randint(2, (numel,), generator=generator).bool()
    return torch.randint(256, (numel * dtype.itemsize,), generator=generator, dtype=torch.uint8).view(dtype)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("numel", [1, 3, 511, 4096, 100_003])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_dtypes_and_sizes(offload: Offload, dtype: torch.dtype, numel: int) -> None:
    """Any bytes, NaN patterns included, below, at and above a block, a slab and all of staging."""
    ((actual,),) = save_and_reload(offload, lambda: [random_bytes(numel, dtype)])
    assert_same_views(actual, random_bytes(numel, dtype))
    assert offload.stats.read_nbytes >= numel * dtype.itemsize


def grid(*size: int) -> torch.Tensor:
    return torch.arange(torch.Size(size).numel(), dtype=torch.float32).reshape(size)


VIEWS: dict[str, Callable[[], torch.Tensor]] = {
    "scalar": lambda: torch.tensor(3.0),
    "transposed": lambda: grid(8, 16).t(),
    "permuted": lambda: grid(3, 4, 5).permute(2, 0, 1),
    "channels last": lambda: grid(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "every third": lambda: grid(64)[::3],
    "a column": lambda: grid(8, 8)[:, 3],
    "an inner block": lambda: grid(8, 8)[2:6, 3:7],
    "the tail": lambda: grid(64)[1:],
    "a small part of a large storage": lambda: grid(1000)[901:907],
    "a strided part of a large storage": lambda: grid(100, 100)[90:92, ::7],
    "an odd byte": lambda: torch.arange(64, dtype=torch.uint8)[3:11],
    "an odd byte far in": lambda: torch.arange(250, dtype=torch.uint8)[201:208],
    "expanded": lambda: grid(1, 8).expand(5, 8),
    "an expanded scalar": lambda: torch.tensor(2.0).expand(3, 4),
    "overlapping": lambda: grid(11).as_strided((4, 4), (2, 1), 1),
    "unfolded": lambda: grid(20).unfold(0, 5, 2),
    "another dtype": lambda: grid(16).view(torch.int64),
    "the real part": lambda: torch.view_as_complex(grid(8, 2)).real,
    "the imaginary part": lambda: torch.view_as_complex(grid(8, 2)).imag,
    "strides of size one": lambda: torch.empty_strided((1, 4), (7, 1)).fill_(3),
    "a diagonal": lambda: grid(6, 6).diagonal(1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views(offload: Offload, name: str) -> None:
    """A rebuilt view with another stride or offset gives the right numbers in the wrong places."""
    ((actual,),) = save_and_reload(offload, lambda: [VIEWS[name]()])
    expected = VIEWS[name]()
    if expected.untyped_storage().nbytes() >= 4 * expected.nbytes:  # only the part it touches was offloaded
        assert (actual.size(), actual.stride()) == (expected.size(), expected.stride())
        assert torch.equal(actual, expected)
    else:
        assert_same_views(actual, expected)
    assert offload.stats.read_nbytes > 0


class Opaque(torch.Tensor):
    """A subclass that does not say what it is made of."""

    @staticmethod
    def __new__(cls, plain: torch.Tensor) -> Opaque:
        return torch.Tensor._make_subclass(cls, plain)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C._DisableTorchDispatch():
            return func(*args, **(kwargs or {}))


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(grid(8), 0.5, 3, torch.quint8)


LEFT_ALONE: dict[str, tuple[str, Callable[[], torch.Tensor]]] = {
    "sparse coo": ("not strided", lambda: torch.eye(4).to_sparse()),
    "sparse csr": ("not strided", lambda: torch.eye(4).to_sparse_csr()),
    "sparse csc": ("not strided", lambda: torch.eye(4).to_sparse_csc()),
    "sparse bsr": ("not strided", lambda: torch.eye(4).to_sparse_bsr((2, 2))),
    "mkldnn": ("not strided", lambda: grid(4, 4).to_mkldnn()),
    "quantised": ("quantised", quantised),
    "conjugate": ("conjugate or negative view", lambda: torch.view_as_complex(grid(8, 2)).conj()),
    "negative": ("conjugate or negative view", lambda: torch.view_as_complex(grid(8, 2)).conj().imag),
    "subclass": ("tensor subclass", lambda: Opaque(grid(8))),
    "no elements": ("empty", lambda: grid(0, 8)),
    "another device": ("device meta", lambda: torch.empty(8, device="meta")),
}


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR)", "ignore:torch.quantize")
@pytest.mark.parametrize("name", LEFT_ALONE)
@pytest.mark.cpu_only
def test_left_alone(offload: Offload, name: str) -> None:
    """What is not understood stays in memory, untouched, and is counted with a reason."""
    reason, make = LEFT_ALONE[name]
    expected = make()
    ((actual,),) = save_and_reload(offload, lambda: [make()])
    assert type(actual) is type(expected)
    if expected.device.type == "meta":
        assert (actual.device, actual.size()) == (expected.device, expected.size())
    else:
        assert_same_views(actual, expected)
    stats = offload.stats
    assert any(reason in key for key in stats.skipped if key != "smaller than min_nbytes"), stats.skipped
    assert stats.num_offloaded <= 5, "what `send` saves, and nothing else"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.cpu_only
def test_sparse_and_nested_gradients_flow(offload: Offload) -> None:
    """They pass through the hooks inside an ordinary graph too."""

    def grads() -> list[torch.Tensor | None]:
        weight = torch.linspace(-1, 1, 16).reshape(4, 4).requires_grad_()
        sparse = torch.eye(4).to_sparse()
        loss = torch.sparse.mm(sparse, weight * 2).sin().sum() + (weight * 1).to_sparse().to_dense().exp().sum()
        nested = torch.nested.as_nested_tensor([weight[:2] * 2, weight * 3])
        loss = loss + torch.nested.to_padded_tensor(F.gelu(nested @ nested.transpose(1, 2)), 0.0).sum()
        send()
        loss.backward()
        return [weight.grad]

    expected = grads()
    with offload:
        assert same_bits(grads(), expected)


def test_complex_gradients(offload: Offload) -> None:
    """Complex operators save conjugates: those stay, the rest is offloaded."""

    def grads() -> list[torch.Tensor | None]:
        x = torch.view_as_complex(grid(8, 2) / 7).requires_grad_()
        y = x * 2
        loss = (y.conj() * y.exp() * y.conj().imag).abs().sum()
        del y
        send()
        loss.backward()
        return [x.grad]

    expected = grads()
    with offload:
        assert same_bits(grads(), expected)
    assert offload.stats.read_nbytes > 0


# -- deduplication -------------------------------------------------------------------------------------------------


def aliases() -> list[torch.Tensor]:
    x = grid(8, 64)
    return [x, x, x.view(64, 8), x.t(), x[3], x[2:4, ::5], x.detach(), x.view(torch.int32), x.expand(2, 8, 64)]


@pytest.mark.parametrize("backwards", [1, 2])
def test_aliases_are_offloaded_once_and_share_again(offload: Offload, backwards: int) -> None:
    """Fused qkv and SwiGLU save several views of one storage: copies would take more memory than they free."""
    shown = save_and_reload(offload, aliases, backwards)
    assert len(shown) == backwards
    for seen in shown:
        assert len({t.untyped_storage().data_ptr() for t in seen}) == 1
        for actual, expected in zip(seen, aliases(), strict=True):
            assert_same_views(actual, expected)
    stats = offload.stats
    assert stats.num_offloaded <= 1 + 5, "one record, and what `send` saves"
    assert stats.deduplicated_nbytes == sum(min(t.nbytes, 2048) for t in aliases()[1:]) - overhang()


def test_data_aliases_are_not_taken_for_each_other(offload: Offload) -> None:
    """`x.data` has a version counter of its own: saved again after `x` was changed, its number is the same, its bytes
    are not. Filing by the number alone hands out the bytes from before the change."""
    w = torch.ones(3000, requires_grad=True)
    with offload:
        x = torch.arange(3000.0) * 1
        before = (w * x.data).sum()
        send()
        x.mul_(2)
        after = (w * x.data).sum()
        del x
        send()
    assert torch.equal(torch.autograd.grad(after, w)[0], torch.arange(3000.0) * 2)
    assert torch.equal(torch.autograd.grad(before, w)[0], torch.arange(3000.0))


def overhang() -> int:
    """Bytes of a strided view are counted from its first to its last: less here than the row it lies in."""
    part = aliases()[5]
    touched = 4 * (1 + sum((n - 1) * s for n, s in zip(part.size(), part.stride(), strict=True)))
    return part.nbytes - touched


def test_versions_are_different_records(offload: Offload) -> None:
    """One address, two contents: filing by address alone would hand the second out for the first."""
    anchor, seen = torch.zeros(1, requires_grad=True), []
    with offload:
        x = torch.ones(1024)
        first = Inspect.apply(anchor, seen, x)
        x.add_(1)
        second = Inspect.apply(anchor, seen, x)
        assert offload.stats.num_live_records == 2
        del x
        send()
        second.backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            first.backward()
    assert torch.equal(seen[0][0], torch.full((1024,), 2.0))


def test_an_address_used_again_is_another_storage(offload: Offload) -> None:
    """Allocators hand freed addresses out at once; the record of the dead storage must not be found for the new one."""
    anchor, seen, outputs = torch.zeros(1, requires_grad=True), [], []
    with offload:
        for i in range(50):
            outputs.append(Inspect.apply(anchor, seen, torch.full((1024,), float(i))))
            send()
        assert offload.stats.num_live_records == 50
        for output in outputs:
            output.backward()
    assert [int(x[0]) for (x,) in seen] == list(range(50))


def test_the_users_own_tensor_is_not_read_back(offload: Offload) -> None:
    """A source still held when backward asks serves it: no read, and no second copy in memory."""
    anchor, seen, held = torch.zeros(1, requires_grad=True), [], grid(64, 64)
    with offload:
        output = Inspect.apply(anchor, seen, held)
        send()
        output.backward()
    assert seen[0][0].data_ptr() == held.data_ptr()
    assert offload.stats.read_nbytes == 0


@pytest.mark.cpu_only
def test_a_storage_emptied_after_forward(offload: Offload) -> None:
    """FSDP frees a storage by resizing it to nothing and fills it again before backward; the saved bytes come back
    whether it is filled or not."""
    anchor, seen, held = torch.zeros(1, requires_grad=True), [], grid(64, 64)
    with offload:
        output = Inspect.apply(anchor, seen, held)
        send()
        held.untyped_storage().resize_(0)
        output.backward(retain_graph=True)
        held.untyped_storage().resize_(64 * 64 * 4)
        held.data.copy_(grid(64, 64))
        output.backward()
    assert all(torch.equal(x, grid(64, 64)) for (x,) in seen)


def test_memory_is_released_once_written(offload: Offload) -> None:
    """The point of it all: the source is gone from memory although its graph is alive."""
    anchor, seen, x = torch.zeros(1, requires_grad=True), [], grid(64, 64)
    source = torch.multiprocessing.reductions.StorageWeakRef(x.untyped_storage())
    with offload:
        output = Inspect.apply(anchor, seen, x)
        del x
        assert not source.expired()
        send()
        assert offload.stats.num_live_records == 1
        assert source.expired()
        output.backward()
    assert torch.equal(seen[0][0], grid(64, 64))
