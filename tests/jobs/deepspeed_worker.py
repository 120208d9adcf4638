"""One rank of a job of `test_deepspeed.py`: runs the cases it is told, and writes down what each came to."""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed_cases
import deepspeed_life


def main() -> None:
    """Arguments: a folder for spill files, a file for the results, names of cases."""
    directory, results, *names = sys.argv[1:]
    rank = deepspeed.comm.get_rank() if deepspeed.comm.is_initialized() else 0
    own = Path(directory) / f"spill{rank}"
    found: dict[str, Any] = {}
    for name in names:
        print(f"--- {name} {time.perf_counter():.1f}", flush=True)
        case = getattr(deepspeed_cases, name, None) or getattr(deepspeed_life, name)
        found[name] = case(str(own))
    Path(f"{results}.{rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of DeepSpeed about itself
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    (Path(sys.argv[1]) / f"spill{deepspeed.comm.get_rank()}").mkdir()
    main()
