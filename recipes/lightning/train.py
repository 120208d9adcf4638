"""Lightning, without a line about ssdtrain: the environment says it.

SSDTRAIN_DIR=/mnt/nvme SSDTRAIN_OPTIMIZER=true python recipes/lightning/train.py --steps 20
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Autoencoder(LightningModule):
    """A few wide layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(8)])

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        """How far the output is from the input."""
        loss = (self.layers(batch[0]) - batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Whose state may leave memory."""
        return torch.optim.AdamW(self.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=512)
    args = parser.parse_args()
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(64 * args.steps, args.width)), batch_size=64)
    trainer = Trainer(max_steps=args.steps, gradient_clip_val=1.0, logger=False, enable_checkpointing=False)
    trainer.fit(Autoencoder(args.width), data)
    print(f"loss {trainer.callback_metrics['loss'].item():.6f}")
    for callback in trainer.callbacks:
        if type(callback).__module__.startswith("ssdtrain"):
            print(callback.session.stats, *callback.session.state_stats, sep="\n")


if __name__ == "__main__":
    main()
