"""Writes and reads through the C++ engine of an installed wheel; run by cibuildwheel, without PyTorch."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import ssdtrain
from ssdtrain.tools.bench.memory import Memory
from ssdtrain.tools.bench.passes import Passes

NBYTES = 1 << 20


def main() -> None:
    """Fails when the extension is missing or the package comes from anywhere but an installation."""
    assert "site-packages" in str(Path(ssdtrain.__file__)), ssdtrain.__file__
    with tempfile.TemporaryDirectory() as folder:
        passes = Passes(folder, Memory(16 * NBYTES), NBYTES, 4, "threads")
        passes.write()
        passes.read()
        choice = passes.choice
        passes.close()
    print(f"ssdtrain {ssdtrain.__version__} on Python {sys.version.split()[0]}: engine {choice.kind}")


if __name__ == "__main__":
    main()
