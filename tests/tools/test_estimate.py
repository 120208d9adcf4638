"""The estimate of a run: against the sources it is taken from, and against what a real model saves."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from json_outputs import documented
from torch.autograd.graph import saved_tensors_hooks
from typer.testing import CliRunner

import ssdtrain
from ssdtrain.tools.cli import app
from ssdtrain.tools.demo.model import GPT, GPTConfig
from ssdtrain.tools.estimate import (
    GPUS,
    ON_GPU,
    Drives,
    Gpu,
    Host,
    Shape,
    best,
    choices,
    estimate,
    layer_nbytes,
)

GPT3 = {"layers": 96, "hidden": 12288, "heads": 96, "sequence": 2048, "has_flash": False}


def per_sbh(shape: Shape) -> float:
    return layer_nbytes(shape) / (shape.sequence * shape.batch * shape.hidden)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("tp", [1, 8])
def test_activation_bytes_of_korthikanti(tp: int, batch: int) -> None:
    """34 + 5as/h; 10 + 24/t + 5as/(ht); and all of it over t with sequence parallel."""
    scores = 5 * 96 * 2048 / 12288
    assert per_sbh(Shape(**GPT3, tp=tp, batch=batch)) == pytest.approx(10 + 24 / tp + scores / tp)
    parallel = Shape(**GPT3, tp=tp, batch=batch, is_sequence_parallel=True)
    assert per_sbh(parallel) == pytest.approx((34 + scores) / tp)


def test_flash_attention_keeps_no_scores() -> None:
    flash = Shape(**GPT3 | {"has_flash": True})
    assert per_sbh(flash) == pytest.approx(34 + 4 * 96 / 12288)


def test_half_a_million_tokens() -> None:
    """Hidden states of an 8B model at 500k tokens: 122 GiB, which recomputing keeps, and a fifth of a GB/s hides."""
    shape = Shape("llama", hidden=4096, heads=32, kv_heads=8, ffn=14336, vocabulary=128256, sequence=500_000)
    found = estimate(shape, GPUS["H100"], Drives(write_gbs=6.0))
    assert found.inputs_nbytes == 32 * 500_000 * 4096 * 2 == pytest.approx(122 * 2**30, rel=0.01)
    assert found.recompute_nbytes - found.recompute_offload_nbytes == found.inputs_nbytes * 30 / 32
    assert found.inputs_bandwidth == pytest.approx(found.inputs_nbytes / (found.step_seconds * 2 / 3))
    assert found.inputs_bandwidth < 0.25e9
    assert found.recompute_offload_cost == pytest.approx(found.recompute_cost)
    slow = estimate(shape, GPUS["H100"], Drives(write_gbs=found.inputs_bandwidth / 2e9))
    assert slow.recompute_offload_cost == pytest.approx(4 / 3 * 2 - 1)  # half as fast as it would have to be


def test_kinds_differ() -> None:
    """A decoder block of a T5 has a second attention; a Llama no dropout, a third matrix, fewer keys."""
    t5 = Shape("t5", hidden=1024, heads=16)
    assert layer_nbytes(t5, is_decoder=True) > 1.3 * layer_nbytes(t5)
    llama = Shape("llama", layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocabulary=128256)
    found = estimate(llama, GPUS["H100"], Drives())
    assert found.parameters == pytest.approx(7.5e9, rel=0.02)  # 8 B with the output matrix, which is not shared
    assert layer_nbytes(llama) < layer_nbytes(Shape("llama", hidden=4096, heads=32, ffn=14336))


@pytest.mark.parametrize("rate, width, expected", [(100e12, 4096, 23.1), (100e12, 12288, 7.7), (350e12, 8192, 40.4)])
def test_bandwidth_of_the_paper(rate: float, width: int, expected: float) -> None:
    """34 sbh bytes against 24 sbh^2 operations, three times, written in half of the step: 34 F / 36 h.

    The estimate counts the operations of attention too: at 512 tokens they are a fiftieth or less.
    """
    shape = Shape(hidden=width, heads=width // 128, sequence=512, layers=4)
    found = estimate(shape, Gpu("some", rate, 40e9), Drives(), mfu=1.0)
    assert found.needed_bandwidth / 1e9 == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize(
    "factor, days", [(1.0, 4.6), (2.5, 11.5), (2.5 * 86, 2.7 * 365)], ids=["rated", "sequential", "retention of a day"]
)
def test_drive_life_of_the_paper(factor: float, days: float) -> None:
    """Four 1 TB drives rated 600 TBW each, at the paper's largest bandwidth, 12.1 GB/s during half of every step.

    The paper has more than two years. That is so with both of its factors: 2.5, since large sequential writes wear a
    drive less than the random ones of its rating, and 86 for data that are to be kept for one day instead of three
    years. No drive offers the second; by its rating such an array lasts days, which is what the estimate says.
    """
    life = Drives(4, 5.0, tbw=600, wear_factor=factor).life_days(12.1e9 / 2)
    assert life == pytest.approx(days, rel=0.02)


def test_cost_of_wear() -> None:
    drives = Drives(2, 5.0, tbw=864, price=100)
    assert drives.life_days(1e9) == pytest.approx(20)
    assert drives.price_per_day(1e9) == pytest.approx(10)
    assert drives.life_days(0) == float("inf")
    assert Drives(price=3).price_per_day(1e9) is None


def test_peaks_and_what_they_cost() -> None:
    """Keep holds one micro-batch per stage; offloading two blocks; the mix what the drives cannot take."""
    shape = Shape(layers=16, hidden=4096, heads=32, pp=4, micro_batches=8)
    slow, fast = (estimate(shape, GPUS["H100"], Drives(write_gbs=gbs)) for gbs in (10.0, 1000.0))
    assert slow.keep_nbytes == pytest.approx(4 * 4 * slow.layer_nbytes)
    assert slow.offload_nbytes == pytest.approx(2 * slow.layer_nbytes)
    assert fast.hidden_share == 1 and fast.mix_nbytes == fast.offload_nbytes and fast.offload_cost == 0
    assert slow.offload_nbytes < slow.mix_nbytes < slow.keep_nbytes
    assert slow.offload_cost == pytest.approx(slow.needed_bandwidth / 10e9 - 1)
    assert slow.recompute_nbytes < slow.keep_nbytes and slow.recompute_cost == pytest.approx(1 / 3)
    assert slow.step_seconds == pytest.approx(3 * slow.forward_seconds * (8 + 3))


def test_state_is_sharded_as_far_as_was_said() -> None:
    """Without sharding 18 bytes a parameter; the optimizer's 12 over ranks; all over ranks, but for two blocks."""
    states = {}
    for sharding in ("none", "optimizer", "full"):
        found = estimate(Shape(layers=32, dp=8, sharding=sharding), GPUS["H100"], Drives())
        states[sharding] = found.state_nbytes / found.parameters
    assert states["none"] == pytest.approx(18)
    assert states["optimizer"] == pytest.approx(6 + 12 / 8)
    assert states["full"] == pytest.approx(18 / 8 + 2 * 2 / 32)


def test_choices_are_the_cheapest_that_fit_each_with_less_memory() -> None:
    shape, gpu, drives = Shape(hidden=2048, heads=16, batch=8, layers=24), Gpu("some", 165e12, 24e9), Drives(tbw=600)
    found = estimate(shape, gpu, drives)
    some = best(choices(found, drives, Host(64e9)), gpu, 5)
    fit = [choice for choice in some if choice.fits(gpu)]
    assert fit and fit == some[: len(fit)]
    for first, second in itertools.pairwise(fit):
        assert first.cost <= second.cost + 0.01 and second.memory_nbytes < first.memory_nbytes
    assert fit[0].activations == "offload all to host memory" and fit[0].optimizer_state == "host memory"
    assert fit[0].host_nbytes <= 64e9 and fit[0].life_days is None
    assert not [choice for choice in choices(found, drives, Host(1e9)) if choice.host_nbytes > 1e9]
    assert {choice.optimizer_state for choice in choices(found, drives)} == {ON_GPU, "drives"}


def test_one_choice_is_recommended_and_where_nothing_fits_what_would() -> None:
    says = run("--layers", "24", "--width", "2048", "--heads", "16", "--batch", "1", "--tbw", "600").output
    assert "recommended: keep" in says and "nothing needs to be offloaded" in says
    says = run("--layers", "24", "--width", "2048", "--heads", "16", "--batch", "8", "--gpu", "rtx4090").output
    assert "what fits 24 GB here takes +" in says and "--sharding full" in says
    says = " ".join(run("--model", "llama", "--sequence", "500000", "--gpu", "10:8GB").output.split())
    assert "nothing fits 8 GB: the least is" in says and "split the model" in says
    values = documented("plan", run("--json", "--host-memory", "64GB").output)
    assert {"activations", "optimizer_state", "memory_nbytes", "cost", "fits"} <= set(values["choices"][0])
    for words in (("--host-memory", "128"), ("--gpu", "400:48")):
        refused = run(*words)
        assert refused.exit_code == 2 and "without a unit is bytes" in " ".join(refused.output.split())
    assert run("--host-memory", "much").exit_code == 2 and run("--host-gbs", "20").exit_code == 2
    assert run("--sharding", "some").exit_code == 2


def test_a_real_model_saves_what_is_estimated() -> None:
    """The demo's GPT in float32, without dropout: bytes of storages that one more block saves.

    Attention of the CPU keeps its statistics padded; the projection's input is a transposed copy of its result: hence
    a tolerance of a tenth.
    """
    config = {"width": 128, "heads": 4, "sequence": 256}

    def saved_nbytes(layers: int) -> int:
        model = GPT(GPTConfig(layers=layers, **config))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, Any] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storages.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
            return tensor

        tokens = torch.randint(0, 256, (2, 256))
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(tokens, tokens)
        assert loss.requires_grad
        return sum(storage.nbytes() for address, storage in storages.items() if address not in weights)

    shape = Shape(layers=1, hidden=128, heads=4, sequence=256, batch=2, element_nbytes=4, has_dropout=False)
    assert saved_nbytes(3) - saved_nbytes(2) == pytest.approx(layer_nbytes(shape), rel=0.1)


def run(*options: str) -> Any:
    return CliRunner().invoke(app, ["plan", *options])


def test_command() -> None:
    result = run("--hidden", "8192", "--heads", "64", "--drives", "4", "--tbw", "600", "--drive-price", "90")
    assert result.exit_code == 0
    assert "would hide all of it" in result.output and "days of training" in result.output


def test_json_has_every_number() -> None:
    values = documented("plan", run("--json", "--tbw", "600").output)
    assert values["shape"]["hidden"] == 4096 and values["drives"]["tbw"] == 600
    assert values["needed_bandwidth"] > 0 and values["life_days"] > 0 and values["price_per_day"] is None


@pytest.mark.parametrize(
    "options, message",
    [
        (["--heads", "3"], "--width to be a multiple of --heads"),
        (["--tp", "5"], "multiple of --tp"),
        (["--pp", "3"], "multiple of --pp"),
        (["--layers", "0"], "--layers"),
        (["--gpu", "TPU"], "H100"),
        (["--model", "rnn"], "llama"),
        (["--mfu", "2"], "--mfu"),
        (["--drive-gbs", "0"], "--drive-gbs"),
        (["--kv-heads", "5"], "--kv-heads"),
        (["--ffn", "0"], "--ffn of at least 1, got 0"),
    ],
)
def test_bad_numbers(options: list[str], message: str) -> None:
    result = run(*options)
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1


# -- from a recorded run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of a few steps of a small GPT."""
    folder = tmp_path_factory.mktemp("recorded")
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=3, width=64, heads=4, sequence=64))
    tokens = torch.randint(0, 256, (8, 64))
    bounds = {"min_nbytes": "16KiB", "staging_nbytes": "512KiB", "prefetch_nbytes": "512KiB", "decline_below_nbytes": 0}
    policy = bounds | {"record": str(folder / "run.ssdtrain")}
    offload = ssdtrain.offload_activations(folder, policy, model)
    with offload:
        for _ in range(6):
            model.zero_grad()
            model(tokens, tokens).backward()
    offload.close()
    return folder / "run.ssdtrain"


def test_plan_of_a_recorded_step(recorded: Path) -> None:
    """A fast drive takes nearly everything, a slow one next to nothing, and a budget makes training wait for it."""

    def planned(*options: str) -> dict[str, Any]:
        printed = run("--trace", str(recorded), "--json", *options).stdout
        return dict(documented("plan --record RUN", printed))

    fast, slow = planned("--drive-gbs", "20"), planned("--drive-gbs", "0.0001")
    half = str(slow["kept_peak_nbytes"] // 2)
    budget = planned("--drive-gbs", "0.01", "--memory-budget", half, "--tbw", "100")
    assert fast["num_records"] > 10 and fast["num_moved"] > fast["num_records"] / 2
    assert fast["peak_nbytes"] < 0.7 * fast["kept_peak_nbytes"] and fast["stall_seconds"] == 0
    assert slow["num_moved"] <= 1 and slow["stall_seconds"] == 0
    assert budget["stall_seconds"] > 0 and budget["peak_nbytes"] < slow["peak_nbytes"]
    assert budget["drive_life_years"] > 0 and fast["drive_life_years"] is None
    assert "plan:" in run("--trace", str(recorded)).output


def test_no_record(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    for name in ("text", "missing"):
        result = run("--trace", str(tmp_path / name))
        assert result.exit_code == 2 and name in result.stderr
