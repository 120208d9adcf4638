"""Memory that the user sees: what gains nothing when it leaves is left alone, and what weighs something counts."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import inside
import pytest
import torch
import torch.nn.functional as F
from conftest import MakeOffload, gauges
from torch import nn

import ssdtrain

KIB, MIB = 1 << 10, 1 << 20


def blocks(num: int) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(num)])


def gradients(layers: nn.Module, rows: int, context: Any) -> list[torch.Tensor]:
    """Those of a step in a context, from random inputs that `rows` alone decides."""
    layers.zero_grad()
    torch.manual_seed(rows)
    with context:
        layers(torch.randn(rows, 64)).square().sum().backward()
    return [p.grad.clone() for p in layers.parameters() if p.grad is not None]


SMALL = {"min_nbytes": 32 * KIB, "staging_nbytes": MIB, "decline_below_nbytes": 0}


def test_what_the_user_holds_is_left_alone_after_two_steps(tmp_path: Path) -> None:
    """Hidden states kept until the next step are in memory anyway: to write them frees nothing."""
    layers = blocks(8)
    with ssdtrain.offload_activations(tmp_path, policy=SMALL) as offload:
        written = []
        for _ in range(6):
            x = torch.randn(512, 64)
            hidden = [x := layer(x) for layer in layers]
            x.square().sum().backward()
            written.append(offload.stats.offloaded_nbytes)
        del hidden
    held = 512 * 64 * 4
    skipped = offload.stats.skipped["outlives its graph"]
    assert skipped.count >= 4 * 7 and skipped.nbytes >= 4 * 7 * held  # from the third step on
    per_step = [after - before for before, after in itertools.pairwise(written)]
    assert all(nbytes <= 9 * held for nbytes in per_step[2:]), per_step  # GELU's inputs and the first layer's


def test_what_is_held_no_longer_is_offloaded_again(tmp_path: Path) -> None:
    layers = blocks(4)
    with ssdtrain.offload_activations(tmp_path, policy=SMALL | {"min_nbytes": 64 * KIB}) as offload:
        for step in range(300):
            x = torch.randn(512, 64)
            hidden = [x := layer(x) for layer in layers]
            if step >= 4:
                hidden.clear()
            x.square().sum().backward()
        before = offload.stats.skipped["outlives its graph"].count
        for _ in range(4):
            x = torch.randn(512, 64)
            for layer in layers:
                x = layer(x)
            x.square().sum().backward()
        assert offload.stats.skipped["outlives its graph"].count <= before + 4  # what comes out last is held here


class Cast(nn.Module):
    """Computes in bfloat16 with weights that it casts itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(512, 512))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(torch.bfloat16), self.weight.to(torch.bfloat16)).float()


def test_casts_of_weights_by_hand_count_and_are_offloaded(tmp_path: Path) -> None:
    """Nobody keeps such a copy but autograd: it is memory like any other."""
    model = nn.Sequential(*[Cast() for _ in range(4)])
    x = torch.randn(16, 512)
    model(x).square().sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    with ssdtrain.offload_activations(tmp_path, policy=SMALL | {"mode": "all"}) as offload:
        loss = model(x).square().sum()
        assert offload.stats.num_saved >= 3  # the first one's input needs no gradient
        loss.backward()
    assert offload.stats.offloaded_nbytes >= 2 * 512 * 512 * 2
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None and grad is not None and torch.equal(parameter.grad, grad)


def test_the_peak_is_the_highest_of_the_run_and_names_its_step(tmp_path: Path) -> None:
    layers = nn.Sequential(*blocks(8))
    with ssdtrain.offload_activations(tmp_path, policy=SMALL) as offload:
        for rows in (512, 512, 32768, 512, 512):
            layers(torch.randn(rows, 64)).square().sum().backward()
    stats = offload.stats
    assert (stats.peak_memory_step, stats.num_steps) == (3, 5)
    assert stats.last_memory_nbytes < stats.peak_memory_nbytes
    assert stats.peak_device_nbytes <= stats.peak_memory_nbytes
    assert stats.without_nbytes >= 8 * 32768 * 64 * 4
    assert stats.peak_process_nbytes > stats.without_nbytes
    text = str(stats)
    assert "in step 3" in text and "without ssdtrain (estimated)" in text and "last step peak" in text
    assert stats._repr_html_().startswith("<pre>ssdtrain:")


def test_what_the_process_would_take_without_is_estimated(tmp_path: Path) -> None:
    """What is not saved tensors is looked at where freed memory was given back; nothing is said where it never is."""
    layers = nn.Sequential(*blocks(8))
    said = {}
    for when in ("always", "never"):
        with ssdtrain.offload_activations(tmp_path, SMALL | {"trim_memory": when}) as offload:
            for _ in range(3):
                layers(torch.randn(32768, 64)).square().sum().backward()
        said[when] = offload.stats
    assert said["never"].without_process_nbytes == 0 and "estimated without" not in str(said["never"])
    stats = said["always"]
    assert stats.without_process_nbytes > stats.without_nbytes + 100 * MIB, "PyTorch's code is more than that"
    assert stats.without_process_nbytes < stats.peak_process_nbytes + stats.without_nbytes
    assert "at most (estimated without ssdtrain: " in str(stats)


def test_staging_that_the_plan_does_not_need_is_given_back(tmp_path: Path) -> None:
    """Another engine takes its place between two steps; what it wrote still counts."""
    layers, plain = nn.Sequential(*blocks(12)), contextlib.nullcontext()
    expected = gradients(layers, 2048, plain)
    with ssdtrain.offload_activations(tmp_path, {"min_nbytes": 32 * KIB, "decline_below_nbytes": 0}) as offload:
        source, first, written = inside.source(offload), inside.source(offload).store.engine, 0
        for _ in range(40):
            for got, want in zip(gradients(layers, 2048, plain), expected, strict=True):
                assert torch.equal(got, want)
            assert offload.stats.written_nbytes >= written
            written = offload.stats.written_nbytes
            if source.store is not None and source.store.engine is not first:
                break
        assert source.store is not None and source.store.engine is not first, offload.stats
        assert offload.plan is not None and source.buffers.staging_nbytes == 8 * MIB


def test_an_engine_that_rests_again_while_another_thread_opens_it(tmp_path: Path) -> None:
    """A step that is over in one thread, between the opening and its end in another: the next save opens once more."""
    layers, plain = nn.Sequential(*blocks(4)), contextlib.nullcontext()
    with ssdtrain.offload_activations(tmp_path, policy=SMALL) as offload:
        store = inside.store(offload)
        open_, rests = store.open, [True]

        def open_and_rest() -> None:
            open_()
            if rests and rests.pop():
                store._rest()

        store._rest()
        store.open = open_and_rest  # type: ignore[method-assign]
        gradients(layers, 2048, plain)
        assert store.source.store is not None and offload.stats.offloaded_nbytes > 0, offload.stats
        del store.open


def test_an_engine_that_has_bytes_is_not_given_back(tmp_path: Path) -> None:
    """However much of its staging is idle: a graph is alive whose bytes only the drive has."""
    layers, plain = nn.Sequential(*blocks(4)), contextlib.nullcontext()
    expected = gradients(layers, 2048, plain)
    layers.zero_grad()
    torch.manual_seed(2048)
    with ssdtrain.offload_activations(tmp_path, {"min_nbytes": 32 * KIB, "mode": "all"}) as offload:
        loss = layers(torch.randn(2048, 64)).square().sum()
        source, store = inside.source(offload), inside.store(offload)
        engine = source.store.engine
        source.buffers.note_planned(0)
        assert source.has_idle_staging
        gauges(offload)  # waits for the engine
        store.note_step_over()
        assert source.store is not None and source.store.engine is engine
        loss.backward()
        for parameter, want in zip(layers.parameters(), expected, strict=True):
            assert parameter.grad is not None and torch.equal(parameter.grad, want)
        assert offload.stats.read_nbytes > 0
        gauges(offload)
        store.note_step_over()
        assert source.store is None  # it is not needed any more


def test_who_moves_nothing_has_the_peak_of_plain_training(tmp_path: Path) -> None:
    """What stays is in memory as it would be without us, and is stated as such."""
    with ssdtrain.offload_activations(tmp_path, policy={"min_nbytes": "1GiB"}) as offload:
        blocks(4)[0](torch.randn(512, 64)).square().sum().backward()
    stats = offload.stats
    assert stats.peak_memory_nbytes == stats.peak_device_nbytes == stats.without_nbytes > 0


def test_where_little_is_saved_nothing_moves_and_one_line_says_so(tmp_path: Path) -> None:
    layers = nn.Sequential(*blocks(4))
    with ssdtrain.offload_activations(tmp_path, {"min_nbytes": 32 * KIB}) as offload:
        for _ in range(3):
            layers(torch.randn(512, 64)).square().sum().backward()
    stats = offload.stats
    assert stats.num_offloaded == stats.written_nbytes == stats.peak_staging_nbytes == stats.num_live_records == 0
    assert stats.peak_memory_nbytes == stats.without_nbytes > 8 * 512 * 64 * 4
    assert stats.skipped["too little to gain"].count >= 3 * 8
    says = "saved tensors are {:.1f} MiB: nothing to gain; offloading begins to pay at about 320.0 MiB here"
    assert stats.plan == "declined: " + says.format(stats.without_nbytes / MIB)
    assert len(stats.fallbacks) == 1 and says.format(stats.without_nbytes / MIB) in stats.fallbacks[0]


def test_where_all_are_small_that_is_what_is_said(tmp_path: Path) -> None:
    """It is `min_nbytes` that has them stay, not that there are few."""
    with ssdtrain.offload_activations(tmp_path) as offload:
        nn.Sequential(*blocks(4))(torch.randn(16, 64)).square().sum().backward()
    offload.close()
    (text,) = offload.stats.fallbacks
    assert "smaller than min_nbytes" in text and "begins to pay" not in text


@pytest.mark.parametrize("fields", [{"mode": "all"}, {"memory_budget": "32KiB"}, {"decline_below_nbytes": 0}], ids=str)
def test_who_asks_for_it_has_little_move_too(tmp_path: Path, fields: dict[str, Any]) -> None:
    layers = nn.Sequential(*blocks(4))
    with ssdtrain.offload_activations(tmp_path, SMALL | {"decline_below_nbytes": None} | fields) as offload:
        layers(torch.randn(512, 64)).square().sum().backward()
    assert offload.stats.num_offloaded > 0


def test_it_begins_with_the_step_that_saves_enough(make_offload: MakeOffload) -> None:
    """What was put off in that step follows, also what the drive had no room for at once; gradients are the same."""
    limit = 12 * 512 * 64 * 4
    layers = nn.Sequential(*blocks(12))

    fields = {"mode": "auto", "min_nbytes": 32 * KIB, "staging_nbytes": MIB, "decline_below_nbytes": limit}
    offload = make_offload(**fields)
    for rows, moves in ((128, False), (128, False), (1024, True), (128, True)):
        before = offload.stats.num_offloaded
        expected = gradients(layers, rows, torch.enable_grad())
        assert all(map(torch.equal, gradients(layers, rows, offload), expected))
        assert (offload.stats.num_offloaded > before) == moves
    assert "declined" not in offload.stats.plan
    assert offload.stats.skipped["too little to gain"].nbytes < 2 * limit


def test_it_ends_with_the_first_step_where_that_saved_too_little(tmp_path: Path) -> None:
    """Nobody knows before how much a step saves. Then the engine rests, until a step saves more."""
    layers = nn.Sequential(*blocks(16))

    policy = {"min_nbytes": 32 * KIB, "staging_nbytes": MIB, "prefetch_nbytes": MIB}  # pays from 20 MiB on
    offload = ssdtrain.offload_activations(tmp_path, policy)
    offload.keep_open()
    num_offloaded, are_open = [], []
    for rows in (1024, 1024, 1024, 4096, 1024):
        expected = gradients(layers, rows, torch.enable_grad())
        assert all(map(torch.equal, gradients(layers, rows, offload), expected))
        num_offloaded.append(offload.stats.num_offloaded)
        are_open.append(inside.transport(offload) is not None)
    assert 0 < num_offloaded[0] == num_offloaded[1] == num_offloaded[2] < num_offloaded[3] < num_offloaded[4]
    assert are_open == [True, False, False, True, True]
    assert [text for text in offload.stats.fallbacks if "declined: saved tensors are 8." in text]
    offload.close()


@pytest.mark.cpu_only  # a simulated accelerator's memory cannot be resized
def test_what_was_put_off_is_let_go_with_its_graph(make_offload: MakeOffload) -> None:
    """And what is freed behind autograd's back meanwhile does not set out."""
    offload = make_offload(mode="auto", decline_below_nbytes="64KiB")
    with offload:
        first = torch.zeros(1024, requires_grad=True).exp()
        graphs = [torch.zeros(1024, requires_grad=True).exp() for _ in range(8)]
        assert len(inside.put_off(offload)) >= 8
        del graphs
        assert len(inside.put_off(offload)) <= 1
        first.detach().untyped_storage().resize_(0)
        more = [torch.zeros(4096, requires_grad=True).exp() for _ in range(8)]
    assert offload.stats.num_offloaded < 9
    del first, more
    assert not inside.put_off(offload)


def test_what_is_freed_while_it_waits_for_company_does_not_set_out(tmp_path: Path) -> None:
    weight = torch.ones(64 * KIB, requires_grad=True)
    with ssdtrain.offload_activations(tmp_path, {"min_nbytes": KIB, "mode": "all"}):
        inputs = [torch.ones(64 * KIB) for _ in range(28)]
        losses = [(weight * x).sum() for x in inputs[:8]]
        for x in inputs[:6]:
            x.untyped_storage().resize_(0)
        losses += [(weight * x).sum() for x in inputs[8:]]
        for x in inputs[:6]:
            x.untyped_storage().resize_(4 * 64 * KIB)
            x.data.fill_(1.0)
        sum(losses).backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.full((64 * KIB,), 28.0))


def test_what_rests_stays_closed_after_close(tmp_path: Path) -> None:
    layers = nn.Sequential(*blocks(16))
    policy = {"min_nbytes": 32 * KIB, "staging_nbytes": MIB, "prefetch_nbytes": MIB}
    with ssdtrain.offload_activations(tmp_path, policy) as offload:
        offload.close()
        for rows in (512, 4096):
            layers(torch.randn(rows, 64)).square().sum().backward()
        assert inside.transport(offload) is None
    assert offload.stats.num_offloaded == 0
    assert any(text.startswith("closed inside its context") for text in offload.stats.fallbacks)
