"""Inductor with an edited partition: which options it needs, and which it cannot have.

Knows Inductor's options; what is edited is in `partition`.

[Note: memory that Inductor may write to]
In forward the engine copies what is saved while the graph goes on: no buffer is taken for other values after its last
use, nor written to in place. In backward, too, Inductor makes some operators work in place: `wait_tensor` is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files

from ssdtrain.integrations.compiler.partition import partition

if not hasattr(torch._inductor.config, "custom_partitioner_fn"):
    raise ImportError("Inductor takes no partitioner")

_OPTIONS = {"allow_buffer_reuse": False, "inplace_buffers": False, "memory_planning": False, "triton.cudagraphs": False}


class Partitioner(CustomPartitionerFn):
    """What Inductor calls in the place of PyTorch's partitioner."""

    def __init__(self, min_nbytes: int) -> None:
        """What is smaller stays."""
        self._min_nbytes = min_nbytes

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **options: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The two graphs."""
        return partition(gm, joint_inputs, min_nbytes=self._min_nbytes, may_change=True, **options)

    def uuid(self) -> Any:
        """What the graphs depend on, for Inductor's cache."""
        files = sorted(str(path) for path in Path(__file__).parent.glob("*.py"))
        return get_hash_for_files(tuple(files), str(self._min_nbytes))


def inductor(
    partitioner: Partitioner,
    gm: fx.GraphModule,
    inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend; `mode` and `options` are those of `torch.compile`.

    Raises:
        ValueError: options that cannot be had.
    """
    asked = {**torch._inductor.list_mode_options(mode or "default"), **(options or {})}
    if asked.get("triton.cudagraphs"):
        raise ValueError(
            f"Expected a mode without CUDA graphs, which replay kernels and call no operator, got mode={mode!r} and "
            f"options={dict(options or {})}; use mode='max-autotune-no-cudagraphs', or none"
        )
    if "custom_partitioner_fn" in asked:
        raise ValueError(
            "Expected no custom_partitioner_fn beside compile_backend, which is one; leave one of them out"
        )
    compiled: Callable[..., Any] = torch._inductor.compile(
        gm, inputs, {**asked, **_OPTIONS, "custom_partitioner_fn": partitioner}
    )
    return compiled
