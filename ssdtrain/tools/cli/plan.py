"""`ssdtrain plan`: what a run will need, without running it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ssdtrain.stats import nbytes_text
from ssdtrain.tools.cli.exit_codes import end, one_line
from ssdtrain.tools.cli.names import in_options, not_with, only_with
from ssdtrain.tools.cli.replay import as_values, plan_of
from ssdtrain.tools.cli.screen import show
from ssdtrain.tools.estimate import (
    GPUS,
    KINDS,
    ON_GPU,
    SHARDINGS,
    Choice,
    Drives,
    Estimate,
    Gpu,
    Host,
    Shape,
    best,
    choices,
    estimate,
    gpu_of,
    gpus_that_fit,
    host_of,
)

_OF_A_MODEL = "model layers width heads kv_heads ffn sequence batch micro_batches vocab tp pp dp sharding"
_NUM_CHOICES = 5
_MOST_COST = 1.0  # of the step time, for what is recommended
_OPTIONS = {name: f"--{name.replace('_', '-')}" for name in _OF_A_MODEL.split()} | {
    "hidden": "--width",
    "vocabulary": "--vocab",
    "mfu": "--mfu",
    "num": "--drives",
    "write_gbs": "--drive-gbs",
    "tbw": "--tbw",
    "price": "--drive-price",
    "wear_factor": "--wear-factor",
    "memory_budget": "--memory-budget",
}

Sharding = Annotated[str, typer.Option(help=f"What data parallel ranks share: {', '.join(SHARDINGS)} (FSDP, ZeRO-3).")]
GpuName = Annotated[
    str, typer.Option(help=f"One of {', '.join(GPUS)}; or TFLOP/s and memory of another one, as 400:48GB.")
]
HostMemory = Annotated[str | None, typer.Option(help="Host memory per GPU that may be used, as 128GB: adds choices.")]
DriveReadGbs = Annotated[float | None, typer.Option(help="GB/s read; with --record.", show_default="as written")]


def plan(
    ctx: typer.Context,
    *,
    model: Annotated[str, typer.Option(help=f"One of {', '.join(KINDS)}.")] = "gpt",
    layers: Annotated[int, typer.Option(help="Blocks; of a T5, in the encoder and again in the decoder.")] = 32,
    width: Annotated[int, typer.Option(help="Size of the residual stream (hidden size).")] = 4096,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 32,
    kv_heads: Annotated[int | None, typer.Option(help="Key and value heads of a Llama.")] = None,
    ffn: Annotated[int | None, typer.Option(help="Width of the MLP.", show_default="4 x width; Llama: 8/3")] = None,
    sequence: Annotated[int, typer.Option(help="Tokens per sequence.")] = 2048,
    batch: Annotated[int, typer.Option(help="Sequences per micro-batch and GPU.")] = 1,
    micro_batches: Annotated[int, typer.Option(help="Per step and pipeline.")] = 1,
    vocab: Annotated[int, typer.Option(help="Vocabulary.")] = 50304,
    tp: Annotated[int, typer.Option(help="Tensor parallel size.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages.")] = 1,
    sharding: Sharding = "optimizer",
    dp: Annotated[int, typer.Option(help="Data parallel ranks that share the optimizer state.")] = 1,
    sequence_parallel: Annotated[bool, typer.Option(help="Megatron's sequence parallelism.")] = False,
    flash: Annotated[bool, typer.Option(help="FlashAttention or SDPA.")] = True,
    dropout: Annotated[bool, typer.Option(help="Dropout.")] = True,
    gpu: GpuName = "H100",
    mfu: Annotated[float, typer.Option(help="Share of the peak rate that training reaches.")] = 0.4,
    drives: Annotated[int, typer.Option(help="Drives per GPU.")] = 1,
    drive_gbs: Annotated[float, typer.Option(help="GB/s one drive writes for long; `ssdtrain bench` measures.")] = 6.0,
    host_memory: HostMemory = None,
    host_gbs: Annotated[float, typer.Option(help="GB/s between GPU and host, each way; with --host-memory.")] = 25.0,
    tbw: Annotated[float | None, typer.Option(help="Rated endurance of a drive, terabytes written.")] = None,
    wear_factor: Annotated[float, typer.Option(help="How much more than rated it takes; the paper: 2.5.")] = 1.0,
    drive_price: Annotated[float | None, typer.Option(help="Price of a drive.")] = None,
    record: Annotated[Path | None, typer.Option(help="Plan the step of this run record instead of a model.")] = None,
    drive_read_gbs: DriveReadGbs = None,
    memory_budget: Annotated[str | None, typer.Option(help="As the policy's; with --record.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON and nothing else.")] = False,
) -> None:
    """Estimate memory, bandwidth and drive life of a training.

    With --record: what mode "auto" would make of a recorded step on other drives. Exit code 2: numbers that do not fit
    together, or no run record.
    """
    try:
        _check(ctx)
        own = Drives(drives, drive_gbs, tbw, drive_price, wear_factor)
        if record is not None:
            replayed = plan_of(record, own, drive_read_gbs or drive_gbs, memory_budget)
            print(json.dumps(as_values(replayed)) if as_json else replayed)
            return
        accelerator = gpu_of(gpu)
        sizes = layers, width, heads, kv_heads, ffn, sequence, batch, vocab
        shape = Shape(model, *sizes, tp, pp, dp, sharding, micro_batches, sequence_parallel, flash, dropout)
        found = estimate(shape, accelerator, own, mfu)
        host = host_of(host_memory, host_gbs)
    except (ValueError, OSError) as error:
        end("plan", 2, in_options(" ".join(one_line(error).split()), _OPTIONS))
    _tell(shape, accelerator, own, found, host, mfu, as_json=as_json)


def _check(ctx: typer.Context) -> None:
    """Refuses options that would change nothing.

    Raises:
        ValueError: there is one.
    """
    only_with(ctx, "record", ["drive_read_gbs", "memory_budget"])
    others = "sequence_parallel flash dropout gpu mfu drive_price host_memory".split()
    not_with(ctx, "record", [*_OF_A_MODEL.split(), *others])
    only_with(ctx, "host_memory", ["host_gbs"])
    only_with(ctx, "tbw", ["wear_factor", "drive_price"])


def _tell(
    shape: Shape, gpu: Gpu, drives: Drives, found: Estimate, host: Host | None, mfu: float, *, as_json: bool
) -> None:
    if as_json:
        some = best(choices(found, drives, host), gpu, _NUM_CHOICES)
        listed = [asdict(choice) | {"fits": choice.fits(gpu)} for choice in some]
        inputs = {"shape": asdict(shape), "drives": asdict(drives), "gpu": asdict(gpu)}
        print(json.dumps(inputs | asdict(found) | {"choices": listed}))
    else:
        _print(shape, gpu, drives, found)
        _print_choices(shape, gpu, drives, found, host, mfu)


def _print(shape: Shape, gpu: Gpu, drives: Drives, found: Estimate) -> None:
    show(
        f"{shape.kind}, {found.parameters / 1e9:.1f} B parameters on {shape.tp * shape.pp * shape.dp} x {gpu.name}"
        f" (tp {shape.tp}, pp {shape.pp}, dp {shape.dp}); per GPU:"
    )
    show(f"  activations  {nbytes_text(found.layer_nbytes)} a block, {nbytes_text(found.step_nbytes)} a step")
    show(f"  step         {found.step_seconds:.3g} s, forward of a micro-batch {found.forward_seconds:.3g} s")
    show(f"  state        {nbytes_text(found.state_nbytes)}: parameters, gradients, optimizer")
    who = "1 drive" if drives.num == 1 else f"{drives.num} drives"
    who += f" with {drives.write_bandwidth / 1e9:.1f} GB/s {'hides' if drives.num == 1 else 'hide'}"
    show(f"  bandwidth    {found.needed_bandwidth / 1e9:.1f} GB/s would hide all of it; {who} {found.hidden_share:.0%}")
    show(
        f"  recomputing  {nbytes_text(found.inputs_nbytes)} of inputs of blocks a step; "
        f"{found.inputs_bandwidth / 1e9:.2g} GB/s would hide them"
    )


def _print_choices(shape: Shape, gpu: Gpu, drives: Drives, found: Estimate, host: Host | None, mfu: float) -> None:
    """The best few, and what to do."""
    all_choices = choices(found, drives, host)
    some, room = best(all_choices, gpu, _NUM_CHOICES), f"{gpu.memory_nbytes / 1e9:.0f} GB"
    table = Table("activations", "optimizer", "memory", f"fits {room}", "time", "drive life")
    for choice in some:
        life = "" if choice.life_days is None else _days(choice.life_days)
        fits, memory = "yes" if choice.fits(gpu) else "no", nbytes_text(choice.memory_nbytes)
        table.add_row(choice.activations, choice.optimizer_state, memory, fits, f"+{choice.cost:.0%}", life)
    show(table)
    is_good = some[0].fits(gpu) and some[0].cost <= _MOST_COST
    show(_advice(some[0], room) if is_good else _advice_for_more(some[0], shape, gpu, drives, host, mfu))
    if drives.tbw is None:
        show("--tbw gives the life of drives")
    elif some[0].life_days is not None:
        price = drives.price_per_day(some[0].written_bytes_per_second)
        costs = "" if price is None else f", which costs {price:.2f} a day"
        show(f"drives wear out in {_days(some[0].life_days)} of training{costs}")


def _days(days: float) -> str:
    return f"{days:.0f} days" if days >= 9.5 else f"{days:.1f} days"


def _advice(choice: Choice, room: str) -> str:
    how = f": {choice.how}" if choice.how else ": nothing needs to be offloaded"
    state = "" if choice.optimizer_state == ON_GPU else f", optimizer state to {choice.optimizer_state}"
    return (
        f"recommended: {choice.activations}{state}, {nbytes_text(choice.memory_nbytes)} of {room}, "
        f"+{choice.cost:.0%} of the time{how}"
    )


def _advice_for_more(least: Choice, shape: Shape, gpu: Gpu, drives: Drives, host: Host | None, mfu: float) -> str:
    """Where nothing fits: what would."""
    says = f"nothing fits {gpu.memory_nbytes / 1e9:.0f} GB: the least is {nbytes_text(least.memory_nbytes)}; "
    if least.fits(gpu):
        says = f"what fits {gpu.memory_nbytes / 1e9:.0f} GB here takes +{least.cost:.0%} of the time; "
    found = gpus_that_fit(shape, gpu, drives, host, mfu, _MOST_COST)
    if found is None:
        return f"{says}split the model (--tp, --pp), or take shorter sequences, more drives or --host-memory"
    dp, choice = found
    return (
        f"{says}{dp} data parallel ranks that share all state (--dp {dp} --sharding full) do: {choice.activations}, "
        f"optimizer state {choice.optimizer_state}, {nbytes_text(choice.memory_nbytes)}, +{choice.cost:.0%} of the time"
    )
