"""`ssdtrain demo`: the comparison that shows what it is about."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from ssdtrain.io.files.directories import check_directories
from ssdtrain.io.files.paths import absolute_path
from ssdtrain.policy import ActivationPolicy
from ssdtrain.tools.cli.exit_codes import end, one_line
from ssdtrain.tools.cli.names import in_options, nbytes_of
from ssdtrain.tools.demo.compare import Comparison, LimitError, compare
from ssdtrain.tools.demo.process import WorkerError
from ssdtrain.tools.demo.report import ProgressLines, print_json, print_table
from ssdtrain.tools.demo.settings import DEFAULT_POLICY, DemoSettings
from ssdtrain.tools.estimate.gpu import LEAST_MEMORY_NBYTES

_FIELDS = ", ".join(ActivationPolicy.model_fields)
_OPTIONS = {"width": "--width", "heads": "--heads"}
_POLICY_HELP = f"One field of the policy, as FIELD=VALUE; repeatable. Fields: {_FIELDS}."
_LIMIT_HELP = (
    "Cap on the private memory each run may add for training, such as 1GiB; `auto` measures both runs first "
    "and takes the middle. The plain run is expected to run out of memory, the other one to finish."
)


def demo(
    directory: Annotated[
        str | None, typer.Argument(help="Folder on the drive.", show_default="the current one, if writable")
    ] = None,
    *,
    layers: Annotated[int, typer.Option(min=1, help="Transformer blocks.")] = DemoSettings.layers,
    width: Annotated[int, typer.Option(min=1, help="Size of the residual stream.")] = DemoSettings.width,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads per block.")] = DemoSettings.heads,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = DemoSettings.batch,
    sequence: Annotated[int, typer.Option(min=1, help="Bytes of text per sequence.")] = DemoSettings.sequence,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps, after 1 warm-up step.")] = DemoSettings.steps,
    seed: Annotated[int, typer.Option(help="Seed of the weights and batches.")] = DemoSettings.seed,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of each run.")] = None,
    data: Annotated[Path | None, typer.Option(help="Text to train on.", show_default="Python's own sources")] = None,
    former_directory: Annotated[str | None, typer.Option("--directory", hidden=True)] = None,
    policy: Annotated[list[str] | None, typer.Option(metavar="FIELD=VALUE", help=_POLICY_HELP)] = None,
    memory_limit: Annotated[str | None, typer.Option(metavar="SIZE|auto", help=_LIMIT_HELP)] = None,
    json_line: Annotated[bool, typer.Option("--json", help="End stdout with one line of JSON.")] = False,
) -> None:
    """Train a GPT without and with ssdtrain and compare both.

    Steps are taken in turn; memory, time, losses and parameters are compared. Exit code 1: results differ, or a run
    failed; 2: options or a directory that cannot be used.
    """
    try:
        settings = DemoSettings(
            directory=_directory(directory, former_directory),
            layers=layers,
            width=width,
            heads=heads,
            batch=batch,
            sequence=sequence,
            steps=steps,
            seed=seed,
            threads=threads,
            data=str(data) if data else None,
            policy=DEFAULT_POLICY | _parse_policy(policy or []),
        )
        limit = _parse_limit(memory_limit)
        warnings = check_directories([settings.directory])
    except (ValueError, OSError) as error:
        _end(2, in_options(one_line(error), _OPTIONS))
    comparison = _run(settings, limit, warnings)
    print_table(comparison)
    if json_line:
        print_json(comparison)
    if comparison.problem is not None:
        _end(1, comparison.problem)


def _run(settings: DemoSettings, memory_limit: int | Literal["auto"] | None, warnings: list[str]) -> Comparison:
    """Runs the comparison and turns what goes wrong into a message and an exit code."""
    try:
        with ProgressLines() as progress:
            for warning in warnings:
                progress(f"Warning: {warning}")
            return compare(settings, memory_limit=memory_limit, progress=progress, watcher=progress.show)
    except WorkerError as failure:
        if failure.kind == "usage":
            _end(2, str(failure))
        kind = failure.kind.replace("_", " ")
        _end(1, f"the {failure.role} run failed ({kind}): {failure}\n{failure.detail}")
    except LimitError as error:
        _end(2, str(error))
    except KeyboardInterrupt:
        _end(130, "interrupted; both runs were ended.")


def _parse_policy(pairs: list[str]) -> dict[str, Any]:
    policy = dict(_parse_field(pair) for pair in pairs)
    ActivationPolicy.of(policy)
    return policy


def _parse_field(pair: str) -> tuple[str, Any]:
    name, equals, text = pair.partition("=")
    if not equals:
        raise ValueError(f"Expected --policy FIELD=VALUE, got {pair!r}. Fields: {_FIELDS}.")
    try:
        return name, json.loads(text.lower())
    except json.JSONDecodeError:
        return name, text


def _parse_limit(text: str | None) -> int | Literal["auto"] | None:
    if text is None:
        return None
    if text == "auto":
        return "auto"
    return nbytes_of("--memory-limit", text, LEAST_MEMORY_NBYTES)


def _directory(argument: str | None, option: str | None) -> str:
    """Where the demo writes: the argument, or the option of earlier versions."""
    if argument is not None and option is not None:
        raise ValueError(f"Expected DIRECTORY or --directory, got both: {argument!r} and {option!r}")
    given = option if argument is None else argument
    return absolute_path(_default_directory() if given is None else given, "a directory")


def _default_directory() -> str:
    return str(Path.cwd()) if os.access(Path.cwd(), os.W_OK) else tempfile.gettempdir()


def _end(code: int, message: str) -> NoReturn:
    end("demo", code, message)
