"""Accelerate with activations and optimizer state on a drive: `prepare` of ssdtrain instead of the accelerator's.

accelerate launch recipes/accelerate/train.py --dir "/mnt/nvme{local_rank}" --steps 20
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ssdtrain.integrations.accelerate import prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where spill files go")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(0)
    accelerator = Accelerator(cpu=args.cpu, gradient_accumulation_steps=2)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(args.width, args.width), nn.GELU()) for _ in range(8)])
    optimizer = torch.optim.AdamW(model.parameters())
    data = torch.randn(64 * args.steps * accelerator.num_processes, args.width)
    model, optimizer, loader = prepare(
        accelerator,
        model,
        optimizer,
        DataLoader(TensorDataset(data), batch_size=64),
        directory=args.dir,
        activations={"min_nbytes": "16KiB", "decline_below_nbytes": 0},  # a toy: nothing is gained
        optimizer={"chunk_nbytes": "4MiB"},
    )
    for (batch,) in loader:
        with accelerator.accumulate(model):
            loss = (model(batch) - batch).square().mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.print(f"loss {loss.item():.6f}")
    accelerator.print(accelerator.ssdtrain.stats, *accelerator.ssdtrain.state_stats, sep="\n")
    accelerator.end_training()


if __name__ == "__main__":
    main()
