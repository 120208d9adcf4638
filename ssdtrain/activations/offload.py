"""Saved activations: the context manager that installs the hooks autograd calls, and what it is told.

What the hooks do is in `ssdtrain.activations.hooks`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ssdtrain.activations.activation_store import ActivationStore
from ssdtrain.activations.hooks import Saved, SavedTensorHooks
from ssdtrain.activations.open_drive import Attach, DriveSource
from ssdtrain.activations.recompute.recompute import Recompute, candidates_for
from ssdtrain.activations.reporting.nothing_offloaded import NothingOffloaded
from ssdtrain.activations.reporting.observers import StepObservers, recorder_for
from ssdtrain.activations.saved.module_names import ModuleNames
from ssdtrain.activations.saved.selection import NOT_CHOSEN, Chosen
from ssdtrain.activations.saved.storage_index import Index
from ssdtrain.devices.base import Device
from ssdtrain.devices.cpu import CpuDevice
from ssdtrain.devices.registry import Devices
from ssdtrain.io.files.directories import check_directories
from ssdtrain.planner import Buffers, Plan
from ssdtrain.policy import ActivationPolicy
from ssdtrain.scheduling.replanner import replanner_for
from ssdtrain.scheduling.schedule import Schedule
from ssdtrain.stats import Counters, Stats, nbytes_text
from ssdtrain.store.record import Handle
from ssdtrain.store.saved_tensors import HookScope, innermost_hooks, not_entered
from ssdtrain.tracing.finished_step import Callback
from ssdtrain.tracing.module_spans import ModuleSpans


class ActivationOffload(SavedTensorHooks, contextlib.ContextDecorator):
    """A context, or decorator, inside which saved activations are offloaded; `offload_activations` makes it."""

    def __init__(
        self,
        directories: Sequence[str] | None,
        policy: ActivationPolicy,
        model: torch.nn.Module | None = None,
        cpu: Device | None = None,
        attach: Attach | None = None,
        known_devices: dict[torch.device, Device | str] | None = None,
    ) -> None:
        """Checks the directories and opens the engine, so that what is wrong shows before training starts.

        `directories`: None for a host tier only. `cpu`: the device of tensors in host memory, for simulations.
        `attach`: takes a share of another offload's drive, which is in these directories, instead of opening one.
        `known_devices`: the accelerators that other one knows.
        """
        if (cpu is None or cpu.driver is None) and Devices.gpu_index() is None:
            policy = policy.with_staging_that_fits()  # which takes of the memory that the budget is for
        counters, index, names, buffers = Counters(), Index(), ModuleNames(model, ModuleSpans()), Buffers(policy)
        candidates = candidates_for(policy, model)
        blocks = candidates.names if candidates is not None else None
        replanner = replanner_for(policy, directories or (), blocks, buffers)
        self._recompute: Recompute | None = None
        if candidates is not None:
            chosen = (lambda: replanner.recomputed) if replanner is not None and policy.recompute == "auto" else None
            self._recompute = Recompute(candidates, counters, self._check_version, chosen)
        schedule = Schedule(counters, replanner)
        self._model, self._directories = model, tuple(directories or ())
        self._chosen = Chosen(policy.only) if policy.only is not None else None
        self._threads: list[threading.Thread] = []  # in which it is entered, as often as it is
        self._is_closed = False
        if directories is None and policy.host_nbytes == 0:
            raise ValueError("Expected a directory or a host tier, got directory=None and host_nbytes=0; pass either")
        cpu = cpu or CpuDevice(lambda: buffers.idle_nbytes)
        devices = Devices(cpu, has_host_tier_only=directories is None, known=known_devices)
        recorder = recorder_for(policy, directories or ())
        log = recorder.request_log if recorder is not None else None
        source = DriveSource(directories or (), policy, counters, attach, log, buffers)
        store = ActivationStore(source, index, devices, on_reset=schedule.reset, on_fork=schedule.forget_accelerators)
        observers = StepObservers(policy, schedule, store, recorder)
        super().__init__(policy, counters, index, schedule, devices, store, observers, names)
        if policy.enabled:
            for text in check_directories(directories, policy.io_timeout_seconds) if directories is not None else ():
                self._store.note_fallback(text)
            self._store.open()
            self._store.rest_while_declining()
        self._nothing_offloaded = NothingOffloaded(self, policy, self._counters, self._threads)

    def __repr__(self) -> str:
        """What it is doing, without waiting for anybody."""
        state = "closed" if self._is_closed else "entered" if self._threads else "left"
        counters = self._counters
        did = f"{counters.num_steps} steps, {nbytes_text(counters.offloaded_nbytes)} offloaded"
        where = ", ".join(self._directories) or "host memory"
        stalled = f"{counters.stalled_seconds:.3f} s stalled"
        return f"{type(self).__name__}({state if self.policy.enabled else 'disabled'}, {where}, {did}, {stalled})"

    # -- what compiled graphs save ---------------------------------------------------------------------------------

    def save(self, tensor: torch.Tensor) -> Saved:
        """Takes what a compiled graph saves: it is computed, and so its trip begins at once.

        Returns:
            What `reload` makes the tensor of; the bytes are kept until that is gone.
        """
        saved = self._outer_pack(tensor)
        due, is_planned, store = self._take_due(is_over=True), self._schedule.is_planned, self._store
        if due:
            store.prepare(due)
            with store.lock.mutex, store.lock:
                blocked = self._start(due, is_planned=is_planned)
            store.finish(blocked, is_planned=is_planned)
        return saved  # type: ignore[no-any-return]

    def prefetch(self, saved: Saved) -> None:
        """Begins to reload what `save` returned, if there is room for what comes early."""
        if isinstance(saved, Handle):
            self._store.prefetch([saved.record])

    def reload(self, saved: Saved) -> torch.Tensor:
        """What was given to `save`, in the order of the current stream.

        Raises:
            RuntimeError: it was changed in place, or the context was closed.
            OSError: it could not be read.
        """
        return self._unpack(saved)

    # -- context -------------------------------------------------------------------------------------------------

    def __enter__(self) -> ActivationOffload:
        """Installs the hooks for this thread.

        Raises:
            RuntimeError: the context was closed.
        """
        self._check_open()
        self._nothing_offloaded.enter()
        if self.policy.enabled:
            _untraced(self._enter)
        return self

    def _enter(self) -> None:
        with contextlib.ExitStack() as stack:  # an error, Ctrl-C too, undoes what was done: no `__exit__` follows
            stack.callback(self._nothing_offloaded.leave)
            self._store.enter()
            stack.callback(self._store.leave)
            stack.callback(self._observers.leave)
            if self._model is not None:
                self.mark_weights([*self._model.parameters(), *self._model.buffers()])
            stack.enter_context(HookScope(self._outer_pack, self._unpack, self.note))
            stack.callback(self._names.unwatch)
            self._names.install()
            if self._recompute is not None:
                stack.callback(self._recompute.leave)
                self._recompute.enter()
            self._threads.append(threading.current_thread())
            self._thread.entered.append(stack.pop_all())

    def __exit__(self, *_: object) -> None:
        """Takes the hooks away; what was saved stays available for backward.

        Raises:
            RuntimeError: this thread did not enter, and nothing was changed; or somebody has taken the hooks off.
        """
        if not self.policy.enabled:
            return
        if not self._thread.entered:
            raise not_entered("offload contexts", self._threads)
        self._threads.remove(threading.current_thread())
        _untraced(self._thread.entered.pop().close)

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("Expected an open offload, got one after close(); make a new one")

    @property
    def _outer_pack(self) -> Callable[[torch.Tensor], Any]:
        """The pack hook."""
        return self._pack if self._chosen is None else self._pack_chosen

    def _pack_chosen(self, tensor: torch.Tensor, is_aside: bool = False) -> Any:
        if torch.compiler.is_compiling() and not is_aside:  # see [Note: compiled functions] in `hooks`
            from ssdtrain.store.not_compiled import aside

            return aside(self._pack_chosen, tensor, True)
        assert self._chosen is not None
        if not self._chosen.leaves_alone(tensor, sys._getframe(1)):
            return self._pack(tensor, True)
        self._counters.num_saved += 1
        return self._stay(tensor, NOT_CHOSEN, tensor.nbytes)

    @property
    def is_innermost(self) -> bool:
        """Whether it is this context that takes what autograd saves in this thread now, rather than a later one."""
        hooks = innermost_hooks()
        return hooks is not None and hooks[0] == self._outer_pack

    @property
    def is_busy(self) -> bool:
        """Whether a thread, perhaps this one, is in the middle of something; a destructor must not wait for it."""
        return self._store.lock.mutex.locked()

    def keep_open(self) -> None:
        """Keeps engine, slabs and spill files until `close()`, also while the context is left and no graph is alive.

        For those who enter and leave it many times a second: opening them takes milliseconds.

        Raises:
            RuntimeError: the context was closed.
        """
        self._check_open()
        if self.policy.enabled:
            self._store.enter()

    def mark_weights(self, tensors: Iterable[torch.Tensor]) -> None:
        """Says that these are weights: whatever shares a storage with one of them, as it is now, stays in memory."""
        with self._store.lock.mutex, self._store.lock:
            self._index.mark_weights(tensors)

    def mark(self, tensor: torch.Tensor) -> torch.Tensor:
        """Has a tensor offloaded, and its views, when an operator saves it from now on; for a policy with `only`.

        Returns:
            The same tensor.

        Raises:
            ValueError: the policy has no `only`, so that everything is offloaded.

        Example:
            >>> with ssdtrain.offload_activations("/mnt/nvme", only="marked") as offload:
            ...     loss = head(offload.mark(body(batch)))
        """
        if self._chosen is None:
            raise ValueError("Expected a policy with only='marked' or 'checkpoint_inputs', got one that offloads all")
        self._chosen.mark(tensor)
        return tensor

    def leave_alone(self, nodes: Iterable[str]) -> None:
        """Leaves what autograd nodes of these names made in memory: its maker frees its storage and refills it."""
        self._left_alone |= frozenset(nodes)

    def note(self, text: str) -> None:
        """Adds a remark to `stats.fallbacks`, and warns with it once."""
        self._store.note_fallback(text)

    def close(self) -> None:
        """Frees slabs, threads and spill files at once. A later backward through records on disk raises an error."""
        self._is_closed = True
        self._nothing_offloaded.end()
        self._observers.close()
        self._store.close()

    @property
    def plan(self) -> Plan | None:
        """What the running step does with every record, and for how much memory and time; `print` explains it.

        None before the second step, in mode ``"all"``, and for steps on several devices (`stats.fallbacks` says so).
        """
        plan, counters = self._schedule.plan, self._counters
        if plan is None or not counters.measured_step_seconds or plan.peak_nbytes != counters.predicted_peak_nbytes:
            return plan
        peak, seconds = counters.measured_peak_nbytes, counters.measured_step_seconds
        return replace(plan, measured_peak_nbytes=peak, measured_seconds=seconds)

    def hint_backward(self, micro_batch: int) -> None:
        """Says that backward of a micro-batch comes next, so that its last tensors are reloaded in time.

        Never needed: the order is learned. For pipeline schedules that know it before it happens the first time.

        Args:
            micro_batch: number of the forward pass, counted from 0 among those whose tensors are alive together.
        """
        self._store.prefetch(self._schedule.hinted(micro_batch))

    def on_step(self, callback: Callback) -> None:
        """Calls `callback(number, stats)` after every step, counted from 1: for loggers, see `ssdtrain.loggers`.

        A step is over when the next one begins. A callback that raises is noted and not called again. Not after close.
        """
        self._check_open()
        self._observers.call(callback)

    @property
    def stats(self) -> Stats:
        """What it did and what it cost so far."""
        return Stats.of(self._store.totals())


def innermost_offload() -> ActivationOffload | None:
    """The context that takes what is saved in this thread now, unless other hooks do."""
    hooks = innermost_hooks()
    owner = getattr(hooks[0], "__self__", None) if hooks is not None else None
    return owner if isinstance(owner, ActivationOffload) else None


def _untraced(call: Callable[[], None]) -> None:
    """Calls it out of the compiler's sight, if there is a compiler: see [Note: compiled functions] in `hooks`."""
    if "torch._dynamo" in sys.modules:
        from ssdtrain.store.not_compiled import aside

        aside(call)
    else:
        call()
