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

from ssdtrain.activations.offload import ActivationOffload
from ssdtrain.stats import Stats
from ssdtrain.store.saved_tensors import hooks_may_be_entered, innermost_hooks
from ssdtrain.tracing.finished_step import progress_line

Method = Callable[..., Any]


class EngineOffload:
    """What ssdtrain does for one DeepSpeed engine; found as `engine.ssdtrain`."""

    def __init__(self, engine: Any, offload: ActivationOffload) -> None:
        """Puts itself round the engine's methods. The offload is closed with the engine."""
        self._engine = weakref.ref(engine)
        self._offload = offload
        self._replaced: dict[str, Method | None] = {}
        self._removable: list[Any] = []
        self._reported = (0, offload.stats)
        if not offload.policy.enabled:
            return
        offload.keep_open()
        self._put_round(forward=self._forward, backward=self._backward, step=self._step, destroy=self._destroy)
        if isinstance(engine, PipelineEngine):
            self._put_round(train_batch=self._train_batch)
        if engine.zero_optimization_partition_weights():
            self._watch_gathering()

    @property
    def stats(self) -> Stats:
        """What it did and what it cost so far, on this rank."""
        return self._offload.stats

    def detach(self) -> None:
        """Leaves the engine as DeepSpeed made it, and frees slabs, threads and spill files.

        A backward through a forward that came before fails when its activations are on disk.
        """
        self._leave()
        engine = self._engine()
        for name, original in self._replaced.items() if engine is not None else ():
            if original is None:
                del engine.__dict__[name]
            else:
                setattr(engine, name, original)
        self._replaced = {}
        while self._removable:
            self._removable.pop().remove()
        self._offload.close()

    def _put_round(self, **methods: Method) -> None:
        engine = self._engine()
        for name, method in methods.items():
            self._replaced[name] = engine.__dict__.get(name)
            original = getattr(engine, name)
            setattr(engine, name, functools.wraps(original)(functools.partial(method, original)))

    # -- see [Note: what is covered] -------------------------------------------------------------------------------

    def _forward(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not hooks_may_be_entered():
            return original(*args, **kwargs)
        stays = self._enter()
        try:
            outputs = original(*args, **kwargs)
        except BaseException:
            self._leave()
            raise
        if not stays:
            self._leave()
        return outputs

    def _backward(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        self._leave()
        return original(*args, **kwargs)

    def _step(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        self._leave()
        result = original(*args, **kwargs)
        self._report()
        return result

    def _train_batch(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        """A pipeline's batch: forwards, losses and backwards of all micro-batches."""
        self._mark_weights()
        with self._offload:
            result = original(*args, **kwargs)
        self._report()
        return result

    def _destroy(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        """The engine's destructor comes here too, at any moment: then everything is freed with the last reference."""
        if not self._offload.is_busy:
            self.detach()
        return original(*args, **kwargs)

    def _enter(self) -> bool:
        """Enters the hooks; whether they may stay on when forward returns."""
        if self._offload.is_innermost:
            return True
        is_outermost = innermost_hooks() is None
        self._mark_weights()
        self._offload.__enter__()
        return is_outermost

    def _leave(self) -> None:
        if self._offload.policy.enabled and self._offload.is_innermost:
            self._offload.__exit__(None, None, None)

    # -- see [Note: ZeRO-3] ----------------------------------------------------------------------------------------

    def _mark_weights(self) -> None:
        engine = self._engine()
        if engine is not None and not self._removable:
            self._offload.mark_weights([*engine.module.parameters(), *engine.module.buffers()])

    def _watch_gathering(self) -> None:
        """Hooks that run after DeepSpeed's own, which were there first and gather the module's parameters."""
        offload = self._offload

        def mark(module: torch.nn.Module, args: object) -> None:
            offload.mark_weights(list(module.parameters(recurse=False)))

        engine: Any = self._engine()
        offload.mark_weights(list(engine.module.buffers()))
        for module in engine.module.modules():
            if next(module.parameters(recurse=False), None) is not None:
                self._removable.append(module.register_forward_pre_hook(mark))

    # -- log -------------------------------------------------------------------------------------------------------

    def _report(self) -> None:
        engine: Any = self._engine()
        every, step = engine.steps_per_print(), engine.global_steps
        last_step, last = self._reported
        if not every or step % every or step == last_step:
            return
        now = self.stats
        self._reported = step, now
        log_dist(f"ssdtrain: step={step}, in {step - last_step} steps: {progress_line(last, now)}", ranks=[0])
