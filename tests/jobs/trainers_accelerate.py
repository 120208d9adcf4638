"""Cases of Accelerate, see `test_trainers.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
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
    assert_offloaded,
    llama,
    own_directory,
    raises,
    refused_alike,
    refused_when_full,
    run_recipe,
    says_that_nothing_moved,
    state_of,
    values,
    warns_of_its_version,
)

import ssdtrain
from ssdtrain.integrations.accelerate import prepare


class Run:
    """Accumulation, clipping and evaluation in between, as in Accelerate's examples."""

    def __init__(self, directory: Any, kind: Any = torch.optim.AdamW, model: Any = None, **features: Any) -> None:
        plugin, dynamo = features.pop("plugin", None), features.pop("dynamo", None)
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=2, fsdp_plugin=plugin, dynamo_plugin=dynamo
        )
        if plugin is not None:  # which Accelerate leaves aside without a GPU
            plugin.cpu_offload = None
            state = self.accelerator.state
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
        model = llama() if model is None else model
        optimizer = kind(model.parameters(), lr=1e-2)
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
    assert_offloaded(ours.accelerator.ssdtrain)
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


def gradients_away(folder: Path) -> None:
    """Clipping reads all of them."""
    expected = Run(None).train()
    ours = Run(folder, activations=False, optimizer=PAGED | {"offload_gradients": True})
    assert_equal(expected, ours.train(), "trained")
    assert_offloaded(ours.accelerator.ssdtrain)


def parameters_before_replicas(folder: Path) -> None:
    """They are away when DistributedDataParallel is made; the state follows with `prepare`."""
    expected = Run(None).train()
    model = ssdtrain.offload_parameters(llama(), own_directory(folder), EVERYTHING["parameters"])
    ours = Run(own_directory(folder), model=model, activations=ACTIVATIONS, optimizer=PAGED)
    assert_equal(expected, ours.train(), "trained")
    assert ssdtrain.parameter_offload(model).stats.read_nbytes
    assert_offloaded(ours.accelerator.ssdtrain)


def sharded(folder: Path) -> None:
    """State of DTensors, after FSDP2."""
    found = []
    for features in (None, {"activations": ACTIVATIONS, "optimizer": PAGED}):
        run = Run(own_directory(folder) if features else None, plugin=plugin(), **(features or {}))
        assert all(isinstance(p, DTensor) for p in run.model.parameters())
        losses, weights, _ = run.train()
        found.append([losses, {name: value.to_local() for name, value in weights.items()}])
    assert_equal(*found, "trained")
    assert_offloaded(run.accelerator.ssdtrain)


def plugin(**more: Any) -> FullyShardedDataParallelPlugin:
    names = ["LlamaDecoderLayer"]
    wrap = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": names}
    return FullyShardedDataParallelPlugin(fsdp_version=2, **wrap, **more)


def own_offloading_when_sharded(folder: Path) -> None:
    """FSDP2's inputs of checkpoints in host memory are refused, however they were asked for; checkpoints are not."""
    asked = plugin(activation_checkpointing=True, activation_checkpointing_offload=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
        patch.setenv("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "true")
        launched = plugin()
    for own in (asked, launched):
        with raises(ValueError, "beside ssdtrain: turn activation_checkpointing_offload of the FSDP plugin off"):
            Run(own_directory(folder), plugin=own, activations=ACTIVATIONS)
    found = []
    for features in (None, {"activations": ACTIVATIONS}):
        run = Run(
            own_directory(folder) if features else None, plugin=plugin(activation_checkpointing=True), **features or {}
        )
        found.append(run.train()[0])
    assert_equal(*found, "trained")
    assert_offloaded(run.accelerator.ssdtrain)


def begin(_: Path, model: Any, kind: Any, directory: Any, **features: Any) -> None:
    Run(directory, kind, model, **features)


def bad_input(folder: Path) -> None:
    """Each is said by `prepare`, on every rank."""
    refused_alike(folder, llama, begin)


def full_disk(folder: Path) -> None:
    refused_when_full(folder, llama, begin)


def nothing_moved(folder: Path) -> None:
    says_that_nothing_moved(folder, lambda _, directory: Run(directory).train())


def unknown_version(folder: Path) -> None:
    warns_of_its_version(sys.modules["ssdtrain.integrations.accelerate"])


def refused_on_every_rank(folder: Path) -> None:
    missing = folder / "missing" if RANK == NUM_RANKS - 1 else folder
    with raises(Exception, "missing"):
        Run(missing, **EVERYTHING)


def recipe(folder: Path) -> None:
    printed = run_recipe("accelerate", "--dir", str(folder), "--steps", "4", "--width", "64", "--cpu")
    assert "loss " in printed and "offloaded" in printed
