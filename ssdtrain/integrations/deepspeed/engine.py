"""One DeepSpeed engine and when hooks are on for it.

[Note: what is covered]
The hooks are entered before the engine's forward and left when `engine.backward` begins, because the loss is computed
by the user in between. A loss that never comes to backward leaves them on until the next `forward`, `backward` or
`step`; that is harmless. Hooks nest like parentheses and PyTorch does not check it: they are left only while they are
the innermost, and where others surround a forward they cover that forward alone. Without gradients nothing is entered.
An engine dropped without `destroy()`, which DeepSpeed itself keeps alive under ZeRO, may leave its hooks on.
"""

from __future__ import annotations

from typing import Any

from deepspeed import PipelineEngine

from ssdtrain.api.session import Offload
from ssdtrain.integrations.deepspeed.log import StepLog
from ssdtrain.integrations.deepspeed.weights import Weights
from ssdtrain.integrations.parts.methods import Method, Methods
from ssdtrain.stats import Stats
from ssdtrain.store.saved_tensors import innermost_hooks


class EngineOffload:
    """What ssdtrain does for one DeepSpeed engine; found as `engine.ssdtrain`."""

    def __init__(self, engine: Any, session: Offload) -> None:
        """Puts itself round the engine's methods. The session, which has begun, is closed with the engine."""
        assert session.activations is not None
        self._session, self._activations = session, session.activations
        self._methods, self._log = Methods(engine), StepLog(engine, session)
        self._weights = Weights(engine, self._activations)
        if not self._activations.policy.enabled:
            return
        own = {"forward": self._forward, "backward": self._leave_first, "step": self._leave_first}
        own |= {"train_batch": self._train_batch} if isinstance(engine, PipelineEngine) else {}
        self._methods.put_round(destroy=self._destroy, **own)
        self._weights.watch()

    @property
    def stats(self) -> Stats:
        """What it did and what it cost so far, on this rank."""
        return self._activations.stats

    def detach(self) -> None:
        """Leaves the engine as DeepSpeed made it, and frees slabs, threads and spill files.

        A backward through a forward that came before fails when its activations are on disk.
        """
        self._methods.restore()
        self._weights.forget()
        self._session.close()

    # -- see [Note: what is covered] -------------------------------------------------------------------------------

    def _forward(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        may_stay = innermost_hooks() is None
        has_entered = self._session.enter()
        try:
            if has_entered:
                self._weights.mark()
            outputs = original(*args, **kwargs)
        except BaseException:
            self._session.leave()
            raise
        if has_entered and not may_stay:
            self._session.leave()
        return outputs

    def _leave_first(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        self._session.leave()
        result = original(*args, **kwargs)
        self._log.after_step()
        return result

    def _train_batch(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        """A pipeline's batch: forwards, losses and backwards of all micro-batches."""
        self._weights.mark()
        with self._session:
            result = original(*args, **kwargs)
        self._log.after_step()
        return result

    def _destroy(self, original: Method, *args: Any, **kwargs: Any) -> Any:
        """The engine's destructor comes here too, at any moment: then everything is freed with the last reference."""
        if not self._activations.is_busy:
            self.detach()
        return original(*args, **kwargs)
