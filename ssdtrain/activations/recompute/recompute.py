"""Runs blocks of a model a second time in backward instead of keeping what they saved.

Wraps a block's forward from outside in PyTorch's non-reentrant checkpoint, which restores random numbers and autocast.
Its tensor arguments, keyword and nested ones too, become inputs of the checkpoint, so that the hooks around see and
send them. Which blocks are recomputed is decided elsewhere and looked up at every call.

[Note: what may run twice]
A block may when nothing but its result shows that it ran. One with running statistics is never chosen, nor one that was
seen to change a buffer, a parameter or an argument in place. The call in which that is seen has run once and stays so:
what it saved is kept as if it had not been chosen, see `first_run`. One that is called with an
argument that is neither a tensor nor a plain value, such as a key-value cache, runs once in that call.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from ssdtrain.activations.recompute.first_run import CheckVersion, FirstRun, SecondRun, State
from ssdtrain.model_blocks import find_blocks
from ssdtrain.policy import ActivationPolicy
from ssdtrain.stats import Counters
from ssdtrain.store.saved_tensors import allows_mutation

logger = logging.getLogger("ssdtrain")

_PLAIN = (torch.Tensor, type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_MISSING = object()


class Candidates:
    """The blocks of one model, and which of them may run twice, as far as is known."""

    def __init__(self, model: torch.nn.Module) -> None:
        """All may."""
        self.blocks = find_blocks(model)
        self.impure: set[str] = set()
        """Those that were seen to change something, see [Note: what may run twice]."""

    def names(self) -> list[str]:
        """Blocks that may be recomputed."""
        return [name for name in self.blocks if name not in self.impure]


class Recompute:
    """Has blocks of a model run twice."""

    def __init__(
        self,
        candidates: Candidates,
        counters: Counters,
        check: CheckVersion,
        chosen: Callable[[], frozenset[str]] | None = None,
    ) -> None:
        """`chosen` says which, at every call; None: all. Remarks go to `counters`."""
        self._blocks, self._impure = candidates.blocks, candidates.impure
        self._chosen = chosen
        self._counters = counters
        self._check = check
        self._seen: set[str] = set()
        self._replaced: list[tuple[torch.nn.Module, _Forward]] = []
        self._num_entered = 0
        if not self._blocks:
            self._note(
                "recompute: the model has no repeated blocks in a ModuleList or Sequential; nothing is recomputed"
            )

    def enter(self) -> None:
        """Wraps the blocks' forwards; nested calls are counted."""
        self._num_entered += 1
        if self._num_entered == 1:
            for name, block in self._blocks.items():
                forward = _Forward(self, name, block)
                self._replaced.append((block, forward))
                block.forward = forward

    def leave(self) -> None:
        """The forwards are what they were."""
        self._num_entered = max(0, self._num_entered - 1)  # an interrupt may come before `enter` has counted
        while self._num_entered == 0 and self._replaced:
            block, forward = self._replaced.pop()
            if block.__dict__.get("forward") is not forward:  # somebody else's by now, who may call ours
                continue
            if forward.own is _MISSING:
                del block.__dict__["forward"]
            else:
                block.forward = forward.own

    def run(self, forward: _Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls a block's own forward, which may run a second time."""
        if not self._num_entered or not torch.is_grad_enabled() or allows_mutation():
            return forward.call(*args, **kwargs)
        name = forward.name
        is_chosen = self._chosen is None or name in self._chosen()
        if is_chosen and name not in self._impure and self._may_run_twice(name, forward.block, args, kwargs):
            return self._run_twice(forward, args, kwargs)
        return self._watched(forward, args, kwargs)

    def _may_run_twice(self, name: str, block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if any(_keeps_statistics(module) for module in block.modules()):
            self._refuse(name, "its buffers")
            return False
        if not all(isinstance(parameter, torch.nn.Parameter) for parameter in block.parameters()):
            self._note("recompute: a block with other weights than its own (functional_call) is not run twice")
            return False
        strange = [leaf for leaf in tree_flatten((args, kwargs))[0] if not isinstance(leaf, _PLAIN)]
        if strange:
            self._note(f"recompute: a block called with {type(strange[0]).__name__} is not run twice: it may change it")
        return not strange

    @_disable_dynamo  # which knows PyTorch's checkpoint only without hooks in front
    def _run_twice(self, forward: _Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, tree = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        tensors = [leaves[i] for i in places]
        for i in places:
            leaves[i] = None  # only the checkpoint holds them, or they could not leave

        def again(*inputs: torch.Tensor) -> Any:
            filled = list(leaves)
            for i, tensor in zip(places, inputs, strict=True):
                filled[i] = tensor
            own_args, own_kwargs = tree_unflatten(filled, tree)
            return forward.call(*own_args, **own_kwargs)

        state, first = self._state(forward, tensors), FirstRun(self._check)
        change = None
        try:
            contexts = first, SecondRun(forward.block, self._check)
            result = checkpoint(again, *tensors, use_reentrant=False, context_fn=lambda: contexts)
            change = state.change()
        finally:
            first.end(keeps=change is not None)
        if change is not None:
            self._refuse(forward.name, change)
        return result

    def _watched(self, forward: _Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if forward.name in self._impure:
            return forward.call(*args, **kwargs)
        state = self._state(forward, [leaf for leaf in tree_flatten((args, kwargs))[0] if _is_tensor(leaf)])
        result = forward.call(*args, **kwargs)
        change = state.change()
        if change is not None:
            self._refuse(forward.name, change)
        return result

    def _state(self, forward: _Forward, tensors: list[torch.Tensor]) -> State:
        is_new = forward.name not in self._seen
        self._seen.add(forward.name)
        return State(forward.block, tensors, with_values=is_new)

    def _note(self, text: str) -> None:
        if self._counters.fall_back(text):
            logger.warning("%s", text)

    def _refuse(self, name: str, change: str) -> None:
        self._impure.add(name)
        self._note(f"recompute: block {name!r} changes {change} in forward and is not run twice")


class _Forward:
    """Stands for a block's forward; a copy of it, pickled or not, is the plain forward of the copied block."""

    def __init__(self, recompute: Recompute, name: str, block: torch.nn.Module) -> None:
        self.own = block.__dict__.get("forward", _MISSING)
        self._recompute = recompute
        self.name = name
        self.block = block
        self.call: Callable[..., Any] = block.forward  # the plain one

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._recompute.run(self, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.own is _MISSING:
            return getattr, (self.block, "forward")  # of the copy, which by then exists, and of its class
        return operator.itemgetter(0), ((self.own,),)


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor)


def _keeps_statistics(module: torch.nn.Module) -> bool:
    return module.training and bool(getattr(module, "track_running_stats", False))


def candidates_for(policy: ActivationPolicy, model: torch.nn.Module | None) -> Candidates | None:
    """Blocks that may run twice; None where nothing is to.

    Raises:
        ValueError: it needs a model and has none.
    """
    if policy.recompute == "never" or not policy.enabled:
        return None
    if model is None:
        raise ValueError(f"Expected model with recompute={policy.recompute!r}, got none; pass model=...")
    return Candidates(model)
