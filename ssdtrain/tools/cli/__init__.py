"""The `ssdtrain` command. Each file turns the options of one subcommand into calls, and results into exit codes.

Knows options and exit codes, and nothing that the tools do. Exit codes: 0 all is as promised; 1 a run failed, its
numbers differ, or something is broken; 2 the options or the directory cannot be used; 130 interrupted.
"""

from __future__ import annotations

import typer

from ssdtrain.tools.cli.bench import bench
from ssdtrain.tools.cli.demo import demo
from ssdtrain.tools.cli.doctor import doctor
from ssdtrain.tools.cli.plan import plan
from ssdtrain.tools.cli.report import report

app = typer.Typer(
    name="ssdtrain",
    help="Train with saved activations on NVMe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, doctor, bench, plan, report):
    app.command()(command)


def main() -> None:
    """Entry point of the installed command and of `python -m ssdtrain`."""
    app()
