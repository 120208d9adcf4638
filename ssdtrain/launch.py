"""Runs a training script that cannot be edited, with the integrations it needs imported first.

    python -m ssdtrain.launch train.py --deepspeed_config ds.json
    deepspeed --module ssdtrain.launch train.py --deepspeed_config ds.json
    torchrun --nproc-per-node 8 -m ssdtrain.launch train.py --deepspeed_config ds.json

`-m package.module` in the place of the script runs a module. The script sees the arguments it would have seen; the
`--local_rank=N` that DeepSpeed's launcher puts first is handed on.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from collections.abc import Sequence

_USAGE = "usage: python -m ssdtrain.launch [-m] SCRIPT_OR_MODULE [ARGUMENT ...]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ssdtrain.launch``."""
    script, is_module, rest = parse(sys.argv[1:] if arguments is None else arguments)
    importlib.import_module("ssdtrain.integrations.deepspeed")
    sys.argv = [script, *rest]
    if is_module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
        runpy.run_path(script, run_name="__main__")


def parse(arguments: Sequence[str]) -> tuple[str, bool, list[str]]:
    """The script or module, whether it is a module, and the arguments it gets.

    Raises:
        SystemExit: there is nothing to run, or an option nobody knows.
    """
    rest = list(arguments)
    of_launcher = []
    while rest and rest[0].startswith("--local_rank"):
        of_launcher.append(rest.pop(0))
    is_module = rest[:1] == ["-m"]
    if is_module:
        rest.pop(0)
    if not rest or rest[0].startswith("-"):
        raise SystemExit(f"Expected a script to run, got {rest[0] if rest else 'nothing'}\n{_USAGE}")
    return rest[0], is_module, [*of_launcher, *rest[1:]]


if __name__ == "__main__":
    main()
