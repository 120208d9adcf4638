"""Cases of Accelerate, see `test_trainers.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from trainers_tools import (
    ACTIVATIONS,
    EVERYTHING,
    NUM_RANKS,
    PAGED,
    RANK,
    Texts,
    assert_clean,
    assert_equal,
    assert_travelled,
    llama,
    own_directory,
    raises,
    run_recipe,
    state_of,
    values,
)

from ssdtrain.integrations.accelerate import prepare


class Run:
    """Accumulation, clipping and evaluation in between, as in Accelerate's examples."""

    def __init__(self, directory: Path | None, **features: Any) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        objects = model, optimizer, DataLoader(Texts(16), batch_size=2), scheduler
        if directory is None:
            found = self.accelerator.prepare(*objects)
        else:
            found = prepare(self.accelerator, *objects, directory=directory, **features)
        self.model, self.optimizer, self.loader, self.scheduler = found
        self.losses: list[torch.Tensor] = []

    def train(self, *, is_clipped: bool = True, fails: str = "") -> Any:
        for step, batch in enumerate(self.loader):
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch).loss
                if fails == "loss" and step == 1:
                    raise KeyboardInterrupt
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and is_clipped:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            assert_clean()
            self.losses.append(loss.detach().clone())
            if step == 3:
                self.model.eval()
                with torch.no_grad():
                    self.losses.append(self.model(**batch).loss)
                self.model.train()
        return self.losses, values(self.accelerator.unwrap_model(self.model)), state_of(self.optimizer)


def everything(folder: Path) -> None:
    expected = Run(None).train()
    ours = Run(own_directory(folder), **EVERYTHING)
    assert_equal(expected, ours.train(), "trained")
    assert_travelled(ours.accelerator.ssdtrain)
    loss = ours.model(**next(iter(ours.loader))).loss  # without accumulate(): forwards are covered
    assert_clean()
    loss.backward()
    with raises(ValueError, "Expected one ssdtrain prepare()"):
        prepare(ours.accelerator, llama(), directory=folder)


def saved_and_resumed(folder: Path) -> None:
    plain, ours = Run(None), Run(own_directory(folder), **EVERYTHING)
    for run in (plain, ours):
        run.train()
        run.accelerator.wait_for_everyone()
    plain.accelerator.save_state(str(folder / "plain"), safe_serialization=False)
    ours.accelerator.save_state(str(folder / "ours"), safe_serialization=False)
    expected = plain.train()[1:]
    for start, features in (("plain", EVERYTHING), ("ours", None), ("ours", EVERYTHING)):
        resumed = Run(own_directory(folder), **features) if features else Run(None)
        resumed.accelerator.load_state(str(folder / start))
        assert_equal(expected, resumed.train()[1:], f"from {start}")


def raised_in_the_middle(folder: Path) -> None:
    ours = Run(own_directory(folder), activations=ACTIVATIONS)
    with raises(KeyboardInterrupt):
        ours.train(fails="loss")


def step_in_backward(folder: Path) -> None:
    expected = Run(None).train(is_clipped=False)
    optimizer = PAGED | {"step_in_backward": True}
    ours = Run(folder, activations=False, optimizer=optimizer)
    assert_equal(expected, ours.train(is_clipped=False), "trained")
    with raises(RuntimeError, "used and freed", "offload_gradients"):
        Run(folder, activations=False, optimizer=optimizer).train()


def refused_on_every_rank(folder: Path) -> None:
    missing = folder / "missing" if RANK == NUM_RANKS - 1 else folder
    with raises(Exception, "missing"):
        Run(missing, **EVERYTHING)


def recipe(folder: Path) -> None:
    printed = run_recipe("accelerate", "--dir", str(folder), "--steps", "4", "--width", "64", "--cpu")
    assert "loss " in printed and "offloaded" in printed
