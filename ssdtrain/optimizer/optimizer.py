"""`offload_optimizer`: optimizer state lives on the drive and is in memory for a few parameters at a time.

The optimizer itself does the arithmetic: it is shown the parameters of one chunk, with their state in memory, and
takes its step for those; meanwhile the state of the next chunk is read and that of the last one written. So the result
is the same to the bit, for every optimizer whose update of a parameter depends on that parameter alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch

from ssdtrain.optimizer.cpu.cpu_updates import CpuUpdates
from ssdtrain.optimizer.gradients.gradients import Gradients
from ssdtrain.optimizer.gradients.reached import Loop, weakly
from ssdtrain.optimizer.inner import predict_state_nbytes, take_over
from ssdtrain.optimizer.live_state import LiveState
from ssdtrain.optimizer.state import OffloadedState
from ssdtrain.optimizer.state_dict import whole_state_dict
from ssdtrain.optimizer.step import Stepper
from ssdtrain.optimizer.trial.closures import check_closure
from ssdtrain.optimizer.trial.validation import check_alone, check_devices, check_optimizer, check_settings
from ssdtrain.optimizer.updates import Updates, read_through
from ssdtrain.parameters.offload import offloads_of
from ssdtrain.policy import OptimizerPolicy
from ssdtrain.state_stats import StateCounters, StateStats
from ssdtrain.stats import nbytes_text
from ssdtrain.store.state_store import StateLostError, StateStore


class OffloadedOptimizer(torch.optim.Optimizer):
    """An optimizer whose state is on the drive; see `offload_optimizer`, which makes it."""

    pages_parameters = True  # for `offload_parameters`: no need to bring all parameters for a step

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        open_store: Callable[[], StateStore],
        policy: OptimizerPolicy,
        loop: Loop | None = None,
    ) -> None:
        """Takes over the groups, the hooks and the state of `optimizer`, and moves the state to the drive."""
        check_optimizer(optimizer)
        self.policy = policy
        self._inner = optimizer
        self._counters = StateCounters("optimizer state")
        self._names: dict[torch.Tensor, str] = {}
        self._is_closed = self._has_met_closure = False
        self._hooked: set[torch.Tensor] = set()
        self._handles: list[Any] = []
        hooks = {name: value for name, value in vars(optimizer).items() if name.endswith("_hooks")}
        self.__setstate__({"defaults": dict(optimizer.defaults), **hooks})  # which adds to them
        check_alone(self.policy)
        check_settings(self.policy, self.param_groups)
        state_nbytes = predict_state_nbytes(optimizer, policy.min_nbytes, has_masters=policy.master_weights)
        self._store = open_store()
        self._offloaded = OffloadedState(self._store, self._counters, policy.min_nbytes)
        self._gradients = Gradients(self._store, self._name)
        self._cpu_updates = CpuUpdates(
            optimizer,
            self._store,
            self._offloaded,
            has_masters=policy.master_weights,
            is_delayed=policy.delayed_update,
        )
        self._updates = Updates(
            optimizer, self._offloaded, self._gradients, self._cpu_updates, self._name, policy.chunk_nbytes
        )
        self._stepper = Stepper(
            optimizer, self._store, self._updates, self._counters, policy, self._scaler, loop or Loop()
        )
        self._progress = self._stepper.progress
        try:
            check_devices(self._store, self.param_groups, on_cpu=policy.update_on == "cpu")
            if policy.update_on == "device" or self._store.directory is not None:  # else it stays in host memory
                self._store.reserve(state_nbytes, "optimizer state")
            self._regroup()
            for parameter in self._group_of:
                self._updates.offload(parameter)
        except BaseException:
            for parameter in self._offloaded:
                self._offloaded.reload(parameter, optimizer.state[parameter])
            self._cpu_updates.settle()
            self._unhook()
            self._store.close()
            raise
        self._release = take_over(optimizer)

    # -- what an optimizer has ------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer that does the arithmetic."""
        return self._inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._inner.param_groups = groups

    @property  # type: ignore[override]
    def state(self) -> LiveState:
        """State by parameter, to be read and changed: what is looked at comes to memory, and leaves when nobody has it.

        Until the next step a chunk of it may stay.
        With `step_in_backward` a look between backward and `step()` is an error of that step.
        """
        self._check_open()
        self._progress.early.note_look()
        self._stepper.finish()
        return self._updates.live

    @state.setter
    def state(self, state: MutableMapping[Any, Any]) -> None:
        self.state.replace(state)

    def __getattr__(self, name: str) -> Any:
        """Whatever else the optimizer has; its methods find the state."""
        if name.startswith("__") or name in ("_inner", "_updates"):
            raise AttributeError(name)
        return read_through(self._inner, name, getattr(self._inner, name), self._updates, self._begin_call)

    def _begin_call(self) -> None:
        """A method of the optimizer is about to change what it likes."""
        self._check_open()
        self._regroup()
        self._progress.end_backwards()
        self._stepper.check_complete()
        self._stepper.finish()

    def __repr__(self) -> str:
        """What it is doing, without waiting for anybody."""
        state, where = "closed" if self._is_closed else "open", ", ".join(self._store.directories) or "host memory"
        away = f"{nbytes_text(self._counters.away_nbytes)} of state in {self._counters.num_away} tensors offloaded"
        return f"Offloaded{type(self._inner).__name__}({state}, {where}, {len(self.param_groups)} groups, {away})"

    def __reduce__(self) -> Any:
        raise TypeError("Expected to save optimizer.state_dict(), got the optimizer itself: its state is on a drive")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: with it the optimizer cannot be offloaded as the policy says; the groups are as they were.
        """
        self._check_open()
        self._inner.add_param_group(param_group)
        try:
            self._regroup()
        except BaseException:
            for parameter in self.param_groups.pop()["params"]:
                self._cpu_updates.forget(parameter)
            raise

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient, see `torch.optim.Optimizer.step`.

        Raises:
            StateLostError: the drive does not have a parameter's state any more.
            RuntimeError: an earlier step was interrupted.
        """
        if closure is not None and not self._has_met_closure:
            check_closure(self._inner)
            self._has_met_closure = True
        self._check_open()
        self._regroup()
        self._progress.end_backwards()
        self._stepper.check_complete(in_step=True)
        loss = None
        if closure is not None:  # as if it had been called before: the update of the last step may still be due
            with torch.enable_grad():
                loss = closure()
            self._progress.end_backwards()
            self._stepper.check_complete(in_step=True)
        if self.policy.delayed_update:
            self._stepper.finish()
        self._stepper.step()
        return loss

    def _scaler(self) -> dict[str, Any]:
        """What a GradScaler told this optimizer: fused ones unscale by themselves."""
        found = {name: value for name, value in vars(self).items() if name in ("grad_scale", "found_inf")}
        if found and self.policy.step_in_backward:
            raise RuntimeError("Expected no GradScaler with step_in_backward, got its scale: use offload_gradients")
        return found

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See `torch.optim.Optimizer.zero_grad`; gradients on the drive are dropped."""
        self._check_open()
        self._regroup()
        self._progress.end_backwards()
        self._progress.check_zero_grad(set_to_none=set_to_none or not self.policy.step_in_backward)
        self._gradients.forget_used(self._group_of)
        super().zero_grad(set_to_none)
        self._gradients.release()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """`torch.nn.utils.clip_grad_norm_` over all parameters. With `step_in_backward` it is an error.

        Args:
            max_norm: the largest 2-norm of all gradients together.

        Returns:
            The norm before, a scalar.

        Raises:
            RuntimeError: the parameters are updated already.
        """
        self._check_open()
        if self.policy.step_in_backward:
            raise RuntimeError("Expected offload_gradients to clip, got step_in_backward, which has updated already")
        return torch.nn.utils.clip_grad_norm_(self._group_of, max_norm)

    # -- in backward ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Inside, backward only adds to the gradients: for all but the last backward of a step, in any mode.

        Example:
            >>> with optimizer.accumulate():
            ...     model(first).backward()
            >>> model(second).backward(); optimizer.step()
        """
        self._check_open()
        with self._stepper.reach.accumulate():
            yield

    def _on_gradient(self, parameter: torch.Tensor) -> None:
        """A gradient is complete: it leaves, or, with enough of them, their parameters are updated."""
        if parameter not in self._group_of:  # its group is gone
            return
        if self.policy.offload_gradients:
            with torch.no_grad():
                check_alone(self.policy)
                self._gradients.offload(parameter)
            return
        self._stepper.update_in_backward(parameter, self._regroup)

    # -- all of it ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As without offload. State that is on the drive comes in files that are mapped to memory, freed with it.

        Raises:
            RuntimeError: a step was interrupted, or its update was delayed and is not over: call `flush()` first.
        """
        self._check_open()
        if self._cpu_updates.has_failed:
            self._stepper.finish()
        self._stepper.check_complete()
        if self._cpu_updates.is_busy:
            raise RuntimeError(
                f"Expected flush() before a checkpoint, got the update of step {self._progress.num_steps}, which was "
                "delayed: call optimizer.flush(), then model.state_dict() and optimizer.state_dict()"
            )
        found = whole_state_dict(self._inner, self._offloaded)
        self._store.note_checkpoint(f"the last state_dict() was taken after step {self._counters.num_steps}")
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As without offload, a few parameters at a time.

        Raises:
            ValueError: it has other groups.
        """
        self._check_open()
        self._regroup()
        inner = self._inner
        loaded: dict[str, Any] = dict(state_dict)
        for hook in inner._optimizer_load_state_dict_pre_hooks.values():
            loaded = hook(self, loaded) or loaded
        entries, groups = loaded["state"], loaded["param_groups"]
        if self._cpu_updates.is_busy:  # from here on only this makes it whole
            self._progress.begin_load()
            self._cpu_updates.abandon()
        self._updates.load(entries, groups, self._progress.begin_load)
        self._progress.finish_load()
        for post_hook in inner._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    @property
    def stats(self) -> StateStats:
        """What it did and what it cost so far."""
        return StateStats.of(self._store.totals(self._counters))

    @property
    def store(self) -> StateStore:
        """The store that its state is in, for others to share."""
        return self._store

    def flush(self) -> None:
        """Blocks until the drive has all state, and parameters have the values of an update that was delayed.

        Raises:
            OSError: it could not take some of it, which is in memory.
        """
        self._check_open()
        self._stepper.finish()
        self._store.flush()

    def note_checkpoint(self, text: str) -> None:
        """Says which checkpoint to go back to, for messages of lost bytes."""
        self._store.note_checkpoint(text)

    def close(self) -> None:
        """Brings the state back to the optimizer it came from, and gives the drive's space back. Idempotent.

        Raises:
            StateLostError: the drive does not have some state any more; all else is there.
            RuntimeError: a step was interrupted, and nobody will know any more: load a checkpoint before the next.
        """
        if self._is_closed:
            return
        lost: BaseException | None = None
        try:
            self._stepper.finish()
            self._progress.end_backwards()
            self._stepper.check_complete(in_step=True)
        except Exception as error:
            lost = error
        for parameter in self._offloaded:
            try:
                self._offloaded.reload(parameter, self._inner.state[parameter])
            except StateLostError as error:
                lost = lost or error
        try:
            self._cpu_updates.settle()
        except RuntimeError as error:  # no memory for the state on the device: it stays where it is
            lost = lost or error
        try:
            self._gradients.close(self._group_of)
        except StateLostError as error:
            lost = lost or error
        self._offloaded.forget()
        self._unhook()
        self._release()
        self._is_closed = True
        self._store.close()
        if lost is not None:
            raise lost

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._stepper.reach.leave()
        self._handles, self._hooked = [], set()

    def _regroup(self) -> None:
        """Learns which parameters there are, and in which groups: users may change the groups."""
        groups = self.param_groups
        found = {parameter: i for i, group in enumerate(groups) for parameter in group["params"]}
        if list(map(id, found)) == list(map(id, self._group_of)) and found == self._group_of:
            return
        self._stepper.finish()
        self._gradients.forget_used(self._group_of.keys() - found.keys())
        for parameter in set(self._group_of) - set(found):
            self._offloaded.drop(parameter)
            self._cpu_updates.forget(parameter)
        check_settings(self.policy, self.param_groups)
        for i, group in enumerate(groups):
            names = group.get("param_names") or [f"parameter {k} of group {i}" for k in range(len(group["params"]))]
            for name, parameter in zip(names, group["params"], strict=False):
                self._hook(name, parameter)
        if self.policy.update_on == "cpu":
            self._cpu_updates.attach({parameter: self._names[parameter] for parameter in found})
        self._updates.regroup(found, self.policy)
        self._stepper.reach.note_parameters(found)

    def _hook(self, name: str, parameter: torch.Tensor) -> None:
        if parameter.is_meta:
            raise ValueError(f"Expected parameters with values, got {name} on the meta device: load them first")
        self._names[parameter] = name
        acts_in_backward = self.policy.step_in_backward or self.policy.offload_gradients
        if acts_in_backward and parameter.requires_grad and parameter not in self._hooked:
            self._hooked.add(parameter)
            self._handles.append(parameter.register_post_accumulate_grad_hook(weakly(self._on_gradient)))

    @property
    def _group_of(self) -> dict[torch.Tensor, int]:
        return self._updates.group_of

    def _name(self, parameter: torch.Tensor) -> str:
        return next((owner.name_of(parameter) for owner in offloads_of([parameter])), None) or self._names[parameter]

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("Expected an open offload, got one after close(): use the optimizer it was made of")
