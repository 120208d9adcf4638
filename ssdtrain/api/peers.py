"""`OffloadActivations` as TRL and torchtune have it, on this package's engine: same arguments, same place in a script.

Knows their arguments and imports neither. In place of theirs, a drive may stand behind it.

    trl.models.activation_offloading.OffloadActivations = partial(OffloadActivations, directory="/mnt/nvme")
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ssdtrain.activations.offload import ActivationOffload
from ssdtrain.api.ranks import path_fields
from ssdtrain.io.files.paths import absolute_directories
from ssdtrain.policy import ActivationPolicy

__all__ = ["OffloadActivations"]


class OffloadActivations(ActivationOffload):
    """A context inside which saved activations of at least `min_offload_size` bytes leave memory.

    Memory falls by what autograd holds between forward and backward, to pinned host memory or, with `directory`, to a
    drive; results are equal to the bit. Unlike the classes that it stands for it moves tensors on the CPU too, where
    there is a drive, deduplicates them by storage, and checks for changes in place.
    """

    def __init__(
        self,
        use_pin_memory: bool = True,
        use_streams: bool | None = True,
        *,
        min_offload_size: int = 1024,
        max_fwd_stash_size: int = 5,
        directory: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        policy: ActivationPolicy | Mapping[str, Any] | None = None,
    ) -> None:
        """Opens the engine.

        Args:
            use_pin_memory: host memory is pinned in any case; False is noted in `stats.fallbacks`.
            use_streams: copies run beside the computation in any case; False is noted there too.
            min_offload_size: bytes; smaller tensors stay. By name, as TRL and torchtune have it in different places.
            max_fwd_stash_size: at least 1. What is on its way out is bounded by bytes, `staging_nbytes` of the policy.
            directory: as in `offload_activations`; None: pinned host memory, for tensors of an accelerator.
            policy: fields that those classes do not have; `mode` is "all" and `min_nbytes` `min_offload_size` unless
                it says otherwise.

        Raises:
            ValueError: `max_fwd_stash_size` is less than 1, or the policy has an unknown key or a bad value.
            OSError: a directory is missing, not writable or full.
        """
        if max_fwd_stash_size < 1:
            raise ValueError(f"Expected max_fwd_stash_size of at least 1, got {max_fwd_stash_size}; leave it out")
        given = ActivationPolicy.of(policy).model_dump(exclude_unset=True)
        chosen = ActivationPolicy.of({"mode": "all", "min_nbytes": min_offload_size} | given)
        super().__init__(None if directory is None else absolute_directories(directory, path_fields()), chosen)
        if not use_pin_memory:
            self.note("use_pin_memory=False is not used: staging memory is pinned where there is an accelerator")
        if use_streams is False:
            self.note("use_streams=False is not used: copies run beside the computation, and results are the same")

    def update_model_params(self, model: torch.nn.Module) -> None:
        """Says which tensors are weights, which stay in memory; they are recognised without, mostly."""
        self.mark_weights([*model.parameters(), *model.buffers()])
