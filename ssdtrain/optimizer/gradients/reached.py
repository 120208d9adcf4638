"""Which parameters a backward pass reaches: those of one optimizer, of several, or some of them more than once.

Knows parameters and autograd's nodes; neither optimizers nor gradients.

[Note: whose backward it is]
With `step_in_backward` a backward pass updates what it reaches. That of a generator's loss reaches the discriminator
too, whose gradients plain training drops: here it would be updated. Nothing in a pass says for whom it is, so one that
reaches parameters of several optimizers is refused before it changes anything, unless they say that they step together.
Optimizers of a process know of each other for that, whoever made them: autograd's graph is the process's, too.

[Note: a backward inside a backward]
A reentrant checkpoint runs a backward pass of its own for every segment. A parameter that several of them share, or one
of them and the rest of the model, gets its gradient in several passes, none of which knows of the others: after the
first it must not be updated. Where there are such checkpoints, gradients of the first step stay in memory until
`step()`, and how often each arrives is counted: from then on only those that arrive several times stay.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from ssdtrain.policy import OptimizerPolicy


@dataclass(frozen=True)
class Loop:
    """What is known of the loop that trains, besides the policy."""

    is_last: Callable[[], bool] | None = None
    """Says of a backward that runs whether it is the last one of its step, for who knows without `accumulate`."""
    reads_norms: bool = False
    """Whether it logs the norms of gradients, also of those that `step_in_backward` has used."""


class Reach:
    """One optimizer's part in backward passes."""

    _everybody: ClassVar[weakref.WeakSet[Reach]] = weakref.WeakSet()

    def __init__(
        self, policy: OptimizerPolicy, optimizer: str, name_of: Callable[[torch.Tensor], str], loop: Loop
    ) -> None:
        """Known to the others from now on."""
        self._is_last = loop.is_last
        self.parameters: Collection[torch.Tensor] = ()
        self._num_accumulating = 0  # `accumulate` that are entered
        self._steps, self._optimizer, self._name_of = policy.step_in_backward, optimizer, name_of
        self._everybody.add(self)

    def note_parameters(self, parameters: Collection[torch.Tensor]) -> None:
        """All that the optimizer has from here on."""
        self.parameters = parameters

    def leave(self) -> None:
        """The optimizer is closed: others do not look at its parameters any more."""
        self._everybody.discard(self)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Inside, backward passes are not for this optimizer, or not the last ones of a step."""
        self._num_accumulating += 1
        try:
            yield
        finally:
            self._num_accumulating -= 1

    @property
    def is_accumulating(self) -> bool:
        """Whether somebody is inside `accumulate`, in whatever order they leave, or says that more backwards follow."""
        return self._num_accumulating > 0 or (self._is_last is not None and not self._is_last())

    def check(self) -> None:
        """Looks whom else the backward pass that runs reaches.

        Raises:
            RuntimeError: it reaches parameters of another optimizer, which may be the one that it is for.
        """
        for other in [other for other in self._everybody if other is not self and not other.is_accumulating]:
            if self._steps == "together" and other._steps in ("together", False):
                continue
            found = next((p for p in list(other.parameters) if p not in self.parameters and _is_reached(p)), None)
            if found is not None:
                raise RuntimeError(
                    "Expected a backward with step_in_backward that reaches parameters of one optimizer, got one that "
                    f"reaches those of {self._optimizer} and {other._name_of(found)} of {other._optimizer}; nothing "
                    "has changed yet. If it is for one of them only, run it in `with optimizer.accumulate():` of the "
                    "other one, or with requires_grad_(False) on its parameters; if it is for both, give each the "
                    "policy {'step_in_backward': 'together'}"
                )


def _is_reached(parameter: torch.Tensor) -> bool:
    if not parameter.requires_grad or torch._C._current_graph_task_id() < 0:
        return False
    with torch._C.DisableTorchFunctionSubclass():  # nobody's values are wanted
        return torch._C._will_engine_execute_node(get_gradient_edge(parameter).node)


def has_reentrant_checkpoints() -> bool:
    """Whether a graph has some: PyTorch's and those of other frameworks are functions of one name.

    The collector is asked for the nodes alone: one that holds all objects, half-built tuples too, breaks other threads.
    """
    kinds = [kind for kind in BackwardCFunction.__subclasses__() if kind.__name__ == "CheckpointFunctionBackward"]
    return any(isinstance(holder, kind) for kind in kinds for holder in gc.get_referrers(kind))


def weakly(method: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
    """A hook for a parameter that does not keep the optimizer alive, which keeps the parameter alive."""
    reference = weakref.WeakMethod(method)

    def hook(parameter: torch.Tensor) -> None:
        alive = reference()
        if alive is not None:
            alive(parameter)

    return hook
