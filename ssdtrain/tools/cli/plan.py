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
from ssdtrain.tools.estimate import GPUS, KINDS, Drives, Estimate, Gpu, Shape, estimate, gpu_of

_OF_A_MODEL = "model layers width heads kv_heads ffn sequence batch micro_batches vocab tp pp dp sequence_parallel"
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
    dp: Annotated[int, typer.Option(help="Data parallel ranks that share the optimizer state.")] = 1,
    sequence_parallel: Annotated[bool, typer.Option(help="Megatron's sequence parallelism.")] = False,
    flash: Annotated[bool, typer.Option(help="FlashAttention or SDPA.")] = True,
    dropout: Annotated[bool, typer.Option(help="Dropout.")] = True,
    gpu: Annotated[
        str, typer.Option(help=f"One of {', '.join(GPUS)}; or TFLOP/s and memory of another one, as 400:48GB.")
    ] = "H100",
    mfu: Annotated[float, typer.Option(help="Share of the peak rate that training reaches.")] = 0.4,
    drives: Annotated[int, typer.Option(help="Drives per GPU.")] = 1,
    drive_gbs: Annotated[float, typer.Option(help="GB/s one drive writes for long; `ssdtrain bench` measures.")] = 6.0,
    tbw: Annotated[float | None, typer.Option(help="Rated endurance of a drive, terabytes written.")] = None,
    wear_factor: Annotated[float, typer.Option(help="How much more than rated it takes; the paper: 2.5.")] = 1.0,
    drive_price: Annotated[float | None, typer.Option(help="Price of a drive.")] = None,
    record: Annotated[Path | None, typer.Option(help="Plan the step of this run record instead of a model.")] = None,
    drive_read_gbs: Annotated[
        float | None, typer.Option(help="GB/s read; with --record.", show_default="as written")
    ] = None,
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
        shape = Shape(model, *sizes, tp, pp, dp, micro_batches, sequence_parallel, flash, dropout)
        found = estimate(shape, accelerator, own, mfu)
    except (ValueError, OSError) as error:
        end("plan", 2, in_options(" ".join(one_line(error).split()), _OPTIONS))
    if as_json:
        print(json.dumps({"shape": asdict(shape), "drives": asdict(own), "gpu": asdict(accelerator)} | asdict(found)))
    else:
        _print(shape, accelerator, own, found)


def _check(ctx: typer.Context) -> None:
    """Refuses options that would change nothing.

    Raises:
        ValueError: there is one.
    """
    only_with(ctx, "record", ["drive_read_gbs", "memory_budget"])
    not_with(ctx, "record", [*_OF_A_MODEL.split(), "flash", "dropout", "gpu", "mfu", "drive_price"])
    only_with(ctx, "tbw", ["wear_factor", "drive_price"])


def _print(shape: Shape, gpu: Gpu, drives: Drives, found: Estimate) -> None:
    show(
        f"{shape.kind}, {found.parameters / 1e9:.1f} B parameters on {shape.tp * shape.pp * shape.dp} x {gpu.name}"
        f" (tp {shape.tp}, pp {shape.pp}, dp {shape.dp}); per GPU:"
    )
    show(f"  activations  {nbytes_text(found.layer_nbytes)} a block, {nbytes_text(found.step_nbytes)} a step")
    show(f"  step         {found.step_seconds:.3g} s, forward of a micro-batch {found.forward_seconds:.3g} s")
    show(f"  state        {nbytes_text(found.state_nbytes)}: parameters, gradients, optimizer")
    show(
        f"  bandwidth    {found.needed_bandwidth / 1e9:.1f} GB/s would hide all of it; {drives.num} drive(s) with "
        f"{drives.write_bandwidth / 1e9:.1f} GB/s hide {found.hidden_share:.0%}"
    )
    show(
        f"  recomputing  {nbytes_text(found.inputs_nbytes)} of inputs of blocks a step; "
        f"{found.inputs_bandwidth / 1e9:.2g} GB/s would hide them"
    )
    table = Table("activations", "peak", "with state", f"fits {gpu.memory_nbytes / 1e9:.0f} GB", "time")
    for name, nbytes, cost in (
        ("keep", found.keep_nbytes, 0.0),
        ("recompute", found.recompute_nbytes, found.recompute_cost),
        ("recompute, offload inputs", found.recompute_offload_nbytes, found.recompute_offload_cost),
        ("offload all", found.offload_nbytes, found.offload_cost),
        ("offload what hides", found.mix_nbytes, 0.0),
    ):
        total = nbytes + found.state_nbytes
        fits = "yes" if total <= gpu.memory_nbytes else "no"
        table.add_row(name, nbytes_text(nbytes), nbytes_text(total), fits, f"+{cost:.0%}")
    show(table)
    average = f"{found.written_bytes_per_second / 1e9:.2f} GB/s written on average"
    if found.life_days is None:
        show(f"{average}; --tbw gives the drive's life")
        return
    price = "" if found.price_per_day is None else f", which costs {found.price_per_day:.2f} a day"
    show(f"{average} wear the drive(s) out in {found.life_days:.0f} days of training{price}")
