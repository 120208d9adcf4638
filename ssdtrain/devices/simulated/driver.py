"""What an engine's threads ask of the simulated accelerator: integers only, any thread, no other lock held."""

from __future__ import annotations

import ctypes

from ssdtrain.devices.simulated.machine import _IN, _OUT, Machine, Work
from ssdtrain.devices.simulated.order import Span
from ssdtrain.devices.simulated.streams import Event
from ssdtrain.io.open_engine import driver_type


class SimulatedDriver(driver_type()):  # type: ignore[misc]
    """Streams, events and copies of a `Machine`."""

    def __init__(self, machine: Machine) -> None:
        """No event yet."""
        super().__init__()
        self._machine = machine
        self._events: dict[int, Event] = {}
        self._free: list[int] = []
        self._pinned: dict[int, int] = {}

    def index(self) -> int:
        """There is one device."""
        return 0

    def record(self, stream: int) -> int:
        """An event that is complete when all that is queued on `stream` so far is over."""
        machine = self._machine
        with machine.lock:
            handle = self._free.pop() if self._free else len(self._events) + 1
            self._events[handle] = machine.record(machine.stream(stream))
        return handle

    def wait(self, stream: int, event: int) -> None:
        """What is queued on `stream` later runs after `event`."""
        with self._machine.lock:
            self._machine.wait(self._machine.stream(stream), self._event(event))

    def copy_out(self, stream: int, host: int, device: int, nbytes: int) -> None:
        """Queues a copy from device memory to host memory."""
        self._copy("copy_out", stream, host, device, nbytes)

    def copy_in(self, stream: int, device: int, host: int, nbytes: int) -> None:
        """Queues a copy from host memory to device memory."""
        self._copy("copy_in", stream, device, host, nbytes)

    def synchronize(self, event: int) -> None:
        """Blocks until `event` is complete."""
        machine = self._machine
        with machine.lock:
            waited = self._event(event)
        machine.synchronize(waited, f"event {event} of stream {waited.stream.handle} to be complete")
        if machine.thread.num_entered:
            machine.raise_kept()

    def is_complete(self, event: int) -> bool:
        """Whether all that was queued before `event` is over."""
        machine = self._machine
        with machine.lock:
            asked = self._event(event)
            if asked.is_complete:
                machine.order.arrive(asked.clock)
                return True
            machine.executor.nudge()
        return False

    def release(self, event: int) -> None:
        """Frees the handle of an event for another one."""
        with self._machine.lock:
            self._event(event)
            del self._events[event]
            self._free.append(event)

    def out_stream(self) -> int:
        """The driver's stream for copies out."""
        return _OUT

    def in_stream(self) -> int:
        """The driver's stream for copies in."""
        return _IN

    def pin(self, address: int, nbytes: int) -> str:
        """Host memory that copies will use; never refused. What was there before is other memory."""
        with self._machine.lock:
            self._pinned[address] = nbytes
            self._machine.order.history.forget(Span(address, nbytes))
        return ""

    def unpin(self, address: int) -> None:
        """No copy will use this memory any more."""
        with self._machine.lock:
            self._machine.order.history.forget(Span(address, self._pinned.pop(address)))

    def host_read(self, address: int, nbytes: int, what: str) -> None:
        """The calling thread reads memory now, for instance to write it to a drive."""
        self._machine.touch_on_host(what, (Span(address, nbytes),), ())

    def host_write(self, address: int, nbytes: int, what: str) -> None:
        """The calling thread writes memory now."""
        self._machine.touch_on_host(what, (), (Span(address, nbytes),))

    def _copy(self, name: str, stream: int, to: int, source: int, nbytes: int) -> None:
        device = Span(source if name == "copy_out" else to, nbytes)
        host = Span(to if name == "copy_out" else source, nbytes)
        machine = self._machine
        with machine.lock:  # so that the memory cannot be freed between the check and the queue
            self._check_pinned(host, name)
            keep = machine.need_live(device, name)
            work = Work(
                name, lambda: ctypes.memmove(to, source, nbytes), (Span(source, nbytes),), (Span(to, nbytes),), keep
            )
            machine.submit(machine.stream(stream), work)

    def _check_pinned(self, host: Span, name: str) -> None:
        """As CUDA does, it refuses a copy that goes beyond memory that was pinned in one step."""
        for address, nbytes in self._pinned.items():
            is_inside = address <= host.address and host.address + host.nbytes <= address + nbytes
            if not is_inside and address < host.address + host.nbytes and host.address < address + nbytes:
                raise ValueError(
                    f"Expected host memory for `{name}` that was pinned in one step, got {host}, beyond {nbytes} bytes "
                    f"at {address:#x}: split the copy there"
                )

    def _event(self, handle: int) -> Event:
        try:
            return self._events[handle]
        except KeyError:
            raise ValueError(
                f"Expected an event that was recorded and not released, got {handle}; {len(self._events)} are alive"
            ) from None
