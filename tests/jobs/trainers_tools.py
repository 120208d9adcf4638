"""What the children of `test_trainers.py` share: a tiny model and data, policies that offload all, comparison.

A child is one rank of a job on the CPU with gloo. Its cases raise where something does not hold.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import same_bits
from drives import fill, tmpfs_drive
from folders import RECIPES
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from ssdtrain.api.section import Section
from ssdtrain.api.session import Offload
from ssdtrain.store.saved_tensors import innermost_hooks

WIDTH, LENGTH, NUM_TOKENS = 64, 32, 96
ACTIVATIONS = {"min_nbytes": "2KiB", "mode": "all", "staging_nbytes": "256KiB", "prefetch_nbytes": "256KiB"}
STATE = {"min_nbytes": "1KiB", "staging_nbytes": "256KiB"}
PAGED = STATE | {"chunk_nbytes": "64KiB"}
EVERYTHING = {
    "activations": ACTIVATIONS,
    "parameters": STATE | {"prefetch_nbytes": "64KiB"},
    "optimizer": PAGED,
}

RANK, NUM_RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Tokens that are what they are by their index."""

    def __init__(self, num: int = 32) -> None:
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(0, NUM_TOKENS, (num, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def llama() -> Any:
    """Three layers, tied to nobody."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all there is in a model."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def state_of(optimizer: Any) -> Any:
    """A copy of an optimizer's state."""
    return copy.deepcopy(optimizer.state_dict())


def local(found: Any) -> Any:
    """This rank's part of all DTensors."""
    if isinstance(found, DTensor):
        return found.to_local()
    if isinstance(found, dict):
        return {key: local(value) for key, value in found.items()}
    return [local(value) for value in found] if isinstance(found, list | tuple) else found


def assert_equal(expected: Any, actual: Any, what: str) -> None:
    assert same_bits(expected, actual), f"{what}: {expected}\n{actual}"


def assert_offloaded(session: Offload, *, state: bool = True) -> None:
    """Of everything that was to be offloaded something was, and came back; state in several chunks."""
    section = session.section
    if section.activations is not None:
        stats = session.stats
        assert stats is not None and stats.offloaded_nbytes and stats.read_nbytes, str(stats)
        assert not stats.num_live_records, str(stats)
    if state and section.optimizer is not None:
        assert len(session.state_stats) > (section.parameters is not None), session
    for stats_of_state in session.state_stats if state else []:
        assert stats_of_state.written_nbytes and stats_of_state.read_nbytes, str(stats_of_state)


def assert_clean() -> None:
    """No hooks are on."""
    assert innermost_hooks() is None, "hooks were left on"


@contextlib.contextmanager
def raises(kind: type[BaseException], *texts: str) -> Iterator[None]:
    """As pytest's: the error has all texts, and nothing is left on."""
    with pytest.raises(kind) as caught:
        yield
    for text in texts:
        assert text in str(caught.value), str(caught.value)
    assert_clean()


Train = Callable[..., Any]
"""`train(folder, model, kind, directory, **features)`: begins training with an optimizer of class `kind`."""


def refused_alike(folder: Path, make: Callable[[], torch.nn.Module], train: Train) -> None:
    """What is wrong on the last rank, or on all, is an error on all, and the model that `make` made stays as it is."""
    start = _untouched(folder, make, train)
    is_bad = RANK == NUM_RANKS - 1
    good, file, unknown = own_directory(folder), folder / f"file{RANK}", folder / f"own{RANK}.yaml"
    file.write_text("")
    unknown.write_text(f"directory: {good}\noptimiser: true\n")
    adamw, lbfgs = torch.optim.AdamW, torch.optim.LBFGS
    with raises(Exception, "does not exist"):
        start(adamw, folder / "missing" if is_bad else good, **EVERYTHING)
    with raises(Exception, "file"):
        start(adamw, file if is_bad else good, **EVERYTHING)
    with raises(Exception, "needs no closure, got LBFGS"):
        start(lbfgs if is_bad else adamw, good, **EVERYTHING)
    with raises(Exception, "of an accelerator with delayed_update"):
        start(adamw, good, optimizer=PAGED | {"delayed_update": True, "update_on": "cpu"})
    with raises(ValueError, "got 'optimiser'. Did you mean 'optimizer'?"):
        start(adamw, Section.load(unknown))
    with pytest.MonkeyPatch.context() as patch, raises(ValueError, "got SSDTRAIN_DIRR. Did you mean SSDTRAIN_DIR?"):
        patch.setenv("SSDTRAIN_DIRR", str(good))
        start(adamw, ...)
    if is_bad:
        with torch.autograd.graph.save_on_cpu(), pytest.raises(ValueError, match=r"save_on_cpu.*leave it out"):
            start(adamw, good, **EVERYTHING)
        assert_clean()
    else:
        with raises(RuntimeError, "save_on_cpu"):
            start(adamw, good, **EVERYTHING)


def refused_when_full(folder: Path, make: Callable[[], torch.nn.Module], train: Train) -> None:
    """A full disk of the last rank is an error on all; skipped where nothing can be mounted."""
    start = _untouched(folder, make, train)
    with tmpfs_drive(folder / f"tmpfs{RANK}", 6 << 20) as drive:
        fill(drive.directory, 64 << 10)  # for the blocks that engines try first
        directory = drive.directory if RANK == NUM_RANKS - 1 else own_directory(folder)
        with raises(Exception, "Expected room for"):
            start(torch.optim.AdamW, directory, **EVERYTHING)


def _untouched(folder: Path, make: Callable[[], torch.nn.Module], train: Train) -> Callable[..., None]:
    """`train`, each time with a new model, which has to be as new afterwards."""
    expected = values(make())

    def start(kind: Any, directory: Any, **features: Any) -> None:
        model = make()
        try:
            train(folder, model, kind, directory, **features)
        finally:
            assert_equal(expected, values(model), "model")

    return start


def says_that_nothing_moved(folder: Path, start: Callable[..., Any]) -> None:
    """Of a model all of whose tensors are small: one warning, and why."""
    said: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    vars(handler)["emit"] = said.append
    logging.getLogger("ssdtrain").addHandler(handler)
    try:
        start(torch.optim.AdamW, own_directory(folder))
    finally:
        logging.getLogger("ssdtrain").removeHandler(handler)
    texts = [record.getMessage() for record in said]
    assert len(texts) == 1 and "smaller than min_nbytes" in texts[0], texts


def warns_of_its_version(module: Any) -> None:
    """One that nobody has tried, when the adapter is imported."""
    integrations = importlib.import_module("ssdtrain.integrations")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integrations, "version", lambda _: "99.0")
        with pytest.warns(RuntimeWarning, match=r"got 99\.0: it may well work"):
            importlib.reload(module)


def own_directory(folder: Path) -> Path:
    """One for each rank."""
    found = folder / f"rank{RANK}"
    found.mkdir(exist_ok=True)
    return found


def run_recipe(trainer: str, *arguments: str, name: str = "train.py") -> str:
    """What a recipe prints."""
    before, printed = sys.argv, io.StringIO()
    sys.argv = [name, *arguments]
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(str(RECIPES / trainer / name), run_name="__main__")
    finally:
        sys.argv = before
    return printed.getvalue()
