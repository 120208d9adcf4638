"""What has happened since the last complete step: which parameters are updated, and whether the rest may follow.

Knows parameters as keys, and neither state nor drives.

[Note: a step that was interrupted]
An exception in the middle of a step leaves some parameters updated and others not. Nothing can undo that; but nothing
may take it for a complete step either: until a checkpoint is loaded, further steps and state dicts raise.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch

from ssdtrain.optimizer.gradients.early_updates import EarlyUpdates
from ssdtrain.parameters.offload import offloads_of

_MAX_AHEAD = 64  # parameters
_ONE_BACKWARD = (
    "Expected one backward per step with step_in_backward, got another one for {}: "
    "wrap all but the last in optimizer.accumulate(), and call step() after it. Where reentrant checkpoints share a "
    "parameter: pass use_reentrant=False"
)
_NOT_DROPPED = (
    "Expected zero_grad() after step(), got a backward that adds to the gradient of {}, which step_in_backward has "
    "used and freed: call optimizer.zero_grad(), and where the backward is not for this optimizer, run it in "
    "`with optimizer.accumulate():`"
)
_USED = (
    "Expected gradients that stay until zero_grad(), got that of {}, which step_in_backward has used and freed: the "
    "parameter is updated already. Clip, scale, check and log with offload_gradients instead"
)


class StepProgress:
    """The step of one optimizer that is under way, if one is."""

    def __init__(self) -> None:
        """No step is under way."""
        self.num_steps = 0
        self.has_updated = False  # a parameter, ever
        self.updated: set[torch.Tensor] = set()  # in backward, since the last step
        self.arrived: dict[torch.Tensor, None] = {}  # with a gradient, in backward, not updated yet
        self.early = EarlyUpdates()
        self._incomplete = ""  # what was interrupted
        self._is_aborted = False  # that step will never be complete
        self._backwards: set[int] = set()  # that began and are not over
        self._last_order: list[torch.Tensor] = []
        self._order: list[torch.Tensor] = []  # of gradients, in this step; before: in the last
        self._position: dict[torch.Tensor, int] = {}
        self._late: set[torch.Tensor] = set()  # whose gradients arrive several times in a backward
        self._num_arrivals: Counter[torch.Tensor] | None = None  # in the first step, if they are to be counted
        self._has_begun = False

    # -- complete or not ---------------------------------------------------------------------------------------

    def begin_update(self, first: str, parameters: Iterable[torch.Tensor]) -> None:
        """Of `parameters` the one named `first`, and perhaps others, are about to change."""
        self.has_updated = True
        if not self._incomplete:
            self.note_incomplete(f"step {self.num_steps + 1}, which began with {first}", parameters)

    def note_incomplete(self, what: str, parameters: Iterable[torch.Tensor]) -> None:
        """The step is incomplete from here on: `what` was interrupted. Empty: it is complete."""
        self._incomplete = what
        for owner in offloads_of(parameters):
            owner.note_incomplete(what)

    def note_error(self) -> None:
        """Notes that an error keeps the rest of the parameters from being updated."""
        self._is_aborted = bool(self._incomplete)

    def check_complete(self, checkpoint: str, *, may_go_on: bool = False) -> None:
        """Raises when a step was interrupted, or, unless it may go on, is under way."""
        is_going_on = may_go_on and bool(self.updated)
        if self._is_aborted or (self._incomplete and not is_going_on):
            raise RuntimeError(
                f"Expected whole steps, got one that was interrupted: {self._incomplete}. Some parameters are updated "
                f"and others are not: load a checkpoint of the model and of the optimizer ({checkpoint})"
            )

    def begin_load(self) -> None:
        """State is about to change, not that of the parameters."""
        self._incomplete = "load_state_dict()"

    def finish_load(self) -> None:
        """All state is loaded: nothing is left of what was interrupted."""
        self._incomplete, self._is_aborted = "", False
        self.begin_anew()

    def finish_step(self, parameters: Iterable[torch.Tensor]) -> None:
        """Every parameter is updated: the step is complete."""
        self.num_steps += 1
        if self._num_arrivals is not None:
            self._late = {parameter for parameter, count in self._num_arrivals.items() if count > 1}
            self._num_arrivals = None
        self.note_incomplete("", parameters)
        if self._order:
            self._last_order, self._order = self._order, []
            self._position = {p: i + 1 for i, p in enumerate(self._last_order)}
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forgets which parameters were updated and which gradients arrived."""
        self.updated, self.arrived, self._order, self._backwards = set(), {}, [], set()
        self.early.forget()
        if self._num_arrivals is not None:
            self._num_arrivals = Counter()

    # -- in backward ----------------------------------------------------------------------------------------

    def is_late(self, parameter: torch.Tensor) -> bool:
        """Whether this gradient stays until the step, see [Note: a backward inside a backward]."""
        if self._num_arrivals is not None:
            self._num_arrivals[parameter] += 1
            return True
        return parameter in self._late

    def count_arrivals(self, is_needed: Callable[[], bool]) -> bool:
        """In the first backward, if needed: all gradients stay until the step, and how often each arrives counts."""
        is_first, self._has_begun = not self._has_begun, True
        if is_first and is_needed():
            self._num_arrivals = Counter()
        return self._num_arrivals is not None

    def arrive(self, parameter: torch.Tensor, name: str) -> None:
        """Notes that the gradient of a parameter is complete.

        Raises:
            RuntimeError: it was before.
        """
        if parameter in self.updated or parameter in self.arrived:
            raise RuntimeError(_ONE_BACKWARD.format(name))
        self.arrived[parameter] = None
        self._order.append(parameter)

    def take_arrived(self) -> list[torch.Tensor]:
        """Those that have arrived, which are updated next."""
        arrived, self.arrived = list(self.arrived), {}
        return arrived

    def explain_used(self, name: str) -> Callable[[bool], str]:
        """What to tell who reads the gradient of this name, which was used, or a backward that wants to add to it.

        It is kept in `parameter.grad` and keeps no parameter alive, as this does.
        """
        own, step = weakref.ref(self), self.num_steps

        def explain(is_backward: bool) -> str:
            if not is_backward:
                return _USED.format(name)
            progress = own()
            return (_NOT_DROPPED if progress is None or progress.num_steps > step else _ONE_BACKWARD).format(name)

        return explain

    def check_zero_grad(self, *, set_to_none: bool) -> None:
        """Gradients are to be dropped.

        Raises:
            RuntimeError: some have changed their parameters already, or they are to be zeros.
        """
        if not set_to_none:
            raise RuntimeError(
                "Expected zero_grad(set_to_none=True) with step_in_backward, got False: it frees gradients"
            )
        if self.updated and not self._is_aborted:
            raise RuntimeError(
                "Expected step() after a backward with step_in_backward, got zero_grad(): parameters are updated "
                "already. Call step(), or run a backward that is not to update them in `with optimizer.accumulate():`"
            )
        if not self.updated:
            self.begin_anew()

    def follow_backward(self) -> bool:
        """Learns whether this backward ends or raises; whether it is a new one."""
        task = torch._C._current_graph_task_id()
        if task in self._backwards:
            return False
        self._backwards.add(task)
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self._backwards.discard(task))
        return True

    def end_backwards(self) -> None:
        """Takes backward passes that began and have not ended for ones that raised."""
        if self._backwards and self.updated:
            self._is_aborted = True
        self._backwards = set()

    def following(
        self, parameter: torch.Tensor, nbytes_of: Callable[[torch.Tensor], int], room: int
    ) -> Iterator[torch.Tensor]:
        """Parameters that came after this one in the last step and are not updated yet, within so many bytes."""
        start = self._position.get(parameter, len(self._last_order))
        for following in self._last_order[start : start + _MAX_AHEAD]:
            room -= nbytes_of(following)
            if room < 0:
                break
            if following not in self.updated:
                yield following
