"""Trains every case of the table plainly and offloaded; started by `composition.run_all`."""

from __future__ import annotations

import sys
from pathlib import Path

import composition
import torch

from ssdtrain.devices.vector_math import settle_vector_math


def main(folder: Path, kind: str) -> None:
    torch.set_num_threads(1)
    settle_vector_math()
    if kind != "alone":
        import composition_ranks

        with composition_ranks.job(folder):
            composition.answer([{"two": composition_ranks.RANKS, "four": composition_ranks.FOUR}[kind]], folder)
        return
    from composition_compiled import CHECKPOINTS, COMPILED, SUBCLASSES
    from composition_eager import EAGER
    from composition_state import STATE

    composition.answer([EAGER, CHECKPOINTS, COMPILED, SUBCLASSES, STATE], folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
