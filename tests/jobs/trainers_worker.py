"""A child of `test_trainers.py`: one rank of a job. Runs the cases named, and writes what each came to."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

import pytest


def main() -> None:
    module, folder, results, *names = sys.argv[1:]
    cases = importlib.import_module(module)
    found = {}
    for name in names:
        own = Path(folder) / name
        own.mkdir(exist_ok=True)
        try:
            getattr(cases, name)(own)
            found[name] = ""
        except pytest.skip.Exception as skipped:  # on all ranks: they are on one machine
            found[name] = f"skipped: {skipped}"
        except BaseException:
            found[name] = traceback.format_exc()
            if os.environ.get("WORLD_SIZE", "1") != "1":
                break  # the others may be anywhere
    Path(f"{results}.{os.environ.get('RANK', '0')}").write_text(json.dumps(found))
    os._exit(0)  # whoever waits for a rank that has failed


if __name__ == "__main__":
    main()
