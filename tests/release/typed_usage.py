"""What type checkers are to accept and to refuse; `make lint` runs mypy and pyright on it, nothing runs it.

An ignored line that is no error any more is one.
"""

from __future__ import annotations

import torch

import ssdtrain


def accepted(model: torch.nn.Module, plain: torch.optim.Optimizer) -> None:
    """As in the documentation."""
    policy = ssdtrain.ActivationPolicy(min_nbytes="4MiB", mode="all")
    least: int = policy.min_nbytes
    with ssdtrain.offload_activations("/mnt/nvme", policy, model) as offload:
        model(torch.ones(least)).sum().backward()
    print(offload.stats.stall_seconds, offload.plan)
    optimizer = ssdtrain.offload_optimizer(plain, "/mnt/nvme", {"chunk_nbytes": "8MiB"})
    with optimizer.accumulate():
        pass
    optimizer.clip_grad_norm_(1.0)
    optimizer.flush()
    print(optimizer.stats)
    body = ssdtrain.offload_parameters(torch.nn.Sequential(model), "/mnt/nvme")
    print(body[0])  # as much a Sequential as before


def refused() -> None:
    """Typing errors."""
    ssdtrain.offload_activation  # type: ignore[attr-defined]  # noqa: B018
    ssdtrain.ActivationPolicy(min_bytes="4MiB")  # type: ignore[call-arg]
    ssdtrain.ActivationPolicy(mode="everything")  # type: ignore[arg-type]
    ssdtrain.OptimizerPolicy(update_on="gpu")  # type: ignore[arg-type]
