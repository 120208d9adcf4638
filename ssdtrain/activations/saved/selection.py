"""Which saved tensors are offloaded where the user wants only some: those marked, and inputs of checkpoints.

Knows storages and who saves; moves nothing.
"""

from __future__ import annotations

import types
from typing import Literal

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ssdtrain.activations.saved.subclasses import inner_tensors
from ssdtrain.store.identity import is_weight

NOT_CHOSEN = "not chosen"

_CHECKPOINTS = (
    "torch/utils/checkpoint.py",
    "deepspeed/runtime/activation_checkpointing/checkpointing.py",
    "megatron/core/tensor_parallel/random.py",
)
_BETWEEN = "torch/autograd/function.py"  # a checkpoint that is an autograd function saves its inputs in `apply`


class Chosen:
    """What is to be offloaded, while everything else stays."""

    def __init__(self, only: Literal["marked", "checkpoint_inputs"]) -> None:
        """Nothing is marked."""
        self._takes_inputs = only == "checkpoint_inputs"
        self._marked: dict[int, StorageWeakRef] = {}  # by the storage's address

    def mark(self, tensor: torch.Tensor) -> None:
        """Whatever shares its memory is offloaded when it is saved from now on, for as long as that memory lives."""
        self._marked = {cdata: weak for cdata, weak in self._marked.items() if not weak.expired()}
        for part in inner_tensors(tensor):
            storage = part.untyped_storage()
            self._marked[storage._cdata] = StorageWeakRef(storage)

    def leaves_alone(self, tensor: torch.Tensor, saver: types.FrameType | None) -> bool:
        """Whether a tensor stays for not being chosen. `saver`: the Python frame whose operator saves it."""
        if self._takes_inputs and _is_checkpoint(saver):
            return False
        if tensor.layout is not torch.strided or isinstance(tensor, torch.nn.Parameter) or is_weight(tensor):
            return False  # stays for a reason of its own
        parts = [part for part in inner_tensors(tensor) if part.layout is torch.strided]
        return not any(self._is_marked(part.untyped_storage()._cdata) for part in parts)

    def _is_marked(self, cdata: int) -> bool:
        weak = self._marked.get(cdata)
        return weak is not None and not weak.expired()


def _is_checkpoint(frame: types.FrameType | None) -> bool:
    if frame is not None and frame.f_code.co_filename.endswith(_BETWEEN):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.endswith(_CHECKPOINTS)
