"""`ssdtrain bench`: what can this drive do?"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from ssdtrain.io.files.directories import check_directories
from ssdtrain.io.files.paths import absolute_path, fill_in
from ssdtrain.stats import nbytes_text
from ssdtrain.tools.bench import Advice, Options, Report, Row, advise, bench_drive
from ssdtrain.tools.cli.exit_codes import end, one_line
from ssdtrain.tools.cli.names import nbytes_of, not_with
from ssdtrain.tools.cli.screen import show

_QUICK = Options(64 << 20, 1 << 30, 1.0, (1 << 20, 4 << 20), (1, 8), 3)
_PIN_NBYTES = 256 << 20
_LEAST = 8 << 20  # of a file and of what is written
_MOST_SHARE = 1.1  # what passes that are taken in turn may differ by
_NOISE = (
    "noise: the drive was slower while its ceiling was measured, beside and in turn, than while ssdtrain used it."
    " Something else uses it, or it is a virtual one with a limit: no share can be told."
)


def bench(
    ctx: typer.Context,
    directory: Annotated[str, typer.Argument(help="Folder on the drive.")],
    *,
    size: Annotated[str, typer.Option(help="Size of the file.")] = "512MiB",
    total: Annotated[str, typer.Option(help="Most that the sustained pass writes.")] = "16GiB",
    seconds: Annotated[float, typer.Option(min=0.1, help="Most time that the sustained pass takes.")] = 20.0,
    quick: Annotated[bool, typer.Option("--quick", help="A few seconds; rough numbers.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON and nothing else.")] = False,
) -> None:
    """Measure a drive through the engines that training uses.

    Beside its own ceiling, in turn. Writes up to --size and --total and leaves nothing behind. Exit code 1: the
    drive failed.
    """
    try:
        not_with(ctx, "quick", ["size", "total", "seconds"])
        options = (
            _QUICK
            if quick
            else Options(nbytes_of("--size", size, _LEAST), nbytes_of("--total", total, _LEAST), seconds)
        )
        path = absolute_path(fill_in(directory), "a directory")
        warnings = check_directories([path])
    except (ValueError, OSError) as error:
        end("bench", 2, one_line(error))
    try:
        report = _measure(path, options)
    except OSError as error:
        end("bench", 1, str(error))
    except KeyboardInterrupt:
        end("bench", 130, "interrupted; nothing is left behind")
    advice = advise(report)
    copies = _copy_gbs()
    if as_json:
        speeds = {"steady_gbs": report.steady_gbs, "pinned_copy_gbs": copies, "warnings": warnings}
        print(json.dumps(asdict(report) | asdict(advice) | speeds))
    else:
        _print(report, advice, copies, warnings)


def _measure(directory: str, options: Options) -> Report:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        return bench_drive(directory, options, lambda text, done: bar.update(task, description=text, completed=done))


def _copy_gbs() -> dict[str, float]:
    """GB/s between GPU and pinned memory; empty without a GPU."""
    import torch  # seconds, which the other commands need not wait

    if not torch.cuda.is_available():
        return {}
    host = torch.empty(_PIN_NBYTES, dtype=torch.uint8, pin_memory=True)
    gpu = torch.empty(_PIN_NBYTES, dtype=torch.uint8, device="cuda")
    speeds = {}
    for name, target, source in (("out", host, gpu), ("in", gpu, host)):
        target.copy_(source, non_blocking=True)
        begin, finish = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(4):
            target.copy_(source, non_blocking=True)
        finish.record()
        finish.synchronize()
        speeds[name] = 4 * _PIN_NBYTES / 1e6 / begin.elapsed_time(finish)
    return speeds


def _print(report: Report, advice: Advice, copies: dict[str, float], warnings: list[str]) -> None:
    table = Table("request", "depth", "write GB/s", "of ceiling", "read GB/s", "of ceiling", "write ms", "read ms")
    for row in report.rows:
        cells = (nbytes_text(row.request_nbytes), str(row.depth))
        write = f"{row.write_gbs:.2f}", _share(row.write_gbs, row.write_ceiling_gbs)
        read = f"{row.read_gbs:.2f}", _share(row.read_gbs, row.read_ceiling_gbs)
        table.add_row(*cells, *write, *read, f"{1e3 * row.write_seconds:.2f}", f"{1e3 * row.read_seconds:.2f}")
    first = report.sustained_gbs[0] if report.sustained_gbs else 0.0
    show(
        *[f"Warning: {warning}" for warning in warnings],
        f"{report.directory}: engine {report.engine} ({report.engine_reason}); ceiling by {report.ceiling}",
        table,
        *([_NOISE] if any(map(_is_noisy, report.rows)) else []),
        f"written on and on, {nbytes_text(report.sustained_written_nbytes)}: {first:.2f} GB/s at first,"
        f" {report.steady_gbs:.2f} GB/s in the long run; both ways at once {report.mixed_gbs:.2f} GB/s each",
        *[f"copies {way} of GPU memory, pinned: {speed:.1f} GB/s" for way, speed in copies.items()],
        f"This drive hides {advice.hidden_gb_per_forward_second:.2f} GB of activations per second of forward:"
        f" {advice.explanation}.",
        f"Settings: {json.dumps(advice.policy)}",
    )


def _share(gbs: float, ceiling_gbs: float) -> str:
    """Of the ceiling; nothing exceeds that, so a share above it says only that the drive was busy meanwhile."""
    share = gbs / ceiling_gbs
    return "noise" if share > _MOST_SHARE else f"{min(share, 1.0):.0%}"


def _is_noisy(row: Row) -> bool:
    return row.write_gbs > _MOST_SHARE * row.write_ceiling_gbs or row.read_gbs > _MOST_SHARE * row.read_ceiling_gbs
