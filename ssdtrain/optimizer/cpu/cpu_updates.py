"""The optimizer's step for parameters of an accelerator, taken by the CPU in a thread of its own.

Gradients and parameters are copied to pinned host memory, the optimizer updates the copies there, with state that never
leaves host memory and the drive, and the new values are copied back. A parameter that is off the device itself is
updated where it is: read to host memory and written from there.

Knows state, gradients' records, offloaded parameters and the optimizer that does the arithmetic; not when a step is
due.

[Note: three threads]
The thread that trains (or autograd's) queues the copies out and hands the rest to ours: it waits for the copies and for
the state, computes, and sends the state away. `finish`, in the thread that trains again, gives the parameters their new
values, in the order of its current stream. So a parameter changes between two operators of that thread and at no other
time, and nothing but copies of the groups, as they were in `begin`, is used in between.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from functools import partial
from typing import Any, cast

import torch
from torch.profiler import record_function
from torch.utils._pytree import tree_map_only

from ssdtrain.devices.base import Accelerator
from ssdtrain.optimizer.cpu.jobs import Entry, Job, Wait
from ssdtrain.optimizer.cpu.pinned import HostCopies, HostCopy
from ssdtrain.optimizer.gradients.gradient_record import Change
from ssdtrain.optimizer.gradients.offloaded_gradient import record_of
from ssdtrain.optimizer.inner import LOW_PRECISION, inner_step, load_own_state, parts_of, shadow_of
from ssdtrain.optimizer.shared_values import SharedValues
from ssdtrain.optimizer.state import OffloadedState
from ssdtrain.optimizer.trial.validation import check_apart
from ssdtrain.parameters.offload import offloads_of
from ssdtrain.store.identity import why_not
from ssdtrain.store.state_store import StateStore

_MAX_JOBS = 3  # chunks that are copied, updated or written
_MASTER = "master_param"


class CpuUpdates:
    """Updates those parameters of one optimizer that are on an accelerator."""

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        store: StateStore,
        offloaded: OffloadedState,
        *,
        has_masters: bool,
        is_delayed: bool,
    ) -> None:
        """No parameter is attached yet. For `has_masters` and `is_delayed` see `OptimizerPolicy`."""
        self._inner, self._store, self._offloaded = inner, store, offloaded
        self._has_masters, self._is_delayed = has_masters, is_delayed
        self._devices: dict[torch.Tensor, Accelerator] = {}
        self.shared = SharedValues()
        self._copies = HostCopies(store.note)
        self._jobs: deque[Job] = deque()
        self._pool: ThreadPoolExecutor | None = None
        self._pid = os.getpid()

    def __contains__(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter is on an accelerator."""
        return parameter in self._devices

    def attach(self, names: Mapping[torch.Tensor, str]) -> None:
        """Learns where these parameters are; all that there are.

        Raises:
            ValueError: the CPU cannot update one of them.
        """
        for parameter, name in names.items():
            self._attach(parameter, name)
        check_apart({parameter: name for parameter, name in names.items() if parameter in self._devices})

    def _attach(self, parameter: torch.Tensor, name: str) -> None:
        device = self._store.devices().of(parameter)
        if isinstance(device, str) or device.driver is None:
            if self._is_delayed:
                raise ValueError(
                    f"Expected parameters of an accelerator with delayed_update, got {name} in host memory"
                )
            return
        if why := why_not(parameter):
            raise ValueError(f"Expected plain parameters with update_on='cpu', got {name}: {why}")
        self._devices[parameter] = cast(Accelerator, device)

    # -- one chunk -----------------------------------------------------------------------------------------------

    def prefetch(self, parameter: torch.Tensor) -> int:
        """Begins to read a parameter's state to host memory; how many reads."""
        return self._offloaded.prefetch(parameter)

    def begin(
        self,
        chunk: dict[torch.Tensor, tuple[str, int]],
        attributes: Mapping[str, Any],
        when_changing: Callable[[], None],
    ) -> None:
        """Begins to update these parameters, whose names and groups are given; waits while too many are under way.

        `when_changing` is called when everything is ready, before anything of theirs changes.
        """
        self._check_process()
        if not self._is_delayed:
            is_again = any([entry.parameter in chunk for job in self._jobs for entry in job.entries])
            self.finish(0 if is_again else _MAX_JOBS - 1)
            for parameter in chunk:
                self.prefetch(parameter)
        entries = [self._entry(parameter, name) for parameter, (name, _) in chunk.items()]
        first = entries[0].parameter
        chosen: dict[int, list[torch.Tensor]] = {}
        for parameter, (_, index) in chunk.items():
            chosen.setdefault(index, []).append(parameter)
        shadow = shadow_of(self._inner, parts_of(self._inner.param_groups, chosen), {})
        self.shared.own_copies(shadow)
        for group in shadow.param_groups:
            group.update(self._settings({key: value for key, value in group.items() if key != "params"}, first))
        job = Job(
            entries,
            shadow,
            self._settings({"defaults": self._inner.defaults, **attributes}, first),  # a rate in a tensor is in both
            torch.get_num_threads(),
        )
        if self._is_delayed:  # the gradients' memory may be somebody's who uses it again
            self._copies.hold_back(self._devices[first])
        when_changing()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "ssdtrain-update")
        if self._jobs:
            self._jobs[-1].note_following(job)
        self._jobs.append(job)
        job.submit(self._pool, self._run)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("Expected the process that offloaded, got a forked child: offload there, or use spawn")

    def _entry(self, parameter: torch.Tensor, name: str) -> Entry:
        device = self._devices[parameter]
        if why := device.why_not():
            raise RuntimeError(f"Expected to update {name} on the CPU, got {why}: step() outside of it")
        value = None
        for owner in offloads_of([parameter]):
            value = owner.read_to_host(parameter)
        return Entry(
            parameter,
            name,
            value or self._value(parameter, device),
            self._gradient(parameter, device),
            record_of(parameter),
            self._inner.state.get(parameter),
            parameter._version,
            {key: value for key, value in vars(parameter).items() if not key.startswith("_ssdtrain")},
        )

    def _value(self, parameter: torch.Tensor, device: Accelerator) -> Wait:
        found = self._copies.begin(parameter.detach(), device)
        if self._is_delayed:  # somebody may load a checkpoint before anything of ours waits for the copy
            found.hold_back(device.current_stream())
        return found.wait

    def _gradient(self, parameter: torch.Tensor, device: Accelerator) -> Wait:
        record = record_of(parameter)
        if record is not None and record.is_away:
            changes = tree_map_only(torch.Tensor, lambda t: self._setting(t, parameter), record.changes)
            return lambda: _changed(record.load_to(self._store.host), changes)
        grad = record.load() if record is not None else parameter.grad
        assert grad is not None
        if grad.layout is not torch.strided:  # small
            there = grad.detach().cpu()
            return lambda: there
        return self._copies.begin(grad.detach(), device).wait

    def _settings(self, values: Mapping[str, Any], parameter: torch.Tensor) -> dict[str, Any]:
        """As they are now, whatever becomes of tensors among them."""
        found: dict[str, Any] = tree_map_only(torch.Tensor, lambda t: self._setting(t, parameter), dict(values))
        return found

    def _setting(self, tensor: torch.Tensor, parameter: torch.Tensor) -> HostCopy:
        if tensor.device != parameter.device:
            return HostCopy(tensor.detach().cpu().clone(), None)
        device = self._devices[parameter]
        copy = self._copies.begin(tensor.detach(), device)
        copy.hold_back(device.current_stream())
        return copy

    # -- in our thread -------------------------------------------------------------------------------------------

    def _run(self, job: Job) -> None:
        if torch.get_num_threads() != job.num_threads:  # each thread has its own number: sums depend on it
            torch.set_num_threads(job.num_threads)
        shadow = job.shadow
        with torch.no_grad(), record_function(f"ssdtrain::cpu_update {job.name}"):
            self._prefetch_ahead(job)
            vars(shadow).update(_arrived(job.attributes))
            values = {entry.parameter: entry.value() for entry in job.entries}
            shadow_parameters = {e.parameter: self._shadow_parameter(e, values[e.parameter]) for e in job.entries}
            for group in shadow.param_groups:
                group.update(_arrived({key: value for key, value in group.items() if key != "params"}))
                group["params"] = [shadow_parameters[parameter] for parameter in group["params"]]
            for entry in job.entries:
                if entry.state:
                    shadow.state[shadow_parameters[entry.parameter]] = entry.state
            _, job.changes = self.shared.run(shadow, partial(inner_step, shadow))
            for entry in job.entries:
                self._take_result(entry, shadow_parameters[entry.parameter], values[entry.parameter], shadow)

    def _prefetch_ahead(self, job: Job) -> None:
        """Reads what is not being read yet, also for the jobs that follow."""
        for entry in job.entries:
            if entry.record is not None:  # not through the parameter: another thread may set its gradient
                entry.record.prefetch(self._store.host)
        ahead: Job | None = job
        for _ in range(_MAX_JOBS):
            if ahead is not None:
                for entry in ahead.entries:
                    self._offloaded.prefetch(entry.parameter)
                ahead = ahead.following

    def _shadow_parameter(self, entry: Entry, value: torch.Tensor) -> torch.nn.Parameter:
        """A parameter in host memory, with a gradient, with what users have noted on the other; its state is there."""
        parameter, state = entry.parameter, dict(entry.state or {})
        gradient = entry.gradient()
        self._offloaded.reload(parameter, state)
        master: torch.Tensor | None = state.pop(_MASTER, None)
        if self._has_masters and value.dtype in LOW_PRECISION:
            if master is None or not torch.equal(master.to(value.dtype), value):  # somebody else has changed it
                master = value.float()
            value, gradient = master, gradient.float()
        shadow_parameter = torch.nn.Parameter(value, requires_grad=parameter.requires_grad)
        vars(shadow_parameter).update(entry.noted)
        shadow_parameter.grad = gradient
        entry.state = state if state or entry.state is not None else None
        return shadow_parameter

    def _take_result(
        self, entry: Entry, shadow_parameter: torch.nn.Parameter, value: torch.Tensor, shadow: torch.optim.Optimizer
    ) -> None:
        entry.state = shadow.state.get(shadow_parameter, entry.state)
        entry.result = shadow_parameter.detach()
        if shadow_parameter.dtype is not value.dtype:
            entry.state = {**(entry.state or {}), _MASTER: entry.result}
            entry.result = value.copy_(entry.result)
        self._write(entry.parameter, entry.name, entry.state)

    def _write(self, parameter: torch.Tensor, name: str, state: dict[str, Any] | None) -> None:
        """Begins to write state that is in host memory; without a drive it stays there."""
        if self._store.directory is not None and (state or parameter in self._offloaded):
            self._offloaded.offload(parameter, name, state if state is not None else {}, self._store.host)

    # -- after it ------------------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether some parameters do not have their new values yet."""
        return bool(self._jobs)

    @property
    def has_failed(self) -> bool:
        """Whether `finish` would raise what our thread did."""
        futures = [job.future for job in self._jobs if job.future is not None and job.future.done()]
        return any(future.exception() is not None for future in futures)

    def wait(self) -> None:
        """Blocks until our thread is through; nothing has changed then, whatever interrupts."""
        self._check_process()
        wait_for([job.future for job in self._jobs if job.future is not None])

    def finish(self, num_left: int = 0) -> None:
        """Waits until no more than `num_left` chunks are under way; the parameters of others have their new values.

        Those of an update that was delayed have them all at once, or none has.

        Raises:
            StateLostError: the drive does not have a parameter's state any more.
            RuntimeError: somebody has changed a parameter meanwhile.
        """
        if self._jobs:
            self._check_process()
        while len(self._jobs) > num_left:
            jobs = list(self._jobs) if self._is_delayed else [self._jobs[0]]
            for job in jobs:
                assert job.future is not None
                job.future.result()
            pending = [entry for job in self._jobs for entry in job.entries]
            for entry in pending:
                entry.check_unchanged()
            with torch.no_grad():
                for entry in [entry for job in jobs for entry in job.entries]:
                    self._put_back(entry)
            for entry in pending:  # which may share a version counter with those that have just changed
                entry.note_version()
            for _ in jobs:
                self.shared.note(self._jobs.popleft().changes)

    def _put_back(self, entry: Entry) -> None:
        parameter, result = entry.parameter, entry.result
        assert result is not None
        owners = offloads_of([parameter])
        for owner in owners:
            owner.replace(parameter, result)
        if not owners:
            parameter.copy_(result, non_blocking=True)
        if entry.state is not None:
            own = self._inner.state[parameter]  # somebody may hold it
            own |= entry.state
            for key in own.keys() - entry.state.keys():
                del own[key]

    def abandon(self) -> None:
        """Waits for what is under way and forgets it: the parameters keep their old values, their state may not.

        Interrupted, it goes on where it was when it is called again.
        """
        self.shared.forget()
        if os.getpid() != self._pid:
            self._jobs.clear()
        if not self._jobs:
            return
        self._copies.wait()
        for job in self._jobs:
            if job.future is not None:
                job.future.cancel()
        if self._pool is not None:
            self._pool.submit(_nothing).result()  # after all that was begun, known to us or not
        while self._jobs:
            job = self._jobs[0]
            if job.future is None or not job.future.cancelled():
                self._inner.state.update({e.parameter: e.state for e in job.entries if e.state is not None})
            self._jobs.popleft()

    def forget(self, parameter: torch.Tensor) -> None:
        """Forgets a parameter that is not to be updated any more."""
        self._devices.pop(parameter, None)

    def settle(self) -> None:
        """Ends the thread, and takes state to where the optimizer looks for it without us."""
        self.abandon()
        if self._pool is not None:
            self._pool.shutdown(wait=os.getpid() == self._pid)
            self._pool = None
        if self._devices:
            settings = [dict(group) for group in self._inner.param_groups]
            load_own_state(self._inner, self._other_dtypes())
            for group, own in zip(self._inner.param_groups, settings, strict=True):  # the same objects as before
                group.update({key: value for key, value in own.items() if key != "params"})
        for parameter in self._devices:
            self._inner.state.get(parameter, {}).pop(_MASTER, None)

    def _other_dtypes(self) -> dict[torch.Tensor, torch.Tensor]:
        """For parameters with state of another dtype than their own, as after a cast: that one, on their device."""
        likes = {}
        for parameter in self._devices:
            state = self._inner.state.get(parameter, {})
            dtypes = {
                v.dtype
                for k, v in state.items()
                if k != "step" and isinstance(v, torch.Tensor) and v.is_floating_point()
            }
            if _MASTER not in state and len(dtypes) == 1 and dtypes != {parameter.dtype}:
                likes[parameter] = torch.empty(0, dtype=dtypes.pop(), device=parameter.device)
        return likes

    # -- state that others have made -----------------------------------------------------------------------------

    def offload(self, parameter: torch.Tensor, name: str) -> None:
        """Takes a parameter's state to host memory, wherever it is, and begins to write it."""
        state, device = self._inner.state.get(parameter, {}), self._devices[parameter]
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.layout is torch.strided:
                is_there = value.device != parameter.device
                state[key] = value.cpu() if is_there else self._copies.begin(value.detach(), device).wait()
        self._write(parameter, name, state)

    def state_likes(self) -> dict[torch.Tensor, torch.Tensor]:
        """For each parameter an empty tensor of the device and dtype that its state is of."""
        return {p: self.state_like(p) for p in self._devices}

    def state_like(self, parameter: torch.Tensor) -> torch.Tensor:
        """An empty tensor of the device and dtype that a parameter's state is of."""
        if parameter in self._devices:
            return torch.empty(0, dtype=self._dtype(parameter), device="cpu")
        return torch.empty(0, dtype=parameter.dtype, device=parameter.device)

    def _dtype(self, parameter: torch.Tensor) -> torch.dtype:
        return torch.float32 if self._has_masters and parameter.dtype in LOW_PRECISION else parameter.dtype


def _nothing() -> None:
    pass


def _changed(grad: torch.Tensor, changes: list[Change]) -> torch.Tensor:
    for change in tree_map_only(HostCopy, HostCopy.wait, changes):
        change.apply(grad)
    return grad


def _arrived(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = tree_map_only(HostCopy, HostCopy.wait, dict(values))
    return found
