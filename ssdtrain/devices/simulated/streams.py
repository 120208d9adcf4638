"""Streams that run later: queues, and a thread that runs their heads in an order a seeded generator picks.

It does not know what an operation is about. One lock guards all; it is never held while an operation runs.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ssdtrain.devices.simulated.order import Clock

_MAX_SHOWN = 8


class SimulationStuckError(RuntimeError):
    """A wait took longer than the simulation allows."""


@dataclass(eq=False, slots=True)
class Item:
    """One thing to do on a stream."""

    name: str
    run: Callable[[], object] | None = None
    after: Event | None = None
    """Not before this event is complete."""
    keep: tuple[Any, ...] = ()
    """What must stay alive until it has run."""


@dataclass(eq=False)
class Stream:
    """A queue whose items run one after the other."""

    handle: int
    name: str
    queue: deque[Item] = field(default_factory=deque)
    num_queued: int = 0
    num_done: int = 0
    is_held: bool = False

    def __str__(self) -> str:
        shown = [item.name if item.after is None else f"{item.name} ({item.after})" for item in self.queue]
        more = f", {len(shown) - _MAX_SHOWN} more" if len(shown) > _MAX_SHOWN else ""
        held = " (held)" if self.is_held else ""
        return f"stream {self.handle} {self.name}{held}: [{', '.join(shown[:_MAX_SHOWN])}{more}]"


@dataclass(eq=False, slots=True)
class Event:
    """A place in a stream's queue, and what is before it."""

    stream: Stream
    position: int
    clock: Clock

    @property
    def is_complete(self) -> bool:
        """Whether all that was queued before it is over. Needs the executor's lock."""
        return self.stream.num_done >= self.position

    def __str__(self) -> str:
        return f"waits for {self.position - self.stream.num_done} more of stream {self.stream.handle}"


@dataclass(eq=False, slots=True)
class _Waiter:
    """A thread that waits. The executor looks for it: to wake it after every operation would cost most of the time."""

    condition: Callable[[], bool]
    is_over: threading.Event = field(default_factory=threading.Event)


class Executor:
    """Runs what is queued.

    It runs while somebody waits, and while more than `run_ahead` operations are queued on streams that are not held: so
    a test says how far the host gets ahead of the streams. Its thread ends when nothing is queued.
    """

    def __init__(self, seed: int, run_ahead: int, timeout_seconds: float) -> None:
        """No thread yet."""
        self.lock = threading.RLock()  # a destructor may queue or record while this thread holds it
        self.streams: dict[int, Stream] = {}
        self.errors: list[BaseException] = []
        self._work = threading.Condition(self.lock)  # the executor's thread sleeps on it
        self._random = random.Random(seed)
        self._run_ahead = run_ahead
        self._timeout_seconds = timeout_seconds
        self._waiters: list[_Waiter] = []
        self._is_nudged = False
        self._thread: threading.Thread | None = None

    def put(self, stream: Stream, item: Item) -> None:
        """Queues `item`."""
        with self.lock:
            stream.queue.append(item)
            stream.num_queued += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="ssdtrain-simulated", daemon=True)
                self._thread.start()
            elif self._is_asked_to_run():
                self._work.notify()

    def hold(self, stream: Stream, is_held: bool) -> None:
        """Nothing more of this stream is begun until it is let go."""
        with self.lock:
            stream.is_held = is_held
            self._work.notify()

    def nudge(self) -> None:
        """Somebody polls: one more operation runs, or polling would never end."""
        with self.lock:
            self._is_nudged = True
            self._work.notify()

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Blocks without the lock and the GIL until `condition`.

        Raises:
            SimulationStuckError: it does not come about in time.
        """
        with self.lock:
            if condition():
                return
            waiter = _Waiter(condition)
            self._waiters.append(waiter)
            self._work.notify()
        try:
            if not waiter.is_over.wait(self._timeout_seconds):
                raise SimulationStuckError(
                    f"Expected {what} within {self._timeout_seconds} s, got stuck; still queued: {self.describe()}"
                )
        finally:
            with self.lock:
                self._waiters.remove(waiter)

    def drain(self) -> None:
        """Blocks until nothing is queued."""
        self.wait_for(lambda: not any(s.num_done < s.num_queued for s in self.streams.values()), "all streams to end")

    def describe(self) -> str:
        """The queued operations of every stream, for messages."""
        with self.lock:
            return "; ".join(str(s) for s in self.streams.values() if s.queue) or "nothing"

    def join(self) -> None:
        """Waits for the thread to end; nothing may be queued."""
        with self.lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(self._timeout_seconds)

    def _loop(self) -> None:
        torch.set_num_threads(torch.get_num_threads())  # as in the program: sums depend on it, and a thread has its own
        with torch._C._AutoDispatchBelowAutograd():
            while (chosen := self._next()) is not None:
                stream, item = chosen
                self._run(item)
                del item, chosen
                with self.lock:
                    stream.num_done += 1
                    for waiter in self._waiters:
                        if waiter.condition():
                            waiter.is_over.set()

    def take_errors(self) -> list[BaseException]:
        """What was raised since the last time."""
        with self.lock:
            errors, self.errors = self.errors, []
        return errors

    def _run(self, item: Item) -> None:
        if item.run is None:
            return
        try:
            item.run()
        except BaseException as error:  # raised in the thread that synchronizes next
            with self.lock:
                self.errors.append(error)

    def _next(self) -> tuple[Stream, Item] | None:
        """Blocks until something is to be run. None: nothing is queued, and this thread is over."""
        with self.lock:
            while any(stream.queue for stream in self.streams.values()):
                ready = self._ready()
                if ready and self._is_asked_to_run():
                    self._is_nudged = False
                    stream = self._random.choice(ready)
                    return stream, stream.queue.popleft()
                self._work.wait()
            self._thread = None
            return None

    def _ready(self) -> list[Stream]:
        free = [s for s in self.streams.values() if s.queue and not s.is_held]
        return [s for s in free if s.queue[0].after is None or s.queue[0].after.is_complete]

    def _is_asked_to_run(self) -> bool:
        if self._is_nudged or any(not waiter.is_over.is_set() for waiter in self._waiters):
            return True
        return sum(len(s.queue) for s in self.streams.values() if not s.is_held) > self._run_ahead
