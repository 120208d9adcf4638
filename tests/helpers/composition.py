"""The table of what offload was tried together with: cases that train plainly and with ssdtrain, and their page.

A case is a function that gets a `Way` and returns tensors: losses, gradients, parameters. It runs twice from the same
seed. Cases stand in `tests/jobs/composition_*.py`. `python tests/helpers/composition.py` runs all and writes the page.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import inside
import torch
import torch.utils.checkpoint
from folders import HELPERS, JOBS, ROOT, TESTS
from forks import Forks, ranks

import ssdtrain

PAGE = ROOT / "docs" / "reference" / "composition.md"
WORKER = JOBS / "composition_worker.py"
ACTIVATIONS = {"min_nbytes": 1024, "mode": "all", "staging_nbytes": 256 * 1024, "decline_below_nbytes": 0}
STATE = {"min_nbytes": 1024, "staging_nbytes": 64 * 1024}
LAST = "needed before it had left"
_WEIGHT = "weight"

ABOUT = """What `ssdtrain` was tried together with: every row trains a tiny model for a few steps plainly and once more
with offload, from the same seeds. *Equal* means losses, gradients and parameters, to the bit. *Offloaded* is what left
memory, of what autograd saved apart from weights, or of the optimizer state and the parameters; what stayed is named
with its reason and its size. What the last operator of a forward saves is "needed before it had left" always, which is
much of a model as small as these, and tensors under 1 KiB are "smaller than min_nbytes" here.

Measured with PyTorch {version} on the CPU, with `mode="all"` and `min_nbytes=1024`. A test runs every row.
"""


@dataclass
class Row:
    """What came out of a case."""

    name: str
    is_equal: bool = True
    note: str = ""  # why something stays that no counter knows of
    refusal: str = ""  # what PyTorch says where it refuses the combination
    offloaded_nbytes: int = 0
    could_nbytes: int = 0
    read_nbytes: int = 0
    stayed: dict[str, int] = field(default_factory=dict)  # bytes by reason

    @property
    def words(self) -> str:
        """The row of the page."""
        stayed = [f"{reason} ({size(nbytes)})" if nbytes else reason for reason, nbytes in self.stayed.items()]
        equal = "refused" if self.refusal else "yes" if self.is_equal else "no"
        moved = f"{size(self.offloaded_nbytes)} of {size(self.could_nbytes)}" if self.could_nbytes else "no bytes"
        why = self.refusal or ", ".join([*stayed, self.note] if self.note else stayed)
        return f"| {self.name} | {equal} | {moved} | {why} |"


Case = Callable[["Way"], Any]


@dataclass
class Group:
    """Cases that stand in one table."""

    title: str
    cases: dict[str, Case] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # what stands in the message, by case

    def row(self, name: str, *, note: str = "", refused: str = "") -> Callable[[Case], Case]:
        """Adds a case."""

        def add(case: Case) -> Case:
            assert name not in self.cases
            self.cases[name], self.notes[name] = case, note
            if refused:
                self.refused[name] = refused
            return case

        return add

    def run(self, folder: Path) -> list[Row]:
        """All rows, in order."""
        return [self._row(name, folder) for name in self.cases]

    def _row(self, name: str, folder: Path) -> Row:
        results = []
        for way in (Way(None), Way(folder)):
            torch.manual_seed(0)
            try:
                results.append(self.cases[name](way))
            except RuntimeError as error:
                if name not in self.refused or way.folder is None or self.refused[name] not in str(error):
                    raise
                return Row(name, refusal=str(error).partition("\n")[0].partition(". ")[0])
        row = Row(name, is_same(*results), self.notes[name])
        way.count(row)
        return row


class Way:
    """How a case trains: plainly where there is no folder, else with ssdtrain."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._contexts: list[Any] = []
        self._state: list[Any] = []
        self._saved_nbytes = 0  # of records

    def activations(self, model: torch.nn.Module | None = None, **options: Any) -> Any:
        """The context of `offload_activations`; what is saved in it is counted."""
        if self.folder is None:
            return contextlib.nullcontext()
        context = ssdtrain.offload_activations(self.folder, ACTIVATIONS | options, model)
        store = inside.store(context)
        adopt = store.adopt

        def counted(record: Any) -> None:
            self._saved_nbytes += record.nbytes
            adopt(record)

        store.adopt = counted
        self._contexts.append(context)
        return context

    def optimizer(self, optimizer: torch.optim.Optimizer, where: Any = None, **options: Any) -> Any:
        """Its state is offloaded."""
        if self.folder is None:
            return optimizer
        self._state.append(ssdtrain.offload_optimizer(optimizer, where or self.folder, STATE | options))
        return self._state[-1]

    def parameters(self, model: torch.nn.Module) -> Any:
        """The model's parameters are offloaded; returns what the optimizer may share a drive with."""
        if self.folder is None:
            return None
        ssdtrain.offload_parameters(model, self.folder, STATE)
        self._state.append(ssdtrain.parameter_offload(model))
        return self._state[-1]

    @property
    def checkpoint(self) -> Any:
        """`ssdtrain.checkpoint` in the place of PyTorch's."""
        return torch.utils.checkpoint.checkpoint if self.folder is None else ssdtrain.checkpoint

    def send(self) -> None:
        """Waits until what has set out is on the drive: between forward and backward, for it to be read."""
        for context in self._contexts:
            transport = inside.transport(context)
            if transport is not None:
                transport.engine.drain()

    def count(self, row: Row) -> None:
        """Adds up what moved and what stayed, and closes all."""
        stayed: Counter[str] = Counter()
        self.send()
        for context in self._contexts:
            stats = context.stats
            stayed.update({reason: skipped.nbytes for reason, skipped in stats.skipped.items() if reason != _WEIGHT})
            stayed[LAST] -= stats.offloaded_nbytes + stats.kept_nbytes
            row.offloaded_nbytes += stats.offloaded_nbytes
            row.read_nbytes += stats.read_nbytes
            assert stats.num_live_records == 0, f"{row.name}: records outlive their graphs"
            context.close()
        stayed[LAST] += self._saved_nbytes
        for state in self._state:
            stats = state.stats
            stayed.update({reason: skipped.nbytes for reason, skipped in stats.stays.items()})
            row.offloaded_nbytes += stats.away_nbytes
            row.read_nbytes += stats.read_nbytes
        for state in reversed(self._state):
            state.close()
        row.stayed = {reason: nbytes for reason, nbytes in stayed.items() if nbytes or reason != LAST}
        row.could_nbytes = row.offloaded_nbytes + stayed.total()


def is_same(left: Any, right: Any) -> bool:
    """Whether two results are equal to the bit, classes and layouts included."""
    if isinstance(left, torch.Tensor):
        if type(left) is not type(right) or (left.dtype, left.layout) != (right.dtype, right.layout):
            return False
        return torch.equal(_dense(left), _dense(right))
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(is_same, left, right))
    return bool(left == right)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.to_dense() if tensor.is_sparse else tensor


def size(nbytes: int) -> str:
    """Bytes for the page."""
    return f"{nbytes} B" if nbytes < 1024 else f"{nbytes / 1024:.1f} KiB"


# -- all of it ------------------------------------------------------------------------------------------------------


Tables = dict[str, list[Row]]
Said = tuple[str, bool, str]


def run_all(forks: Forks, folder: Path) -> Tables:
    """The rows of every group: those of one process in one, those of several ranks in a job."""
    tables: Tables = {}
    for kind, environments in (("alone", ranks(1)), ("two", ranks(2)), ("four", ranks(4))):
        done = forks.run([WORKER, folder, kind], environments)
        assert [rank.returncode for rank in done] == [0] * len(done), "".join(rank.stderr for rank in done)
        each = [json.loads(rank.stdout.splitlines()[-1]) for rank in done]
        for title, rows in each[0].items():
            tables[title] = [Row(**row) for row in rows]
            for other in each[1:]:
                for row, same in zip(tables[title], other[title], strict=True):
                    row.is_equal &= same["is_equal"]
    return tables


def answer(groups: Iterable[Group], folder: Path) -> None:
    """What a worker prints."""
    print(json.dumps({group.title: [asdict(row) for row in group.run(folder)] for group in groups}))


def page_of(tables: Tables) -> str:
    """The page of the documentation."""
    parts = ["# What it was tried with", ABOUT.format(version=torch.__version__.partition("+")[0]).strip()]
    for title, rows in tables.items():
        head = [f"## {title}", "", "| mode | equal | offloaded | what stayed, and why |", "|---|---|---|---|"]
        parts.append("\n".join([*head, *[row.words for row in rows]]))
    return "\n\n".join(parts) + "\n"


def read_page(text: str) -> dict[str, dict[str, Said]]:
    """What the page says of every row, by group."""
    groups: dict[str, dict[str, Said]] = {}
    for part in text.split("\n## ")[1:]:
        title, *lines = part.splitlines()
        rows = [line for line in lines if line.startswith("| ")][1:]
        groups[title] = {row.split(" | ")[0][2:]: read_row(row) for row in rows}
    return groups


def read_row(words: str) -> Said:
    """Whether it is equal, whether bytes move, and why others stay, without sizes."""
    _, equal, moved, why = words.removesuffix(" |").split(" | ")
    return equal, not moved.startswith(("0 B", "no bytes")), re.sub(r" \([\d.]+ K?i?B\)", "", why)


def main() -> None:
    """Writes the page."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "forks").mkdir()
        path = ":".join(map(str, (ROOT, HELPERS, TESTS)))
        forks = Forks(Path(name) / "forks", ["torch.distributed.fsdp"], {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
        tables = run_all(forks, Path(name))
        forks.close()
    different = [row.name for rows in tables.values() for row in rows if not row.is_equal]
    if different:
        sys.exit(f"Expected every row to be equal to plain training, these are not: {', '.join(different)}")
    PAGE.write_text(page_of(tables))


if __name__ == "__main__":
    main()
