"""Cases of trainers whose models are compiled by Inductor, see `test_trainers.py`: to the bit as without ssdtrain.

What is compiled as a whole is one operator to autograd, which needs all at once: that is said, and of a model that
saves much, how to compile instead.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trainers_accelerate
import trainers_hf
import trainers_lightning
from accelerate.utils import TorchDynamoPlugin
from trainers_tools import (
    ACTIVATIONS,
    PAGED,
    assert_clean,
    assert_equal,
    llama,
    own_directory,
    values,
)

from ssdtrain.api.session import Offload as Session
from ssdtrain.integrations.compiler import compile_backend
from ssdtrain.integrations.lightning import Offload as LightningOffload
from ssdtrain.integrations.transformers import Offload

_REMARKS = "compile every block, or with integrations.compiler.compile_backend", "backward wanted what could have left"


FEATURES = {"activations": ACTIVATIONS, "optimizer": PAGED}


def _assert_moved_or_said(session: Session, *, is_own: bool = False) -> None:
    """Either bytes are offloaded, or it is said why not; the backend of ours does both in any case."""
    stats = session.stats
    assert stats is not None
    says = any(remark in text for text in stats.fallbacks for remark in _REMARKS)
    assert (stats.read_nbytes and not says) if is_own else (stats.read_nbytes or says), stats
    assert session.state_stats[0].read_nbytes


def switch_of_trainer(folder: Path) -> None:
    """`torch_compile=True` compiles the model as a whole."""
    found = []
    for callbacks in ([], [Offload(own_directory(folder), **FEATURES)]):
        torch._dynamo.reset()
        compiled = {"torch_compile": True, "torch_compile_backend": "inductor"}
        trained = trainers_hf.trainer(folder, *callbacks, **compiled)
        trained.train()
        found.append(trainers_hf.outcome(trained))
        assert_clean()
    assert_equal(*found, "trained")
    _assert_moved_or_said(callbacks[0].session)


def own_backend_in_trainer(folder: Path) -> None:
    """A model that was compiled in place before; the trainer's own switch takes no backend but PyTorch's."""
    found = []
    for callbacks in ([], [Offload(own_directory(folder), **FEATURES)]):
        torch._dynamo.reset()
        model = llama()
        model.compile(backend=compile_backend(min_nbytes="2KiB") if callbacks else "inductor")
        trained = trainers_hf.trainer(folder, *callbacks, model=model)
        trained.train()
        found.append(trainers_hf.outcome(trained))
        assert_clean()
    assert_equal(*found, "trained")
    _assert_moved_or_said(callbacks[0].session, is_own=True)


def dynamo_plugin_of_accelerate(folder: Path) -> None:
    found = []
    for directory in (None, own_directory(folder)):
        torch._dynamo.reset()
        features = FEATURES if directory else {}
        run = trainers_accelerate.Run(directory, dynamo=TorchDynamoPlugin(backend="inductor"), **features)
        found.append(run.train())
    assert_equal(*found, "trained")
    _assert_moved_or_said(run.accelerator.ssdtrain)


class _Module(trainers_lightning.Module):
    """Appends to no list where it is compiled: every length would be another graph."""

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss: torch.Tensor = self(batch[0]).square().mean()
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        self.losses.append(outputs["loss"].detach().clone())


def whole_module_in_lightning(folder: Path) -> None:
    _in_lightning(folder, torch.compile)


def own_backend_in_lightning(folder: Path) -> None:
    _in_lightning(folder, lambda module: torch.compile(module, backend=compile_backend(min_nbytes="2KiB")))


def blocks_in_lightning(folder: Path) -> None:
    def compile_blocks(module: Any) -> Any:
        for block in module.h:
            block.compile()
        return module

    _in_lightning(folder, compile_blocks)


def _in_lightning(folder: Path, compiled: Callable[[Any], Any]) -> None:
    """With the backend of ours, which is Inductor, against itself outside a context."""
    found = []
    for callbacks in ([], [LightningOffload(own_directory(folder), **FEATURES)]):
        torch._dynamo.reset()
        module = _Module()
        trainer = trainers_lightning.trainer(folder, *callbacks, limit_val_batches=0, max_epochs=1)
        trainer.fit(compiled(module), trainers_lightning.loader(16))
        found.append([module.losses, values(module)])
        assert_clean()
    assert module.losses
    assert_equal(*found, "trained")
    _assert_moved_or_said(callbacks[0].session)
