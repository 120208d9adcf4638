"""Sees whether training takes steps, and whether autograd shows our hooks what it saves; has a verdict passed.

Knows neither records nor drives. It is asked when a step of an optimizer is over, when the context is left with all
graphs used, and when the run ends; what it has to say is said once.

[Note: what the hooks cannot see]
Where other hooks are the innermost, or forward runs in a thread that did not enter, our hooks are not called, and
nothing counts. That a step was taken is then known from its optimizer alone. After one in which nothing was seen, the
forwards of modules in the next are looked at, until one shows who takes what is saved. Until then nothing is looked at.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from functools import partial
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import _global_optimizer_post_hooks, register_optimizer_step_post_hook

from ssdtrain.policy import ActivationPolicy
from ssdtrain.stats import Counters
from ssdtrain.store.saved_tensors import innermost_hooks
from ssdtrain.verdict import DISABLED, Training, on_activations

logger = logging.getLogger("ssdtrain")


class NothingOffloaded:
    """Follows one offload context from its making to its end."""

    def __init__(
        self, offload: object, policy: ActivationPolicy, counters: Counters, threads: list[threading.Thread]
    ) -> None:
        """`threads` are those in which `offload` is entered, now and later. What is said goes to `counters` too."""
        self._offload = weakref.ref(offload)
        self._policy, self._counters, self._threads = policy, counters, threads
        self._pid = os.getpid()
        self._num_entered = self._num_steps = 0
        self._unseen = ""
        self._has_seen_step = self._has_spoken = self._is_over = False
        self._handles: list[Any] = []
        if policy.enabled:
            weakref.finalize(offload, self._finish)
            own = weakref.ref(self)
            _clear_away()
            self._handles.append(register_optimizer_step_post_hook(partial(_after_step, own)))

    def enter(self) -> None:
        """The context is entered."""
        if not self._policy.enabled:
            if self._counters.fall_back(DISABLED):
                logger.info("%s", DISABLED)
            return
        if not self._num_entered:
            self._num_steps = 0
        self._num_entered += 1

    def leave(self) -> None:
        """It is left. With all graphs used, a step is over."""
        if not self._threads and self._counters.num_saved and not self._counters.held_nbytes:
            self._judge_step()

    def note_step(self) -> None:
        """An optimizer has taken a step."""
        self._num_steps += 1
        if self._has_seen_step or not self._num_entered or os.getpid() != self._pid:
            return
        if self._counters.num_saved:
            self._judge_step()
            return
        if torch._C._current_graph_task_id() == -1:  # else in backward, whose threads are no forward's
            self._unseen = self._look()
        if len(self._handles) == 1:  # see [Note: what the hooks cannot see]
            self._handles.append(register_module_forward_pre_hook(partial(_before_forward, weakref.ref(self))))

    def note_forward(self) -> None:
        """A module is about to run, after a step in which nothing was seen."""
        if self._counters.num_saved:
            self._stop_looking()
        elif torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            unseen = self._look()
            if unseen:
                self._unseen = unseen
                self._judge_step()

    def end(self) -> None:
        """No step follows, as somebody says who knows of the context."""
        if self._num_entered or self._num_steps:
            self._judge_end()
        self._stop()

    def _finish(self) -> None:
        """The same, for one that is dropped, or when the process ends.

        Perhaps in the middle of an optimizer's step, while PyTorch goes through its hooks: ours stays, see
        `_clear_away`.
        """
        self._judge_end()
        self._stop_looking()
        self._is_over, self._handles = True, []

    def _judge_end(self) -> None:
        has_failed = not self._num_entered and getattr(sys, "last_value", None) is not None  # which tells enough
        if not self._is_over and not has_failed and os.getpid() == self._pid:
            self._judge(is_over=True)

    def _judge_step(self) -> None:
        if not self._has_seen_step:
            self._has_seen_step = True
            self._stop_looking()
            self._judge(is_over=False)

    def _judge(self, *, is_over: bool) -> None:
        training = Training(is_over, self._num_entered, self._num_steps, self._unseen)
        text = on_activations(self._counters, self._policy, training) if not self._has_spoken else None
        if text is not None:
            self._has_spoken = True
            if self._counters.fall_back(text):
                logger.warning("%s", text)

    def _look(self) -> str:
        """Why this thread's forward would show our hooks nothing now; nothing while the context is not entered."""
        hooks, offload = innermost_hooks(), self._offload()
        if not self._threads or offload is None:
            return ""
        if threading.current_thread() not in self._threads:
            names = ", ".join(sorted({repr(thread.name) for thread in self._threads}))
            return (
                f"forward runs in thread {threading.current_thread().name!r} and the context was entered in {names}: "
                "hooks belong to a thread; enter it in the thread that runs forward"
            )
        pack = hooks[0] if hooks is not None else None
        while isinstance(pack, partial) and pack.args:  # of offloaded parameters, which pass on what is not theirs
            pack = pack.args[0]
        if getattr(pack, "__self__", None) is offload:
            return ""
        return (
            f"it asks the innermost hooks alone, and inside this context those of {_name(pack)} are on: use one of the "
            "two, or enter this context inside"
        )

    def _stop_looking(self) -> None:
        for handle in self._handles[1:]:
            handle.remove()
        del self._handles[1:]

    def _stop(self) -> None:
        self._is_over = True
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _clear_away() -> None:
    """Takes away the hooks of those that were dropped."""
    for key, hook in list(_global_optimizer_post_hooks.items()):
        if isinstance(hook, partial) and hook.func is _after_step and _is_done(hook.args[0]()):
            del _global_optimizer_post_hooks[key]


def _is_done(reporter: NothingOffloaded | None) -> bool:
    return reporter is None or not reporter._handles


def _after_step(reporter: weakref.ref[NothingOffloaded], *_: object) -> None:
    if not torch.compiler.is_compiling():  # nothing of this is to be traced
        own = reporter()
        if own is not None:
            own.note_step()


def _before_forward(reporter: weakref.ref[NothingOffloaded], *_: object) -> None:
    if not torch.compiler.is_compiling():
        own = reporter()
        if own is not None:
            own.note_forward()


def _name(pack: object) -> str:
    owner = getattr(pack, "__self__", None)
    if owner is not None:
        return f"{type(owner).__module__}.{type(owner).__qualname__}.{getattr(pack, '__name__', pack)}"
    named = pack if hasattr(pack, "__qualname__") else type(pack)
    return f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', named)}"
