"""Writes the pages of the reference that repeat what the package says: `python docs/generate.py`; a test compares."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from typer.testing import CliRunner

from ssdtrain.api import section
from ssdtrain.integrations import TESTED_TORCH, TESTED_VERSIONS
from ssdtrain.run_log import reader, schema
from ssdtrain.state_stats import StateStats
from ssdtrain.stats import Skipped, Stats
from ssdtrain.tools.cli import app

REFERENCE = Path(__file__).parent / "reference"
_NAMED = dict.fromkeys(["_Nbytes", "_Time", "_Number"], "int") | dict.fromkeys(["_Sum", "_Seconds", "_Clock"], "float")
_NAMED |= dict.fromkeys(["_Times", "_Sizes", "_Places"], "list[int]") | {"_Values": "dict[str, Any]"}
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

ENVIRONMENT = """`ssdtrain.Offload()` without arguments, `python -m ssdtrain.launch`, and Lightning's plugin do what
these say; `SSDTRAIN_DIR` or `SSDTRAIN_CONFIG` switches them on. `offload_activations` reads none of them, unless it is
given `ActivationPolicy.from_environment()`. A variable with `SSDTRAIN_` in front that is not listed is an error.
Values are
those of [policies](policies.md).

Two more are about the package itself: `SSDTRAIN_NO_CPP=1` leaves the C++ engine out, when building and when running,
and `SSDTRAIN_BUILD_JOBS` bounds the compilers that build it at once. Of launchers' variables `RANK`, `LOCAL_RANK` and
`WORLD_SIZE` are read, to fill in `{rank}` and `{local_rank}` in paths."""
_ALONE = {
    "SSDTRAIN_DIR": "the directory; several with `:` between them",
    "SSDTRAIN_CONFIG": "a file with all of it, YAML or JSON; none of the others then",
    "SSDTRAIN_ENABLED": "true or false: all of it",
}
STATISTICS = """`offload.stats` is a snapshot: it does not change, the next one is another. `print` shows it on one
screen, `as_dict()` has plain types for JSON. Sizes are bytes, times seconds, and totals are over the run.
What the peaks count is [explained](../explanation/memory.md)."""
RUN_LOG = """What `record="run.ssdtrain"` writes. `ssdtrain report run.ssdtrain --json` has its numbers worked out; read
the file itself with `ssdtrain.run_log.read_run(path)`, which returns the `Run` at the end of this page, or by
its format.

The first line is `ssdtrain run record 1`, with the version of the format. Then come blocks: two little-endian 32-bit
numbers, the length of what follows and its CRC-32, and so many bytes of JSON, compressed with zlib. A file that is cut
can be read up to there. Every block has a `kind`; whoever reads leaves out kinds that are not known, and a newer
version is refused."""


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


def statistics() -> str:
    """The fields of what was done."""
    state = "Parameters and optimizer state: `StateStats`"
    titles = {Stats: "Activations: `Stats`", Skipped: "`Skipped`", StateStats: state}
    return "\n\n".join(["# Statistics", STATISTICS, *[_fields(kind, title) for kind, title in titles.items()]]) + "\n"


def run_log() -> str:
    """The blocks of a run log, and what is read of them."""
    blocks = {
        schema.Head: "`run`",
        schema.Environment: "`environment` of `run`",
        schema.Row: "`step`",
        schema.Timeline: "`detail`",
        schema.Columns: "`records` of `detail`",
        schema.State: "`state`",
        schema.End: "`end`",
    }
    parts = [_fields(kind, f"Block {title}") for kind, title in blocks.items()]
    parts += [_fields(kind, f"`{kind.__name__}`") for kind in (reader.Run, reader.Detail)]
    return "\n\n".join(["# Run log", RUN_LOG, *parts]) + "\n"


def environment() -> str:
    """The variables that are read."""
    lines = ["# Environment variables", "", ENVIRONMENT, "", "| variable | is |", "|---|---|"]
    for name, (feature, field) in sorted(section._variables().items()):
        what = f"`{field}` of `{feature}`" if feature else _ALONE.get(name, "true, false, or the JSON of a policy")
        lines.append(f"| `{name}` | {what} |")
    return "\n".join(lines) + "\n"


def _fields(kind: type, title: str) -> str:
    """A table of a class's attributes with their types and what is written under them."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    body = getattr(definition, "body", [])
    rows = []
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            is_said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            words = " ".join(str(after.value.value).split()) if is_said else ""
            rows.append(f"| `{node.target.id}` | `{_plain(node.annotation)}` | {words} |")
    head = ["| field | type | |", "|---|---|---|"]
    return "\n".join([f"## {title}\n", str(inspect.getdoc(kind)), "", *head, *rows])


def _plain(annotation: ast.expr) -> str:
    """The type without its bounds."""
    text = re.sub(r"Annotated\[(.+?), Field\(.*?\)\]", r"\1", ast.unparse(annotation))
    return re.sub(r"\b_[A-Z]\w+", lambda name: _NAMED.get(name[0], name[0]), text).replace("|", "or")


PAGES = {
    "environment.md": environment,
    "command-line.md": command_line,
    "compatibility.md": compatibility,
    "statistics.md": statistics,
    "run-log.md": run_log,
}


def main() -> None:
    """Writes all."""
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page())


if __name__ == "__main__":
    main()
