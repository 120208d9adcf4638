"""Cases of Lightning's Trainer and of Fabric, see `test_trainers.py`."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset
from trainers_tools import (
    ACTIVATIONS,
    EVERYTHING,
    NUM_RANKS,
    PAGED,
    RANK,
    assert_clean,
    assert_equal,
    assert_offloaded,
    local,
    own_directory,
    raises,
    refused_alike,
    refused_when_full,
    run_recipe,
    says_that_nothing_moved,
    state_of,
    values,
)

import ssdtrain
from ssdtrain.api.section import Section
from ssdtrain.integrations.lightning import FabricOffload, Offload

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
WIDTH = 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Module(LightningModule):
    """Raises at a place, if asked to."""

    def __init__(self, fails: str = "", kind: Any = torch.optim.AdamW) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.h = nn.ModuleList(Block() for _ in range(3))
        self.losses: list[torch.Tensor] = []
        self.fails, self.kind = fails, kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.h:
            x = block(x)
        return x

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = self(batch[0]).square().mean()
        if self.fails == "training" and index == 1:
            raise ValueError("training")
        self.losses.append(loss.detach().clone())
        return loss

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        if self.fails == "validation":
            raise ValueError("validation")
        self.losses.append(self(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = self.kind(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


def loader(num: int = 24) -> DataLoader[Any]:
    return DataLoader(
        TensorDataset(torch.randn(num, 64, WIDTH, generator=torch.Generator().manual_seed(1))), batch_size=4
    )


def trainer(folder: Path, *callbacks: Callback, **more: Any) -> Trainer:
    usual = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": NUM_RANKS,
        "strategy": "ddp" if NUM_RANKS > 1 else "auto",
        "max_epochs": 2,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
        "val_check_interval": 1.0,
        "num_sanity_val_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **(usual | more))


def fit(folder: Path, *callbacks: Callback, path: Path | None = None, **more: Any) -> tuple[Trainer, Any]:
    module = Module()
    found = trainer(folder, *callbacks, **more)
    found.fit(module, loader(), loader(8), ckpt_path=path and str(path))
    return found, (module.losses, values(module), [state_of(each) for each in found.optimizers])


def everything(folder: Path) -> None:
    _, expected = fit(folder)
    callback = Offload(own_directory(folder), **EVERYTHING)
    _, found = fit(folder, callback)
    assert_equal(expected, found, "trained")
    assert_offloaded(callback.session)
    assert_clean()


def saved_and_resumed(folder: Path) -> None:
    plain, _ = fit(folder)
    ours, _ = fit(folder, Offload(own_directory(folder), **EVERYTHING))
    for run, name in ((plain, "plain"), (ours, "ours")):
        run.save_checkpoint(folder / name)
    _, expected = fit(folder, path=folder / "plain", max_epochs=3)
    for start, callbacks in (
        ("plain", [Offload(own_directory(folder), **EVERYTHING)]),
        ("ours", []),
        ("ours", [Offload(own_directory(folder), **EVERYTHING)]),
    ):
        _, found = fit(folder, *callbacks, path=folder / start, max_epochs=3)
        assert_equal(expected, found, f"from {start}")


def raised_anywhere(folder: Path) -> None:
    for fails in ("training", "validation"):
        callback = Offload(own_directory(folder), activations=ACTIVATIONS)
        with raises(ValueError, fails):
            trainer(folder, callback, num_sanity_val_steps=0).fit(Module(fails), loader(), loader(8))


def step_in_backward(folder: Path) -> None:
    """Lightning always steps with a closure; two backwards a step."""
    optimizer = PAGED | {"step_in_backward": True}
    _, expected = fit(folder, gradient_clip_val=None)
    _, found = fit(folder, Offload(folder, activations=False, optimizer=optimizer), gradient_clip_val=None)
    assert_equal(expected, found, "trained")
    with raises(ValueError, "Expected gradient_clip_val=0 with step_in_backward, got 0.5", "use offload_gradients"):
        fit(folder, Offload(folder, activations=False, optimizer=optimizer))
    optimizer = PAGED | {"offload_gradients": True}
    _, expected = fit(folder)
    _, found = fit(folder, Offload(folder, activations=False, optimizer=optimizer))
    assert_equal(expected, found, "trained with clipping")


def parameters_before_replicas(folder: Path) -> None:
    """They are away when DistributedDataParallel is made; the state follows with the callback."""
    _, expected = fit(folder)
    module = ssdtrain.offload_parameters(Module(), own_directory(folder), EVERYTHING["parameters"], ["h.*"])
    callback = Offload(own_directory(folder), activations=ACTIVATIONS, optimizer=PAGED)
    found = trainer(folder, callback)
    found.fit(module, loader(), loader(8))
    assert_equal(expected, (module.losses, values(module), [state_of(each) for each in found.optimizers]), "trained")
    assert ssdtrain.parameter_offload(module).stats.read_nbytes
    assert_offloaded(callback.session)


class Look(Callback):
    """After the callback before it."""

    def __init__(self, offload: Offload) -> None:
        self.offload = offload

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert trainer.world_size == 2
        assert_offloaded(self.offload.session)
        assert_clean()


def forked_workers(folder: Path) -> None:
    """Everything is opened in the workers, of which this process hears the weights."""
    callback, found = Offload(own_directory(folder), **EVERYTHING), []
    for callbacks in ([], [callback, Look(callback)]):
        module = Module()
        trainer(folder, *callbacks, strategy="ddp_fork", devices=2).fit(module, loader(), loader(8))
        found.append(values(module))
    assert_equal(*found, "trained")
    assert list(own_directory(folder).iterdir()) == []


def validated_before_and_again(folder: Path) -> None:
    """Validation, training, validation, and training for an epoch more, with one trainer and one callback."""
    callback, found = Offload(own_directory(folder), **EVERYTHING), []
    for callbacks in ([], [callback]):
        module, own = Module(), trainer(folder, *callbacks)
        for max_epochs in (2, 3):
            own.validate(module, loader(8), verbose=False)
            own.fit_loop.max_epochs = max_epochs
            own.fit(module, loader(), loader(8))
            assert_clean()
        found.append((module.losses, values(module), [state_of(each) for each in own.optimizers]))
    assert_equal(*found, "trained")
    assert_offloaded(callback.session)


class Sharded(Module):
    """By FSDP2."""

    def configure_model(self) -> None:
        if not isinstance(next(self.parameters()), DTensor):
            for part in (*self.h, self):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def sharded(folder: Path) -> None:
    """State of DTensors."""
    callback = Offload(own_directory(folder), activations=ACTIVATIONS, optimizer=PAGED | {"chunk_nbytes": "16KiB"})
    found = []
    for callbacks in ([], [callback]):
        module, strategy = Sharded(), ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        own = trainer(folder, *callbacks, strategy=strategy, gradient_clip_val=None)
        own.fit(module, loader(), loader(8))
        assert all(isinstance(p, DTensor) for p in module.parameters())
        found.append(local([module.losses, values(module), [state_of(each)["state"] for each in own.optimizers]]))
    assert_equal(*found, "trained")
    assert_offloaded(callback.session)


def begin(folder: Path, module: Any, kind: Any, directory: Any, **features: Any) -> None:
    module.kind = kind
    try:
        trainer(folder, Offload(directory, **features), num_sanity_val_steps=0).fit(module, loader(), loader(8))
    finally:
        assert module.losses == []


def bad_input(folder: Path) -> None:
    """Each is said before training, on every rank."""
    refused_alike(folder, Module, begin)


def full_disk(folder: Path) -> None:
    refused_when_full(folder, Module, begin)


def nothing_moved(folder: Path) -> None:
    says_that_nothing_moved(folder, lambda _, directory: fit(folder, Offload(directory)))


def unknown_version(folder: Path) -> None:
    """Said when a callback is made."""
    own = sys.modules["ssdtrain.integrations.lightning"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "VERSION", "99.0")
        with pytest.warns(RuntimeWarning, match=r"got 99\.0: it may well work"):
            Offload(folder)


def refused_on_every_rank(folder: Path) -> None:
    missing = folder / "missing" if RANK == NUM_RANKS - 1 else folder
    with raises(Exception, "missing"):
        fit(folder, Offload(missing, **EVERYTHING))
    with raises(ValueError, "Expected one ssdtrain callback, got 2"):
        fit(folder, Offload(folder), Offload(folder))
    with raises(ValueError, f"Expected {'step_in_backward'}=False") if NUM_RANKS > 1 else raises(OSError, "missing"):
        optimizer = {"step_in_backward": True}
        fit(folder, Offload(missing if NUM_RANKS == 1 else folder, optimizer=optimizer), gradient_clip_val=None)


def fabric_with(*callbacks: Any) -> Fabric:
    own = Fabric(
        accelerator="cpu", devices=NUM_RANKS, strategy="ddp" if NUM_RANKS > 1 else "auto", callbacks=list(callbacks)
    )
    own.launch()
    return own


def fabric(folder: Path) -> None:
    def train(*callbacks: Any) -> Any:
        torch.manual_seed(0)
        own = fabric_with(*callbacks)
        model: Any = nn.Sequential()
        model.add_module("h", nn.ModuleList(Block() for _ in range(3)))
        model.forward = lambda x: model.h[2](model.h[1](model.h[0](x)))
        model, optimizer = own.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        for (batch,) in loader():
            loss = model(batch + RANK).square().mean()
            assert_clean()
            own.backward(loss)
            own.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
            optimizer.zero_grad()
        return values(model)

    callback = FabricOffload(own_directory(folder), activations=ACTIVATIONS)
    assert_equal(train(), train(callback), "trained")
    assert_offloaded(callback.session)


def fabric_bad_input(folder: Path) -> None:
    """Each is said when a model is set up, on every rank, and the model stays as it is."""
    good, unknown, is_bad = own_directory(folder), folder / f"own{RANK}.yaml", RANK == NUM_RANKS - 1
    unknown.write_text(f"directory: {good}\noptimiser: true\n")
    features = {name: EVERYTHING[name] for name in ("activations", "parameters")}
    expected = values(Module())

    def set_up(*callbacks: Any) -> None:
        module = Module()
        try:
            fabric_with(*callbacks).setup(module)
        finally:
            assert_equal(expected, values(module), "model")

    with raises(Exception, "does not exist"):
        set_up(FabricOffload(folder / "missing" if is_bad else good, **features))
    with raises(ValueError, "Expected no optimizer state with Fabric"):
        set_up(FabricOffload(good, optimizer=True))
    with raises(ValueError, "Expected one ssdtrain callback, got 2"):
        set_up(FabricOffload(good), FabricOffload(good))
    with raises(ValueError, "got 'optimiser'. Did you mean 'optimizer'?"):
        set_up(FabricOffload(Section.load(unknown)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSDTRAIN_DIRR", str(good))
        with raises(ValueError, "got SSDTRAIN_DIRR. Did you mean SSDTRAIN_DIR?"):
            set_up(FabricOffload())
    with torch.autograd.graph.save_on_cpu(), pytest.raises(ValueError, match=r"save_on_cpu.*leave it out"):
        set_up(FabricOffload(good, **features))
    assert_clean()


def recipe(folder: Path) -> None:
    printed = run_recipe("lightning", "--steps", "4", "--width", "64")
    assert "loss " in printed
