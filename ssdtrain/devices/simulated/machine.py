"""The simulated hardware: streams, memory and the check, behind one lock.

The driver (bytes), the dispatch mode (tensors) and the device (what the store sees) are three ways to use it.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ssdtrain.devices.simulated.order import HOST, Order, Span, caller
from ssdtrain.devices.simulated.pool import GRAIN_NBYTES, Block, Pool
from ssdtrain.devices.simulated.streams import Event, Executor, Item, Stream

_COMPUTE, _OUT, _IN = 0, 1, 2
RAW_POISON = 0xFF  # not a number in every floating-point type
INTEGER_POISON = 0xA5


@dataclass(eq=False, slots=True)
class Work:
    """An operation to be queued."""

    name: str
    run: Callable[[], object] | None
    reads: tuple[Span, ...] = ()
    writes: tuple[Span, ...] = ()
    keep: tuple[Any, ...] = ()
    """What must stay alive until it has run."""


class Mark:
    """A point in a stream's queue that remembers when it was reached."""

    def __init__(self, stream: int, executor: Executor) -> None:
        """Not reached yet."""
        self.stream = stream
        self._executor = executor
        self._at: float | None = None

    def reach(self) -> None:
        """Notes that the stream has come to the event."""
        self._at = time.perf_counter()

    @property
    def is_reached(self) -> bool:
        """Whether the stream has come to the event."""
        if self._at is None:
            self._executor.nudge()
        return self._at is not None

    def seconds_since(self, earlier: Any) -> float:
        """Since an earlier mark; both are reached."""
        assert self._at is not None
        return float(self._at - earlier._at)


class _Thread(threading.local):
    """What a thread has set for itself."""

    def __init__(self) -> None:
        self.num_entered = 0
        self.streams: list[int] = [_COMPUTE]


class Machine:
    """Streams, events, memory."""

    def __init__(self, seed: int, run_ahead: int, timeout_seconds: float) -> None:
        """A compute stream and two transfer streams, no memory yet."""
        self.executor = Executor(seed, run_ahead, timeout_seconds)
        self.lock = self.executor.lock
        self.order = Order()
        self.pool = Pool(self.record, self.order.arrive, self.order.history.forget)
        self.thread = _Thread()
        self._foreign: dict[int, tuple[StorageWeakRef, int]] = {}
        for name in ("compute", "out", "in"):
            self.add_stream(name)

    # -- streams ---------------------------------------------------------------------------------------------------

    def add_stream(self, name: str) -> int:
        """The handle of a new stream."""
        with self.lock:
            handle = len(self.executor.streams)
            self.executor.streams[handle] = Stream(handle, name)
        return handle

    def stream(self, handle: int) -> Stream:
        """The stream of a handle."""
        try:
            return self.executor.streams[handle]
        except KeyError:
            known = sorted(self.executor.streams)
            raise ValueError(f"Expected the handle of a stream, one of {known}, got {handle}") from None

    @property
    def current(self) -> Stream:
        """The compute stream of this thread."""
        return self.executor.streams[self.thread.streams[-1]]

    # -- work and order ----------------------------------------------------------------------------------------------

    def submit(self, stream: Stream, work: Work) -> None:
        """Queues `work`.

        Raises:
            UnorderedAccessError: it touches bytes that something unordered touches; only in threads that train.
        """
        with self.lock:
            error = self.order.touch(stream.handle, work.name, work.reads, work.writes)
            if error is not None:
                self.complain(error)
            self.executor.put(stream, Item(work.name, work.run, None, work.keep))

    def touch_on_host(self, name: str, reads: tuple[Span, ...], writes: tuple[Span, ...]) -> None:
        """A host thread reads or writes memory now."""
        with self.lock:
            error = self.order.touch(HOST, name, reads, writes)
            if error is not None:
                self.complain(error)

    def record(self, stream: Stream) -> Event:
        """An event that is complete when all that is queued on `stream` so far is over. Takes no lock."""
        clock = self.order.clock(stream.handle)  # before the position: work queued in between is waited for, unclaimed
        return Event(stream, stream.num_queued, clock)

    def mark(self) -> Mark:
        """Notes when this thread's compute stream gets to what is queued next."""
        stream = self.current
        mark = Mark(stream.handle, self.executor)
        self.executor.put(stream, Item("mark", mark.reach))
        return mark

    def wait(self, stream: Stream, event: Event) -> None:
        """What is queued on `stream` later runs after `event`."""
        with self.lock:
            self.order.wait(stream.handle, event.clock)
            if event.stream is not stream:
                self.executor.put(stream, Item("wait", None, event))

    def synchronize(self, event: Event, what: str) -> None:
        """Blocks until `event` is complete."""
        self.executor.wait_for(lambda: event.is_complete, what)
        with self.lock:
            self.order.arrive(event.clock)

    def synchronize_all(self) -> None:
        """Blocks until nothing is queued; raises what went wrong since the last time."""
        self.executor.drain()
        with self.lock:
            for handle in self.executor.streams:
                self.order.arrive(self.order.clock(handle))
        self.raise_kept()

    def complain(self, error: BaseException) -> None:
        """Raises in a thread that trains; an error of an engine's thread is kept for such a thread."""
        if self.thread.num_entered:
            raise error
        with self.lock:
            self.executor.errors.append(error)

    def raise_kept(self) -> None:
        """Raises the first error that was kept; what came after it is its consequence."""
        with self.lock:
            errors = self.executor.take_errors()
        if errors:
            raise errors[0]

    # -- memory ----------------------------------------------------------------------------------------------------

    def allocate(
        self, nbytes: int, *, capacity: int = 0, alignment: int = GRAIN_NBYTES, poison: int = RAW_POISON
    ) -> tuple[torch.UntypedStorage, Block]:
        """Memory of the current stream, overwritten in stream order whatever others still do with its bytes."""
        stream = self.current
        with self.lock:
            block = self.pool.take(max(nbytes, capacity), stream.handle, alignment)
            storage = self.pool.hand_out(block, nbytes)  # from here on the block goes back by itself
            address, size = block.address, block.nbytes
            run = partial(ctypes.memset, address, poison, size)
            self.submit(stream, Work("reuse of a block", run, (), (block.span,), (block.segment,)))
        return storage, block

    def need_live(self, span: Span, name: str) -> tuple[Any, ...]:
        """What keeps the memory mapped; device memory must belong to a tensor that is alive.

        Raises:
            RuntimeError: it was freed; only in threads that train.
        """
        with self.lock:
            self.pool.settle()
            block = self.pool.find(span.address)
            if block is None:
                return self._foreign_owner(span.address)
            if not block.is_live or span.address + span.nbytes > block.end:
                state = "ends before that" if block.is_live else "is freed"
                self.complain(
                    RuntimeError(
                        f"Expected memory of a live tensor for `{name}` ({span}, queued at {caller()}), got a block of "
                        f"{block.nbytes} bytes at {block.address:#x} that {state}; keep the tensor until then"
                    )
                )
            return (block.segment,)

    # -- memory of others --------------------------------------------------------------------------------------------

    def note_foreign(self, storage: torch.UntypedStorage) -> None:
        """Memory that is not ours takes part: what is known of an earlier owner of the address is void."""
        address, nbytes = storage.data_ptr(), storage.nbytes()
        with self.lock:
            known = self._foreign.get(address)
            if known is not None and known[0].cdata == storage._cdata and not known[0].expired():
                return
            self.order.history.forget(Span(address, nbytes))
            self._foreign[address] = (StorageWeakRef(storage), nbytes)
            self._forget_dead_foreigners()

    def _forget_dead_foreigners(self) -> None:
        if len(self._foreign) & (len(self._foreign) - 1) == 0:  # now and then: at powers of two
            self._foreign = {a: known for a, known in self._foreign.items() if not known[0].expired()}

    def _foreign_owner(self, address: int) -> tuple[Any, ...]:
        known = self._foreign.get(address)
        storage = torch.UntypedStorage._new_with_weak_ptr(known[0].cdata) if known is not None else None
        return () if storage is None else (storage,)
