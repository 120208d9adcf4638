"""The methods of the comparison: plain training, its alternatives, and ssdtrain.

Each is one entry of `METHODS`: a function that gets a model ready, where it changes one, and returns what every step
runs in. One that cannot run here raises `UnavailableError`, whose message says why.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import HashStore, init_process_group
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

import ssdtrain
from ssdtrain.model_blocks import find_blocks

PLAIN = "plain"
NO_TRIP = "nothing leaves: the tensors are in host memory already"


class UnavailableError(Exception):
    """A method that cannot run here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """What a method gets."""

    model: torch.nn.Module
    directory: str
    policy: dict[str, Any]


def plain(setting: Setting) -> Any:
    """Everything stays."""
    return contextlib.nullcontext()


def save_on_cpu(setting: Setting) -> Any:
    """PyTorch's own."""
    return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())


def checkpoint_per_block(setting: Setting) -> Any:
    """PyTorch's own."""
    for block in find_blocks(setting.model).values():
        block.forward = _called(checkpoint, block.forward, use_reentrant=False)
    return contextlib.nullcontext()


def deepspeed_checkpoint(setting: Setting) -> Any:
    """`deepspeed.checkpointing` with inputs of blocks in host memory.

    Without an accelerator its copy to the CPU is the tensor itself, which it then empties: backward would find no
    input. Partitioned over one rank, which copies, it runs. Its checkpoint is reentrant: gradients of a tensor that
    several blocks use (the encoder's result, in t5) are summed block by block, so they differ in the last bit.
    """
    deepspeed = _imported("deepspeed")
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed("gloo")
    own = deepspeed.checkpointing
    own.configure(None, checkpoint_in_cpu=True, partition_activations=not torch.cuda.is_available())
    for block in find_blocks(setting.model).values():
        block.forward = _called(_with_tensors_first(own.checkpoint), block.forward)
    return contextlib.nullcontext()


def transformers_checkpoint(setting: Setting) -> Any:
    """The checkpointing of Transformers' models with `offload`, its own function round our blocks."""
    _need_accelerator()  # it pins memory, which only an accelerator's driver can do
    transformers = _imported("transformers")
    enable = getattr(transformers.PreTrainedModel, "activation_checkpointing_enable", None)
    if enable is None or "offload" not in inspect.signature(enable).parameters:
        raise UnavailableError(f"needs a Transformers with offload, {transformers.__version__} has none")

    class Host(transformers.PreTrainedModel):  # type: ignore[misc]
        """Makes a model one of Transformers'."""

        main_input_name, supports_gradient_checkpointing = "batch", True

        def __init__(self) -> None:
            super().__init__(transformers.PretrainedConfig())
            self.model = setting.model

    blocks = find_blocks(setting.model).values()
    for block in blocks:
        block.gradient_checkpointing = False  # the mark by which it finds what to give its function to
    Host().activation_checkpointing_enable(offload=True)
    for block in blocks:
        block.forward = _called(block._gradient_checkpointing_func, block.forward)
    return contextlib.nullcontext()


def peer(module: str, name: str) -> Callable[[Setting], Any]:
    """A context manager of another package, for accelerators."""

    def get_ready(setting: Setting) -> Any:
        _need_accelerator()
        return getattr(_imported(module), name)()

    return get_ready


def ours(**changes: Any) -> Callable[[Setting], Any]:
    """Ssdtrain with these fields of its policy."""

    def get_ready(setting: Setting) -> Any:
        return ssdtrain.offload_activations(setting.directory, setting.policy | changes, model=setting.model)

    return get_ready


def ours_in_host_memory(setting: Setting) -> Any:
    """Ssdtrain without a drive."""
    if not torch.cuda.is_available():
        raise UnavailableError("host memory is where the tensors are")
    return ssdtrain.offload_activations(None, setting.policy, model=setting.model)


METHODS: dict[str, Callable[[Setting], Any]] = {
    PLAIN: plain,
    "save_on_cpu": save_on_cpu,
    "checkpoint per block": checkpoint_per_block,
    "DeepSpeed checkpoint_in_cpu": deepspeed_checkpoint,
    "Transformers offload": transformers_checkpoint,
    "TRL OffloadActivations": peer("trl.models.activation_offloading", "OffloadActivations"),
    "torchtune OffloadActivations": peer("torchtune.training", "OffloadActivations"),
    "ssdtrain": ours(),
    "ssdtrain, mode all": ours(mode="all"),
    "ssdtrain, recompute all": ours(recompute="all"),
    "ssdtrain, host memory": ours_in_host_memory,
}
UNHOOKED = (PLAIN, "checkpoint per block")
"""Where saved tensors can be counted by hooks of our own."""


def remark_on(method: str) -> str | None:
    """What a reader has to know of a method that runs here."""
    to_host = method in ("save_on_cpu", "DeepSpeed checkpoint_in_cpu")
    return NO_TRIP if to_host and not torch.cuda.is_available() else None


def _need_accelerator() -> None:
    if not torch.cuda.is_available():
        raise UnavailableError("needs an accelerator")


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"not installed: {error}") from error


def _called(function: Any, forward: Any, **options: Any) -> Any:
    return lambda *args, **kwargs: function(forward, *args, **options, **kwargs)


def _with_tensors_first(function: Any) -> Any:
    """Calls DeepSpeed's checkpoint as it needs it: the tensors with gradients as arguments, the rest bound.

    It takes no nested arguments, and it empties those it gets, which other blocks may use too: hence views.
    """

    def run(forward: Any, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        views = [leaves[i].view_as(leaves[i]) for i in places]
        for i in places:
            leaves[i] = None  # only the checkpoint holds them

        def again(*tensors: torch.Tensor) -> Any:
            filled = list(leaves)
            for i, tensor in zip(places, tensors, strict=True):
                filled[i] = tensor
            own_args, own_kwargs = tree_unflatten(filled, tree)
            return forward(*own_args, **own_kwargs)

        return function(again, *views)

    return run
