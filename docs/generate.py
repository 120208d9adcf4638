"""Writes the pages of the reference that repeat what the package says: `python docs/generate.py`; a test compares."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from ssdtrain.integrations import TESTED_TORCH, TESTED_VERSIONS
from ssdtrain.tools.cli import app

REFERENCE = Path(__file__).parent / "reference"
COMMANDS = ("demo", "doctor", "bench", "plan", "report")

ABOUT = """`ssdtrain COMMAND`, or `python -m ssdtrain COMMAND`. Exit codes: 0 all is as promised; 1 a run failed,
numbers differ, or something is broken; 2 options or a directory that cannot be used; 130 interrupted. `--json` prints
one line of JSON. Into a pipe nothing is wrapped. Names that options had in earlier versions are still understood.
"""
TRIED = """All tests run with the last version of PyTorch in its row, those of the CUDA path with the middle one, and
comparisons with plain training with the first.

Linux, CPython 3.10 to 3.14, x86-64; wheels for aarch64 are configured and not tried. One wheel serves every PyTorch:
the extension knows bytes, not tensors. `ssdtrain doctor` compares what is installed with this table; another version
may well work, so compare the losses of a few steps. Oldest versions tried: typer 0.16 (0.12 fails), pydantic 2.7,
rich 13, typing_extensions 4.7."""


def command_line() -> str:
    """What `-h` of every command prints."""
    parts = [f"# Command line\n\n{ABOUT}"]
    for words in ((), *((name,) for name in COMMANDS)):
        result = CliRunner().invoke(app, [*words, "-h"], env={"COLUMNS": "80"}, prog_name="ssdtrain")
        parts.append(f"## {' '.join(('ssdtrain', *words))}\n\n```text\n{result.output.strip()}\n```\n")
    return "\n".join(parts)


def compatibility() -> str:
    """What the tests ran with."""
    rows = [("torch", ">= 2.9", ", ".join(TESTED_TORCH))]
    rows += [(name, "optional", ", ".join(versions)) for name, versions in TESTED_VERSIONS.items()]
    lines = ["# Compatibility\n", "| package | needed | tested with |", "|---|---|---|"]
    lines += [f"| {name} | {needed} | {versions} |" for name, needed, versions in rows]
    lines += ["", TRIED]
    return "\n".join(lines) + "\n"


PAGES = {"command-line.md": command_line, "compatibility.md": compatibility}


def main() -> None:
    """Writes all."""
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page())


if __name__ == "__main__":
    main()
