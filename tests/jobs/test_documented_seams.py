"""The few lines that the documentation has for trainers which cannot be installed here, run as they stand there.

Each runs in a stand-in for the part of its trainer that it touches. Where the trainer's source is at hand (nothing of
it is imported), the stand-in is checked against it: the same methods with the same arguments.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import same_bits
from folders import ROOT
from torch import nn

import ssdtrain
from ssdtrain.store.saved_tensors import innermost_hooks

POLICY = {"min_nbytes": 0, "mode": "all", "staging_nbytes": "64KiB"}
STATE = {"min_nbytes": 0, "staging_nbytes": "64KiB", "chunk_nbytes": "8KiB"}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.h = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(64, 64), nn.GELU())])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.h(x).square().mean()
        return loss


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, 64, generator=generator) for _ in range(4)]


# -- stand-ins ---------------------------------------------------------------------------------------------------------


class Titan:
    """torchtitan's trainer, and what its base class demands of those who derive from it."""

    class Config:
        __slots__ = ()

    def __init_subclass__(cls) -> None:
        if "__slots__" not in vars(vars(cls).get("Config", Titan.Config)):
            raise TypeError(f"{cls.__name__}.Config must use @dataclass(kw_only=True, slots=True)")

    def __init__(self, config: Any) -> None:
        self.model_parts = [Model()]
        self.optimizer = torch.optim.AdamW(self.model_parts[0].parameters())

    def forward_backward_step(
        self, *, input_dict: dict[str, torch.Tensor], labels: Any, global_valid_tokens: Any
    ) -> torch.Tensor:
        loss: torch.Tensor = self.model_parts[0](input_dict["input"])
        loss.backward()
        return loss.detach()

    def train(self) -> Any:
        losses = []
        for batch in batches():
            losses.append(self.forward_backward_step(input_dict={"input": batch}, labels=None, global_valid_tokens=1))
            self.optimizer.step()
            self.optimizer.zero_grad()
        return losses, self.model_parts[0].state_dict()


class Tune:
    """A recipe of torchtune."""

    def setup(self, cfg: Any) -> None:
        import contextlib

        self.model = Model()
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.activations_handling_ctx: Any = contextlib.nullcontext()

    def train(self) -> Any:
        losses = []
        for batch in batches():
            with self.activations_handling_ctx:
                loss = self.model(batch)
            loss.backward()
            losses.append(loss.detach())
            self.optimizer.step()
            self.optimizer.zero_grad()
        return losses, self.model.state_dict()


class ComposerCallback:
    def fit_start(self, state: Any, logger: Any) -> None:
        pass

    def before_train_batch(self, state: Any, logger: Any) -> None:
        pass

    def after_train_batch(self, state: Any, logger: Any) -> None:
        pass

    def fit_end(self, state: Any, logger: Any) -> None:
        pass

    def close(self, state: Any, logger: Any) -> None:
        pass


class State:
    """Composer's."""

    def __init__(self) -> None:
        self.model = Model()
        self._optimizers = [torch.optim.AdamW(self.model.parameters())]

    @property
    def optimizers(self) -> list[Any]:
        return self._optimizers

    @optimizers.setter
    def optimizers(self, optimizers: Any) -> None:
        self._optimizers[:] = optimizers


def compose(callback: ComposerCallback, *, fails: bool = False) -> Any:
    """Composer's trainer; `close` comes when it is closed, also after an error."""
    try:
        return fit(callback, fails=fails)
    finally:
        callback.close(State(), None)


def fit(callback: ComposerCallback, *, fails: bool) -> Any:
    state, losses = State(), []
    callback.fit_start(state, None)
    for batch in batches():
        callback.before_train_batch(state, None)
        for part in batch.chunk(2):
            loss = state.model(part)
            if fails:
                raise ValueError("in the middle")
            loss.backward()
            losses.append(loss.detach())
        callback.after_train_batch(state, None)
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad()
    callback.fit_end(state, None)
    return losses, state.model.state_dict()


class Engine:
    """Ignite's."""

    def __init__(self, process_function: Callable[[Any, Any], Any]) -> None:
        self._process = process_function
        self.outputs: list[Any] = []

    def run(self, data: Any, max_epochs: int = 1) -> Engine:
        self.outputs = [self._process(self, batch) for batch in data]
        return self


# -- the lines ---------------------------------------------------------------------------------------------------------


def lines_of(heading: str) -> str:
    text = (ROOT / "docs" / "tutorials" / "trainers.md").read_text()
    section = text.partition(f"\n### {heading}\n")[2].partition("\n## ")[0].partition("\n### ")[0]
    block = re.findall(r"(?:^(?: {4}.*)?\n)+", section, re.MULTILINE)
    return textwrap.dedent(max(block, key=len))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs the lines under a heading, with modules and names that they find."""

    def run_lines(heading: str, modules: dict[str, dict[str, Any]], **names: Any) -> dict[str, Any]:
        for name, attributes in modules.items():
            parts = name.split(".")
            for i in range(len(parts)):
                monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), types.ModuleType(parts[i]))
            vars(sys.modules[name]).update(attributes)
        known = {"ssdtrain": ssdtrain, "DIRECTORY": tmp_path, "POLICY": POLICY, "STATE": STATE, **names}
        exec(compile(lines_of(heading), heading, "exec"), known)
        return known

    yield run_lines
    assert innermost_hooks() is None and list(tmp_path.iterdir()) == []


Run = Callable[..., dict[str, Any]]


def test_torchtitan(run: Run) -> None:
    trainer = run("torchtitan", {"torchtitan.trainer": {"Trainer": Titan}})["OffloadTrainer"](None)
    assert same_bits(Titan(None).train(), trainer.train())
    assert trainer.offload.stats.read_nbytes
    trainer.offload.close()


def test_torchtune(run: Run) -> None:
    made = run("torchtune", {"recipe": {"FullFinetuneRecipeSingleDevice": Tune}})["OffloadRecipe"]
    plain, ours = Tune(), made()
    plain.setup(None)
    ours.setup(None)
    assert same_bits(plain.train(), ours.train())
    assert ours.activations_handling_ctx.stats.read_nbytes
    ours.activations_handling_ctx.close()


def test_composer(run: Run) -> None:
    callback = run("Composer", {"composer": {"Callback": ComposerCallback}})["Offload"]()
    assert same_bits(compose(ComposerCallback()), compose(callback))
    assert callback.session.stats.read_nbytes and callback.session.state_stats[0].read_nbytes
    callback.session.close()
    with pytest.raises(ValueError, match="in the middle"):
        compose(callback, fails=True)
    assert innermost_hooks() is None
    callback.session.close()


def test_ignite(run: Run) -> None:
    found, plain = [], Model()
    optimizer = torch.optim.AdamW(plain.parameters())
    for batch in batches():
        loss = plain(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model = Model()
    known = run(
        "Ignite",
        {"ignite.engine": {"Engine": Engine}},
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        batches=batches(),
    )
    found = [dict(plain.state_dict()), dict(model.state_dict())]
    assert same_bits(*found)
    assert known["session"].stats.read_nbytes and known["session"].state_stats[0].read_nbytes
    known["session"].close()


# -- against the source ------------------------------------------------------------------------------------------------

OF_COMPOSER = ("fit_start", "before_train_batch", "after_train_batch", "fit_end", "close")
OF_BRIDGE = ("on_train_start", "on_train_end")
SEAMS = [
    ("torchtitan", "trainer.py", "Trainer", {"forward_backward_step": ["input_dict", "labels", "global_valid_tokens"]}),
    ("composer", "core/callback.py", "Callback", {event: ["state", "logger"] for event in OF_COMPOSER}),
    ("ignite", "engine/engine.py", "Engine", {"run": ["data", "max_epochs"], "__init__": ["process_function"]}),
    ("megatron.bridge", "training/callbacks.py", "Callback", {event: ["context"] for event in OF_BRIDGE}),
]


def source_of(package: str, path: str) -> Path | None:
    """The file, where the package lies on the path; nothing of it is imported."""
    candidates = [Path(folder, *package.split("."), path) for folder in sys.path if folder]
    return next((candidate for candidate in candidates if candidate.exists()), None)


@pytest.mark.parametrize("package, path, name, methods", SEAMS, ids=[seam[0] for seam in SEAMS])
def test_stand_ins_are_like_the_source(package: str, path: str, name: str, methods: dict[str, list[str]]) -> None:
    source = source_of(package, path)
    if source is None:
        pytest.skip(f"{package} is not installed: its source is looked at where it is")
    tree = ast.parse(source.read_text())
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    own = {node.name: node.args for node in found.body if isinstance(node, ast.FunctionDef)}
    for method, arguments in methods.items():
        given = [argument.arg for argument in (*own[method].args, *own[method].kwonlyargs)]
        assert set(arguments) <= set(given), (method, given)
