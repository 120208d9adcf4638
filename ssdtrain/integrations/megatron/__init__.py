"""Megatron: offloads activations of Megatron-LM, megatron-core and Megatron-Bridge. Knows how each is called.

Every forward step runs inside `offload_activations`; backward needs no hook. Nothing of Megatron is patched.

[Note: one error on every rank]
A rank that cannot offload must not leave the others waiting in a collective, so all ranks compare notes before one
raises. They do it where all of them come by: in `offload_schedule` itself and before its first step; in
`wrap_forward_step` when the process group exists already. Megatron-LM makes it later, and with several pipeline stages
the first forward steps of the ranks wait for each other: there the first step is trained without offloading on the rank
that cannot, and the notes are compared when that step's gradients are finalised (Megatron-LM always does that; in
a loop that does not, `wrap_forward_step` raises at once, on that rank).

Example:
    >>> pretrain(datasets, model, ModelType.encoder_or_decoder, wrap_forward_step(forward_step, get_args),
    ...          extra_args_provider=add_arguments)                       # Megatron-LM: --ssdtrain-dir /mnt/nvme
    >>> schedule = offload_schedule(get_forward_backward_func(), "/mnt/nvme/{local_rank}")  # megatron-core
    >>> losses = schedule(forward_step_func=forward_step, model=model, ...)
    >>> pretrain(config, forward_step, callbacks=[Offload("/mnt/nvme/{local_rank}")])        # Megatron-Bridge
"""

from ssdtrain.integrations.arguments import add_arguments
from ssdtrain.integrations.megatron.bridge import Offload
from ssdtrain.integrations.megatron.core import offload_schedule
from ssdtrain.integrations.megatron.lm import wrap_forward_step

__all__ = ["Offload", "add_arguments", "offload_schedule", "wrap_forward_step"]
