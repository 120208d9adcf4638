"""`ssdtrain doctor`: is this machine fit?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ssdtrain.io.files.paths import absolute_directories
from ssdtrain.tools.cli.exit_codes import end
from ssdtrain.tools.cli.screen import show
from ssdtrain.tools.doctor import Finding, Verdict, examine

_SHOWN = {
    Verdict.GOOD: ("ok", "green"),
    Verdict.UNWISE: ("warn", "yellow"),
    Verdict.BROKEN: ("fail", "bold red"),
    Verdict.ABSENT: ("absent", "dim"),
    Verdict.UNKNOWN: ("unknown", "dim"),
}


def doctor(
    directories: Annotated[
        list[str] | None, typer.Argument(help="Folders for spill files.", show_default="the current one")
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON and nothing else.")] = False,
) -> None:
    """Tell whether this machine is fit, and what to do if not.

    Exit code 0: fit, perhaps with remarks; 1: something is broken, a directory too; 2: what is no
    path.
    """
    try:
        paths = absolute_directories(directories or Path.cwd())
    except ValueError as error:
        end("doctor", 2, str(error))
    findings = examine(paths)
    verdicts = {verdict.value: sum(f.verdict is verdict for f in findings) for verdict in Verdict}
    if as_json:
        print(json.dumps({"verdicts": verdicts, "findings": [finding.as_dict() for finding in findings]}))
    else:
        _print(findings, verdicts)
    raise typer.Exit(1 if verdicts["broken"] else 0)


def _print(findings: list[Finding], verdicts: dict[str, int]) -> None:
    area = ""
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        if finding.area != area:
            area = finding.area
            table.add_row(Text(area, style="bold"))
        word, style = _SHOWN[finding.verdict]
        verdict = Text(word, style=style)
        table.add_row(Text(f"  {finding.name}"), verdict, Text(finding.found))
        if finding.remedy and finding.verdict is not Verdict.GOOD:
            table.add_row("", "", Text(f"-> {finding.remedy}"))
    counts = [(verdicts[verdict.value], word) for verdict, (word, _) in _SHOWN.items()]
    show(table, ", ".join(f"{count} {word}" for count, word in counts if count))
