"""Accelerate: one call in the place of `accelerator.prepare`.

    model, optimizer, loader = ssdtrain.integrations.accelerate.prepare(
        accelerator, model, optimizer, loader, directory="/mnt/nvme", optimizer=True)

[Note: what is covered]
Every forward of a model that was prepared; inside `with accelerator.accumulate(model):` all from there to its end, the
loss included. Either way hooks are off again when it is over, however it ends.
"""

from __future__ import annotations

from typing import Any

import torch

from ssdtrain.api.session import Offload
from ssdtrain.integrations import check_version, require

require("accelerate", "pip install accelerate==1.15.0")

__all__ = ["prepare"]


def prepare(accelerator: Any, *objects: Any, directory: Any = ..., **features: Any) -> Any:
    """`accelerator.prepare(*objects)`, and what `ssdtrain.Offload` does; all ranks call it.

    Args:
        accelerator: yours; afterwards it has the session as `accelerator.ssdtrain`.
        objects: as for `accelerator.prepare`.
        directory: as for `ssdtrain.Offload`.
        features: `activations`, `parameters` and `optimizer`, as there.

    Returns:
        What `accelerator.prepare` returns.

    Raises:
        ValueError: `prepare` was called before with this accelerator; or as `Offload.begin` says, like OSError and
            RuntimeError.
    """
    if hasattr(accelerator, "ssdtrain"):
        raise ValueError("Expected one ssdtrain prepare() for an accelerator, got another: prepare all objects at once")
    session = Offload(directory, **features)
    prepared = accelerator.prepare(*objects)
    found = prepared if len(objects) > 1 else (prepared,)  # several come in a tuple, with FSDP2 in a list
    models = [each for each in found if isinstance(each, torch.nn.Module)]
    optimizers = [each for each in found if isinstance(each, torch.optim.Optimizer)]
    session.begin(models, *optimizers, is_last=lambda: accelerator.sync_gradients)
    for model in models:
        session.cover(model)
    accelerator.accumulate = session.within(accelerator.accumulate)
    accelerator.ssdtrain = session
    return prepared


check_version("accelerate")
