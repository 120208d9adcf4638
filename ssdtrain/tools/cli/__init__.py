"""The `ssdtrain` command. Each file turns the options of one subcommand into calls, and results into exit codes.

Knows options and exit codes, and nothing that the tools do. Exit codes: 0 all is as promised; 1 a run failed, its
numbers differ, or something is broken; 2 the options or the directory cannot be used; 130 interrupted.
"""

from __future__ import annotations

import io
import platform
import sys
from typing import Annotated

import typer

from ssdtrain import __version__
from ssdtrain.tools.cli.bench import bench
from ssdtrain.tools.cli.demo import demo
from ssdtrain.tools.cli.doctor import doctor
from ssdtrain.tools.cli.names import Command
from ssdtrain.tools.cli.plan import plan
from ssdtrain.tools.cli.report import report
from ssdtrain.tools.doctor.software import installed

app = typer.Typer(
    name="ssdtrain",
    no_args_is_help=True,
    rich_markup_mode=None,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for command in (demo, doctor, bench, plan, report):
    app.command(cls=Command)(command)


@app.callback()
def about(
    *,
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print versions and exit.")] = False,
) -> None:
    """Keep activations, parameters and optimizer state of a training on NVMe drives or in host memory."""
    if version:
        python, torch = platform.python_version(), installed("torch") or "not installed"
        print(f"ssdtrain {__version__} (Python {python}, PyTorch {torch})")
        raise typer.Exit


def main() -> None:
    """Entry point of the installed command and of `python -m ssdtrain`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may have bytes that are no text, as on stderr
    app(prog_name="ssdtrain")  # of `python -m ssdtrain` too: completion makes names of it
