"""`ssdtrain report`: a recorded run as a page, as JSON, as a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ssdtrain.report.data import describe
from ssdtrain.report.page import render
from ssdtrain.report.trace import chrome_trace
from ssdtrain.run_log import RecordError, read_run
from ssdtrain.tools.cli.ending import end


def report(
    run: Annotated[Path, typer.Argument(help="The record: what record=... of offload_activations wrote.")],
    *,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the page here.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a trace for ui.perfetto.dev here.")] = None,
    json_line: Annotated[bool, typer.Option("--json", help="Print every number of the page as one JSON.")] = False,
) -> None:
    """Show what a recorded run did: headline, page, trace or JSON.

    Exit code 2: the record cannot be read, or an output not be written.
    """
    try:
        recorded = read_run(run)
        described = describe(recorded)
        if output is not None:
            output.write_text(render(described), encoding="utf-8")
        if trace is not None:
            trace.write_text(json.dumps(chrome_trace(recorded), separators=(",", ":")), encoding="utf-8")
    except (RecordError, OSError, ImportError) as error:
        end("report", 2, " ".join(str(error).split()))
    if json_line:
        print(json.dumps(described))
    else:
        _say(described, output, trace)


def _say(described: dict[str, Any], output: Path | None, trace: Path | None) -> None:
    for line in described["headline"]:
        print("".join([c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line]))
    for path in (output, trace):
        if path is not None:
            print(f"wrote {path}")
