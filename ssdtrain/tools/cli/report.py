"""`ssdtrain report`: a recorded run as a page, as JSON, as a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ssdtrain.report import compare
from ssdtrain.report.data import describe
from ssdtrain.report.page import render
from ssdtrain.report.perfetto import chrome_trace
from ssdtrain.run_log import RecordError, read_run
from ssdtrain.tools.cli.exit_codes import end


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="The record: what record=... of offload_activations wrote. Two are compared."),
    ],
    *,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the page here.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a trace for ui.perfetto.dev here.")] = None,
    json_line: Annotated[bool, typer.Option("--json", help="Print every number of the page as one JSON.")] = False,
) -> None:
    """Show what a run did, or compare two: headline, page, trace, JSON.

    Exit code 2: the record cannot be read, or an output not be written.
    """
    if len(runs) > 1:
        _beside(runs, output, trace, json_line)
        return
    try:
        recorded = read_run(runs[0])
        described = describe(recorded)
        if output is not None:
            output.write_text(render(described), encoding="utf-8", errors="backslashreplace")
        if trace is not None:
            trace.write_text(
                json.dumps(chrome_trace(recorded), separators=(",", ":")), encoding="utf-8", errors="backslashreplace"
            )
    except (RecordError, OSError, ImportError) as error:
        end("report", 2, " ".join(str(error).split()))
    if json_line:
        print(json.dumps(described))
    else:
        _say(described, output, trace)


def _beside(paths: list[Path], output: Path | None, trace: Path | None, json_line: bool) -> None:
    """Two runs."""
    if len(paths) > 2 or trace is not None:
        got = "--trace beside two" if len(paths) == 2 else f"{len(paths)}"
        end("report", 2, f"Expected one record, or two without --trace, got {got}")
    try:
        described = [describe(read_run(path)) for path in paths]
        rows = compare.compare(described[0], described[1])
        if output is not None:
            output.write_text(
                compare.page(rows, [path.name for path in paths]), encoding="utf-8", errors="backslashreplace"
            )
    except (RecordError, OSError) as error:
        end("report", 2, " ".join(str(error).split()))
    if json_line:
        print(json.dumps({"runs": described, "rows": rows}))
        return
    for line in compare.as_text(rows).splitlines():
        print(_printable(line))
    if output is not None:
        print(f"wrote {output}")


def _printable(line: str) -> str:
    return "".join([c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line])


def _say(described: dict[str, Any], output: Path | None, trace: Path | None) -> None:
    for line in described["headline"]:
        print(_printable(line))
    for path in (output, trace):
        if path is not None:
            print(f"wrote {path}")
