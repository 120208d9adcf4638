"""Trains through Hugging Face's Trainer, or Lightning, with DeepSpeed, with and without our section; writes what came.

Arguments: the trainer, a folder. One rank, on the CPU.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed_tools  # first: it turns the slow operator off
import torch
from deepspeed_tools import POLICY, ROWS, WIDTH, Model, loss_of, same
from torch.utils.data import Dataset

NUM_STEPS = 3
POLICIES = {"off": None, "on": POLICY, "auto": POLICY | {"mode": "auto", "engine": "auto", "decline_below_nbytes": 0}}


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Random rows, the same every time."""

    def __init__(self) -> None:
        self.rows = torch.randn(NUM_STEPS * ROWS, WIDTH, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.rows[index]}


def config(folder: Path, policy: dict[str, Any] | None) -> dict[str, Any]:
    """A DeepSpeed configuration as one writes it for these trainers."""
    plain = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    if policy is None:
        return plain
    (folder / "spill").mkdir(exist_ok=True)
    return plain | {"ssdtrain": {"enabled": True, "activations": {"directory": str(folder / "spill")} | policy}}


Outcome = tuple[list[torch.Tensor], list[torch.Tensor], int]


def with_transformers(folder: Path, policy: dict[str, Any] | None) -> Outcome:
    """The Trainer, its configuration in a file."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": loss_of(self.model(x))}

    losses: list[torch.Tensor] = []
    engines: list[Any] = []

    class Note(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            engines[:] = [trainer.model_wrapped]

    class Noting(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append((loss[0] if isinstance(loss, tuple) else loss).detach().clone())
            return loss

    file = folder / "ds.json"
    file.write_text(json.dumps(config(folder, policy)))
    arguments = TrainingArguments(
        output_dir=str(folder / "out"), per_device_train_batch_size=ROWS, max_steps=NUM_STEPS, deepspeed=str(file),
        learning_rate=1e-3, lr_scheduler_type="constant", report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, remove_unused_columns=False, logging_steps=1, max_grad_norm=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = Noting(Wrapped(), arguments, train_dataset=Rows(), callbacks=[Note()])
    trainer.train()
    return losses, *_outcome(engines[0])


def with_lightning(folder: Path, policy: dict[str, Any] | None) -> Outcome:
    """Lightning's strategy, its configuration a dict."""
    import lightning
    from lightning.pytorch.strategies import DeepSpeedStrategy

    losses: list[torch.Tensor] = []

    class OnTheCpu(DeepSpeedStrategy):
        """Without the two checks by which Lightning refuses all but CUDA devices; everything else is Lightning's."""

        root_device = torch.device("cpu", 0)

        def setup_environment(self) -> None:
            super(DeepSpeedStrategy, self).setup_environment()

        def setup_distributed(self) -> None:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            loss = loss_of(self.model(batch["x"]))
            losses.append(loss.detach().clone())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    torch.manual_seed(0)
    module = Module()
    own = config(folder, policy)
    del own["optimizer"], own["gradient_accumulation_steps"]  # set by the Trainer
    strategy = OnTheCpu(config=own | {"zero_allow_untested_optimizer": True})
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, max_steps=NUM_STEPS, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(Rows(), batch_size=ROWS))
    return losses, *_outcome(strategy.model)


def _outcome(engine: Any) -> tuple[list[torch.Tensor], int]:
    own = engine.__dict__.get("ssdtrain")
    return deepspeed_tools.parameters_of(engine), own.stats.num_offloaded if own is not None else 0


def main() -> None:
    """Trains three times: without, with everything on disk, and with "auto" in the section."""
    warnings.simplefilter("ignore")
    trainer, folder = sys.argv[1], Path(sys.argv[2])
    train: Callable[[Path, Any], Outcome] = with_transformers if trainer == "transformers" else with_lightning
    outcomes = {name: train(folder, policy) for name, policy in POLICIES.items()}
    losses, parameters, none = outcomes["off"]
    assert none == 0 and len(losses) == NUM_STEPS
    facts = {
        "losses": all(same(losses, outcome[0]) for outcome in outcomes.values()),
        "parameters": all(same(parameters, outcome[1]) for outcome in outcomes.values()),
        "offloaded": min(outcomes["on"][2], outcomes["auto"][2]),
    }
    (folder / "results").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
