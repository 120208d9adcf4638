"""The stand-in does what CUDA does where the tests beside rely on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from standin_tools import gates
from torch.utils.checkpoint import checkpoint


def test_streams_run_beside_each_other_and_events_order_them(gates: Any) -> None:
    side, x = torch.cuda.Stream(), torch.zeros(8, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    gate = gates()  # of the current stream
    x.fill_(1)
    with torch.cuda.stream(side):
        early = x + 0
    side.synchronize()
    assert not torch.cuda.current_stream().query()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = x + 0
    gate.open()
    torch.cuda.synchronize()
    assert (early.tolist(), late.tolist()) == ([0.0] * 8, [1.0] * 8)


def test_a_wait_is_for_what_was_recorded_whatever_becomes_of_the_event(gates: Any) -> None:
    """The engine hands an event on as soon as a stream waits for it: others may record it before it is reached."""
    side, third, x = torch.cuda.Stream(), torch.cuda.Stream(), torch.zeros(8, device="cuda")
    torch.cuda.synchronize()
    gate, event = gates(), torch.cuda.Event()  # of the current stream
    x.fill_(1)
    event.record()
    side.wait_event(event)
    event.record(third)
    event.synchronize()
    with torch.cuda.stream(side):
        late = x + 0
    until = time.monotonic() + 0.2
    while not side.query() and time.monotonic() < until:
        pass
    assert not side.query()
    gate.open()
    torch.cuda.synchronize()
    assert late.tolist() == [1.0] * 8


def test_an_event_of_another_thread_breaks_a_global_capture() -> None:
    event = torch.cuda.Event()
    event.record()
    torch.cuda.synchronize()
    seen: list[str] = []

    def ask() -> None:
        try:
            event.query()
        except RuntimeError as error:
            seen.append(str(error))

    def capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()

    with torch.cuda.stream(torch.cuda.current_stream()):  # which `torch.cuda.graph` does not go back to after an error
        with pytest.raises(RuntimeError, match="previous error during capture"):
            capture()
    assert "not permitted when stream is capturing" in seen[0]


def test_an_event_of_another_thread_is_nothing_to_a_local_capture() -> None:
    event, x, graph = torch.cuda.Event(), torch.zeros(8, device="cuda"), torch.cuda.CUDAGraph()
    event.record()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        x.add_(1)
        thread = threading.Thread(target=event.query)
        thread.start()
        thread.join()
    graph.replay()
    assert x.tolist() == [1.0] * 8


def test_freed_memory_serves_the_next_allocation_of_its_stream_only() -> None:
    side = torch.cuda.Stream()
    x = torch.empty(3 << 20, dtype=torch.uint8, device="cuda")
    address = x.data_ptr()
    del x
    with torch.cuda.stream(side):
        assert torch.empty(3 << 20, dtype=torch.uint8, device="cuda").data_ptr() != address
    assert torch.empty(3 << 20, dtype=torch.uint8, device="cuda").data_ptr() == address


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_cells_are_those_of_the_cpu(kind: str) -> None:
    torch.manual_seed(0)
    there = getattr(torch.nn, kind)(8, 4)
    here = getattr(torch.nn, kind)(8, 4).cuda()
    here.load_state_dict(there.state_dict())
    x = torch.randn(3, 2, 8)
    there(x)[0].square().sum().backward()
    here(x.cuda())[0].square().sum().backward()
    for ours, theirs in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad)


def test_dropout_draws_from_the_state_that_is_set() -> None:
    x = torch.ones(1000, device="cuda", requires_grad=True)
    state = torch.cuda.get_rng_state()
    first = F.dropout(x, 0.25)
    second = F.dropout(x, 0.25)
    torch.cuda.set_rng_state(state)
    again = F.dropout(x, 0.25)
    assert torch.equal(first, again) and not torch.equal(first, second)
    again.sum().backward()
    assert torch.equal(x.grad, again.detach())
    assert 0.15 < (again == 0).float().mean().item() < 0.35


LAYERS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "attention": (lambda: SelfAttention(16, 4, batch_first=True), (2, 5, 16)),
    "encoder": (lambda: torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0), (5, 2, 16)),
    "convolution": (lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)), (2, 3, 8, 8)),
}


class SelfAttention(torch.nn.MultiheadAttention):
    """Of a sequence with itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        result: torch.Tensor = super().forward(x, x, x)[0]
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_those_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    make_layer, shape = LAYERS[name]
    torch.manual_seed(0)
    there, x = make_layer().to(dtype), torch.randn(shape).to(dtype)
    here = make_layer().cuda().to(dtype)
    here.load_state_dict(there.state_dict())
    ours, theirs = here(x.cuda()), there(x)
    tolerance = {"rtol": 0.1, "atol": 0.1} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(ours.cpu(), theirs, **tolerance)
    ours.float().square().mean().backward(), theirs.float().square().mean().backward()
    for left, right in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(left.grad.cpu(), right.grad, **tolerance)


def test_bags_and_connectionist_loss_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    numbers, table = torch.randint(0, 10, (3, 4)), torch.randn(10, 5, requires_grad=True)
    targets, lengths = torch.randint(1, 5, (3, 2)), (torch.tensor([3, 3, 3]), torch.tensor([2, 2, 2]))
    grads = []
    for device in ("cpu", "cuda"):
        weight = table.detach().to(device).requires_grad_()
        bags = F.embedding_bag(numbers.to(device), weight)
        steps = torch.stack([bags, bags * 2, bags * 3]).log_softmax(-1)
        F.ctc_loss(steps, targets.to(device), *lengths).backward()
        grads.append(weight.grad.cpu())
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("is_reentrant", [True, False])
def test_a_checkpoint_draws_what_its_forward_drew(is_reentrant: bool) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.5), torch.nn.GELU()).cuda()
    grads = []
    for recomputes in (False, True):
        torch.manual_seed(3)
        x = torch.linspace(-1, 1, 64 * 64, device="cuda").view(64, 64).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=is_reentrant) if recomputes else layer(x)
        y.square().sum().backward()
        grads.append(x.grad.cpu())
    assert torch.equal(*grads)
