"""A small training run on CUDA, through every tier, for compute-sanitizer: exits with an error when bits differ."""

from __future__ import annotations

import os
import sys

import torch

import ssdtrain
from ssdtrain.tools.demo.model import GPT, GPTConfig


def train(offload: ssdtrain.ActivationOffload | None) -> list[torch.Tensor]:
    """Losses and parameters after three steps."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(layers=2, width=64, heads=2, sequence=64)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(3):
        tokens = torch.randint(0, 256, (4, 65), generator=torch.Generator().manual_seed(step)).cuda()
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        if offload is None:
            loss = model(x, y)
        else:
            with offload:
                loss = model(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [tensor.cpu() for tensor in (*losses, *(p.detach() for p in model.parameters()))]


def main() -> None:
    """Plain, then each tier."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)  # strictly: else backward of attention is not
    expected = train(None)
    policy = {"min_nbytes": 0, "mode": "all", "staging_nbytes": "256KiB", "prefetch_nbytes": "256KiB"}
    for directory, fields in ((sys.argv[1], {}), (sys.argv[1], {"host_nbytes": "256KiB"}), (None, {})):
        offload = ssdtrain.offload_activations(directory, policy | fields)
        ours = train(offload)
        print(offload.stats)
        offload.close()
        if not all(map(torch.equal, ours, expected)):
            sys.exit("the numbers differ")


if __name__ == "__main__":
    main()
