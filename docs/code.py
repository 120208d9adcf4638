"""Writes the Python of README and pages into a folder, a file per page, for a type checker: `make lint`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PREAMBLE = """# What the reader of a page has.
import torch
import ssdtrain
model: torch.nn.Module = torch.nn.Linear(1, 1)
optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters())
loader: list[torch.Tensor] = []

"""


def main(folder: Path) -> None:
    """Writes all."""
    folder.mkdir(parents=True, exist_ok=True)
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        if blocks:
            (folder / f"{page.stem.replace('-', '_').lower()}.py").write_text(PREAMBLE + "\n".join(blocks))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
