"""Runs the notebooks and keeps what they show: `make notebooks`; tests run their code without Jupyter."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).parent


def main() -> None:
    """Runs each in its folder, from the first cell to the last; a cell that raises ends it."""
    for path in sorted(DOCS.rglob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": path.parent}}).execute()
        for number, cell in enumerate(notebook.cells):
            cell.metadata, cell.id = {}, f"cell-{number}"
        notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
