"""One DeepSpeed engine and what ssdtrain does for it: when the hooks are on, which storages are weights, the log line.

[Note: what is covered]
The hooks are entered before the engine's forward and left when `engine.backward` begins, because the loss is computed
by the user in between. A loss that never comes to backward leaves them on until the next `forward`, `backward` or
`step`; that is harmless. Hooks nest like parentheses and PyTorch does not check it: they are left only while they are
the innermost, and where others surround a forward they cover that forward alone. Without gradients nothing is entered.
An engine dropped without `destroy()`, which DeepSpeed itself keeps alive under ZeRO, may leave its hooks on.

[Note: ZeRO-3]
Between forward and backward a parameter has no memory: its `data` is replaced by an empty tensor, and by a fresh one,
part of a buffer with its neighbours, each time it is gathered. A saved parameter is therefore kept as the parameter
itself (see `ssdtrain.activations.offload`), and every gathered storage is marked as a weight's when a module is
about to run.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from deepspeed import PipelineEngine
from deepspeed.utils import log_dist

from ssdtrain.api.session import Offload
from ssdtrain.stats import Stats
from ssdtrain.store.saved_tensors import innermost_hooks

Method = Callable[..., Any]


class EngineOffload:
    """What ssdtrain does for one DeepSpeed engine; found as `engine.ssdtrain`."""

    def __init__(self, engine: Any, session: Offload) -> None:
        """Puts itself round the engine's methods. The session, which has begun, is closed with the engine."""
        assert session.activations is not None
        self._engine = weakref.ref(engine)
        self._session, self._activations = session, session.activations
        self._replaced: dict[str, Method | None] = {}
        self._removable: list[Any] = []
        self._last_step = 0
        if not self._activations.policy.enabled:
            return
        self._put_round(forward=self._forward, backward=self._backward, step=self._step, destroy=self._destroy)
        if isinstance(engine, PipelineEngine):
            self._put_round(train_batch=self._train_batch)
        if engine.zero_optimization_partition_weights():
            self._watch_gathering()

    @property
    def stats(self) -> Stats:
        """What it did and what it cost so far, on this rank."""
        return self._activations.stats

    def detach(self) -> None:
        """Leaves the engine as DeepSpeed made it, and frees slabs, threads and spill files.

        A backward through a forward that came before fails when its activations are on disk.
        """
        engine = self._engine()
        for name, original in self._replaced.items() if engine is not None else ():
            if original is None:
                del engine.__dict__[name]
            else:
                setattr(engine, name, original)
        self._replaced = {}
        while self._removable:
            self._removable.pop().remove()
        self._session.close()

    def _put_round(self, **methods: Method) -> None:
        engine = self._engine()
        for name, method in methods.items():
            self._replaced[name] = engine.__dict__.get(name)
            original = getattr(engine, name)
            setattr(engine, name, functools.wraps(original)(functools.partial(method, original)))

    # -- see [Note: what is covered] -------------------------------------------------------------------------------

    def _forward(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        may_stay = innermost_hooks() is None
        has_entered = self._session.enter()
        try:
            if has_entered:
                self._mark_weights()
            outputs = original(*args, **kwargs)
        except BaseException:
            self._session.leave()
            raise
        if has_entered and not may_stay:
            self._session.leave()
        return outputs

    def _backward(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        self._session.leave()
        return original(*args, **kwargs)

    def _step(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        self._session.leave()
        result = original(*args, **kwargs)
        self._report()
        return result

    def _train_batch(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        """A pipeline's batch: forwards, losses and backwards of all micro-batches."""
        self._mark_weights()
        with self._session:
            result = original(*args, **kwargs)
        self._report()
        return result

    def _destroy(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        """The engine's destructor comes here too, at any moment: then everything is freed with the last reference."""
        if not self._activations.is_busy:
            self.detach()
        return original(*args, **kwargs)

    # -- see [Note: ZeRO-3] ----------------------------------------------------------------------------------------

    def _mark_weights(self) -> None:
        engine = self._engine()
        if engine is not None and not self._removable:
            self._activations.mark_weights([*engine.module.parameters(), *engine.module.buffers()])

    def _watch_gathering(self) -> None:
        """Hooks that run after DeepSpeed's own, which were there first and gather the module's parameters."""
        activations = self._activations

        def mark(module: torch.nn.Module, args: object) -> None:
            activations.mark_weights(list(module.parameters(recurse=False)))

        engine: Any = self._engine()
        activations.mark_weights(list(engine.module.buffers()))
        for module in engine.module.modules():
            if next(module.parameters(recurse=False), None) is not None:
                self._removable.append(module.register_forward_pre_hook(mark))

    # -- log -------------------------------------------------------------------------------------------------------

    def _report(self) -> None:
        engine: Any = self._engine()
        every, step, last = engine.steps_per_print(), engine.global_steps, self._last_step
        if every and step % every == 0 and step != last:
            self._last_step = step
            log_dist(f"ssdtrain: step={step}, in {step - last} steps: {self._session.progress()}", ranks=[0])
