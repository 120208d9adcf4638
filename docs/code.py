"""Writes the Python of README, pages and notebooks into a folder, a file each, for type checkers: `make lint`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PREAMBLE = """# What the reader of a page has.
import torch
import ssdtrain
model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
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
    for page in (ROOT / "docs").rglob("*.ipynb"):
        cells = json.loads(page.read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        (folder / f"{page.stem}.py").write_text("\n".join(code))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
