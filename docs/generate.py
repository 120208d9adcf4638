"""Writes the pages of the reference that repeat what the package says: `python docs/generate.py`; a test compares."""

from __future__ import annotations

import ast
import enum
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.testing import CliRunner

from ssdtrain.api import section
from ssdtrain.integrations import READ_VERSIONS, TESTED_TORCH, TESTED_VERSIONS
from ssdtrain.run_log import reader, schema
from ssdtrain.state_stats import StateStats
from ssdtrain.stats import Skipped, Stats
from ssdtrain.tools.cli import app, outputs

REFERENCE = Path(__file__).parent / "reference"
_NAMED = dict.fromkeys(["_Nbytes", "_Time", "_Number"], "int") | dict.fromkeys(["_Sum", "_Seconds", "_Clock"], "float")
_NAMED |= dict.fromkeys(["_Times", "_Sizes", "_Places"], "list[int]") | {"_Values": "dict[str, Any]"}
COMMANDS = ("demo", "doctor", "bench", "plan", "report")

ABOUT = """`ssdtrain COMMAND`, or `python -m ssdtrain COMMAND`. Exit codes: 0 all is as promised; 1 a run failed,
numbers differ, or something is broken; 2 options or a directory that cannot be used; 130 interrupted. `--json` prints
one line of [JSON](json.md). Into a pipe nothing is wrapped. Names that options had in earlier versions are still
understood.
"""
TRIED = """All tests run with PyTorch 2.13.0, and those of the CUDA path with 2.11.0. On the CPU those of saved
activations and of compiled models run with 2.11.0 and 2.14.1 too, with 2.9.1 those of compiled models, checkpoints and
tensors of other classes, and [what offload was tried together with](composition.md) with all four.

`ssdtrain.integrations.compiler.compile_backend` uses seams of PyTorch's compiler that are not public: tried with all
four, and refused by name where they are missing. Before PyTorch 2.12 a broadcast by hand of an offloaded parameter
needs `gathered()` around it.

Linux, CPython 3.10 to 3.14, x86-64; wheels for aarch64 are configured and not tried. One wheel serves every PyTorch:
the extension knows bytes, not tensors. `ssdtrain doctor` compares what is installed with this table; another version
may well work, so compare the losses of a few steps. Oldest versions tried: typer 0.16 (0.12 fails), pydantic 2.7,
rich 13, typing_extensions 4.10."""

READ = """Not installed for the tests, which run a stand-in of the part that is used: it was read in the source."""

ENVIRONMENT = """`ssdtrain.Offload()` without arguments, `python -m ssdtrain.launch`, and Lightning's plugin do what
these say; `SSDTRAIN_DIR` or `SSDTRAIN_CONFIG` switches them on. `offload_activations` reads none of them, unless it is
given `ActivationPolicy.from_environment()`. A variable with `SSDTRAIN_` in front that is not listed is an error.
Values are those of [policies](policies.md).

Two more are about the package itself: `SSDTRAIN_NO_CPP=1` leaves the C++ engine out, when building and when running,
and `SSDTRAIN_BUILD_JOBS` bounds the compilers that build it at once. Of launchers' variables `RANK`, `LOCAL_RANK` and
`WORLD_SIZE` are read, to fill in `{rank}` and `{local_rank}` in paths."""
_ALONE = {
    "SSDTRAIN_DIR": "the directory, or [several](../how-to/drives.md#several) with `:` between them",
    "SSDTRAIN_CONFIG": "a file with all of it, YAML or JSON; none of the others then",
    "SSDTRAIN_ENABLED": "true or false: all of it",
}
STATISTICS = """`offload.stats` is a snapshot: it does not change, the next one is another. `print` shows it on one
screen, `as_dict()` has plain types for JSON. Sizes are bytes, times seconds, and totals are over the run.
What the peaks count is [explained](../explanation/memory.md)."""
JSON = """What commands print with `--json`: one line with one object, the last line of stdout (of `demo`, after its
table). Exit codes are those without it. Fields are only ever added: leave out those that you do not know. Sizes are
bytes, times seconds, shares parts of 1; GB/s are 10^9 bytes per second."""
_UNITS = (  # the first ending that fits
    ("nbytes_per_day", "bytes per day"),
    ("nbytes_per_step", "bytes per step"),
    ("daily_nbytes", "bytes per day"),
    ("nbytes", "bytes"),
    ("gb_per_forward_second", "GB per second"),
    ("bytes_per_second", "bytes per second"),
    ("bandwidth", "bytes per second"),
    ("seconds", "seconds"),
    ("gbs", "GB/s"),
    ("share", "of 1"),
    ("cost", "of 1"),
    ("tbw", "TB"),
    ("days", "days"),
    ("years", "years"),
    ("flops", "per second"),
    ("begin", "microseconds"),
    ("end", "microseconds"),
)
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
    lines += ["", TRIED, "", READ, "", "| package | version | what is used of it |", "|---|---|---|"]
    lines += [f"| {name} | {version} | {seam} |" for name, (version, seam) in READ_VERSIONS.items()]
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


def json_outputs() -> str:
    """What every command prints with `--json`."""
    parts = ["# JSON outputs", JSON]
    told: set[type] = set()
    for command, kinds in outputs.OUTPUTS.items():
        links = [_word(kind) for kind in kinds]
        together = f"{', '.join(links[:-1])} and {links[-1]} together" if links[1:] else links[0]
        parts.append(f"## ssdtrain {command} --json\n\nAn object with the fields of {together}.")
        for kind in dict.fromkeys([*kinds, *_inside(kinds)]):
            if kind not in told:
                told.add(kind)
                parts.append(_values(kind))
    return "\n\n".join(parts) + "\n"


def _inside(kinds: Iterable[type]) -> Iterator[type]:
    """Classes that stand in types of fields, those of their fields included."""
    for kind in kinds:
        for found in [found for hint in get_type_hints(kind).values() for found in _classes(hint)]:
            yield found
            yield from _inside([found])


def _classes(hint: Any) -> Iterator[type]:
    """Classes of the package within a type."""
    if isinstance(hint, type) and hint.__module__.startswith("ssdtrain.") and not issubclass(hint, enum.Enum):
        yield hint
    for part in get_args(hint):
        yield from _classes(part)


def _values(kind: type) -> str:
    """A table of the fields of an object of JSON."""
    rows = []
    for name, _, words in _described(kind):
        of = _word(get_type_hints(kind)[name])
        unit = next((unit for ending, unit in _UNITS if name.endswith(ending)), "")
        is_number = re.search("integer|number", of)
        rows.append(f"| `{name}` | {of} | {unit if is_number else ''} | {words.replace('None', 'null')} |")
    says = str(inspect.getdoc(kind)).partition("\n\n")[0].replace("\n", " ")
    head = ["| field | type | unit | |", "|---|---|---|---|"]
    return "\n".join([f"### {kind.__name__}\n", says, "", *head, *rows])


def _word(hint: Any) -> str:
    """A type in words of JSON."""
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return " or ".join([f"`{member.value}`" for member in hint])
    arguments = get_args(hint)
    origin = getattr(hint, "__origin__", None)
    if origin is list:
        return f"list of {_word(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)} texts" if set(arguments) == {str} else "list"
    if origin is dict:
        return "object" if arguments[1] is Any else f"object of {_word(arguments[1])}"
    if arguments and all(isinstance(argument, str) for argument in arguments):
        return " or ".join([f"`{argument}`" for argument in arguments])
    if arguments:
        return " or ".join([_word(argument) for argument in arguments])
    if next(_classes(hint), None):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    return {int: "integer", float: "number", str: "text", bool: "boolean", type(None): "null"}[hint]


def _fields(kind: type, title: str) -> str:
    """A table of a class's attributes with their types and what is written under them."""
    rows = [f"| `{name}` | `{_plain(annotation)}` | {words} |" for name, annotation, words in _described(kind)]
    head = ["| field | type | |", "|---|---|---|"]
    return "\n".join([f"## {title}\n", str(inspect.getdoc(kind)), "", *head, *rows])


def _described(kind: type) -> Iterator[tuple[str, ast.expr, str]]:
    """Attributes of a class: name, annotation, and what is written under it."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    body = getattr(definition, "body", [])
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            is_said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            yield node.target.id, node.annotation, " ".join(str(after.value.value).split()) if is_said else ""


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
    "json.md": json_outputs,
}


def main() -> None:
    """Writes all."""
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page())


if __name__ == "__main__":
    main()
