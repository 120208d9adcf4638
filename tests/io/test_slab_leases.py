"""Slabs on loan, against a model that moves one slab at a time: a drive that takes a write only when the model says so.

Every write waits for a byte from a pipe, so that the engine comes to rest after each step and the model can say exactly
which chunk has a slab: one too many and staging grows without bound, one too few and a request waits for ever.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import Lab
from doses import dose
from engine_tools import SLAB_NBYTES, Io, Memory, Written, descriptors, random_bytes, round_up
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

NUM_EXAMPLES = dose(60, 600)
SIZES = st.one_of(st.integers(1, 9000), st.integers(1, 3 * SLAB_NBYTES), st.just(SLAB_NBYTES))
REST_SECONDS = 30  # then the engine is taken to hang
QUEUED, COPIED, WRITING, WRITTEN, RESCUED, DROPPED = "queued", "copied", "writing", "written", "rescued", "dropped"


@dataclass(eq=False)
class Chunk:
    """One slab's worth of a request."""

    request: Request
    nbytes: int
    pieces: set[int] = field(default_factory=set)
    state: str = QUEUED

    @property
    def is_wanted(self) -> bool:
        return bool(self.pieces - self.request.cancelled)


@dataclass(eq=False)
class Request:
    """A write, piece by piece and chunk by chunk."""

    written: Written
    chunks: list[Chunk] = field(default_factory=list)
    cancelled: set[int] = field(default_factory=set)
    copied: set[tuple[int, int]] = field(default_factory=set)  # (chunk, piece) that were read or need not be

    def of_piece(self, piece: int) -> list[Chunk]:
        return [chunk for chunk in self.chunks if piece in chunk.pieces]

    def is_piece_copied(self, piece: int) -> bool:
        return all((i, piece) in self.copied for i, chunk in enumerate(self.chunks) if piece in chunk.pieces)

    @property
    def is_done(self) -> bool:
        return all(chunk.state in (WRITTEN, RESCUED, DROPPED) for chunk in self.chunks)

    @property
    def written_nbytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks if chunk.state == WRITTEN)

    @property
    def rescued_nbytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks if chunk.state == RESCUED and chunk.is_wanted)


@dataclass(eq=False)
class Reading:
    """A read that is not known to be over."""

    read: Any
    memory: Memory
    content: bytes


class SlabLeases(RuleBasedStateMachine):
    """The engine, one writing thread, a gate before the drive, and the slabs as they must be."""

    kind = "threads"
    directory = ""

    @initialize(num_slabs=st.integers(1, 5), checksum=st.booleans())
    def begin(self, num_slabs: int, checksum: bool) -> None:
        os.environ.pop("FAKE_GATE", None)
        self.io = Io(self.kind, self.directory, num_slabs=num_slabs, num_threads=1, checksum=checksum)
        self.gate, self.key = os.pipe()
        os.environ["FAKE_GATE"] = str(self.gate)
        self.num_slabs = num_slabs
        self.requests: list[Request] = []
        self.queue: list[Chunk] = []  # in the order they get slabs
        self.slabs: list[Chunk] = []  # those that have one, in the order they go to the drive
        self.readings: list[Reading] = []
        self.peak = 0
        self.num_errors = 0

    # -- what the user does ----------------------------------------------------------------------------------------

    @precondition(lambda self: sum(self.io._next) < 12 << 20)
    @rule(sizes=st.lists(SIZES, min_size=1, max_size=4), gap_blocks=st.integers(0, 20))
    def write(self, sizes: list[int], gap_blocks: int) -> None:
        """Pieces on one extent: several in one slab, one in several."""
        contents = [random_bytes(size, size + len(self.requests)) for size in sizes]
        request = Request(self.io.write(*contents, gap_blocks=gap_blocks))
        at = 0
        spans = []
        for size in sizes:
            spans.append((at, at + size))
            at += round_up(size, self.io.block) + gap_blocks * self.io.block
        for start in range(0, at, SLAB_NBYTES):
            end = min(start + SLAB_NBYTES, at)
            pieces = {i for i, (first, last) in enumerate(spans) if first < end and start < last}
            request.chunks.append(Chunk(request, end - start, pieces, QUEUED if pieces else DROPPED))
        self.requests.append(request)
        self.queue += [chunk for chunk in request.chunks if chunk.state == QUEUED]
        self.hand_out()

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 99), piece=st.integers(0, 3))
    def cancel(self, which: int, piece: int) -> None:
        """What waits and nobody else needs is dropped at once, and its slab goes to the next; the rest finishes."""
        request = self.requests[which % len(self.requests)]
        piece %= len(request.written.contents)
        request.written.write.cancel(piece)
        request.cancelled.add(piece)
        for i, chunk in enumerate(request.chunks):
            if piece in chunk.pieces and chunk.state == QUEUED:
                request.copied.add((i, piece))
            if not chunk.is_wanted and chunk.state in (QUEUED, COPIED):
                chunk.state = DROPPED
        self.queue = [chunk for chunk in self.queue if chunk.state == QUEUED]
        self.slabs = [chunk for chunk in self.slabs if chunk.state != DROPPED]
        self.hand_out()

    def hand_out(self) -> None:
        """Free slabs go to the chunks that wait longest; the first one is at the drive."""
        while self.queue and len(self.slabs) < self.num_slabs:
            chunk = self.queue.pop(0)
            chunk.state = COPIED
            request = chunk.request
            request.copied |= {(request.chunks.index(chunk), piece) for piece in chunk.pieces}
            self.slabs.append(chunk)
            self.peak = max(self.peak, len(self.slabs))
        if self.slabs:
            self.slabs[0].state = WRITING

    @precondition(lambda self: self.readable())
    @rule(which=st.integers(0, 99))
    def read(self, which: int) -> None:
        """What is in slabs or rescued memory comes although the drive does not answer; the rest waits for it."""
        readable = self.readable()
        request, piece = readable[which % len(readable)]
        content = request.written.contents[piece]
        read, memory = self.io.start_read(request.written, piece)
        reading = Reading(read, memory, content)
        in_memory = [chunk.state in (COPIED, WRITING, RESCUED) for chunk in request.of_piece(piece)]
        if all(in_memory) or not self.slabs:
            self.finish(reading)
            assert read.forwarded_nbytes == (len(content) if all(in_memory) else read.forwarded_nbytes)
        else:
            self.readings.append(reading)

    def readable(self) -> list[tuple[Request, int]]:
        return [
            (request, piece)
            for request in self.requests
            for piece in range(len(request.written.contents))
            if request.is_piece_copied(piece) and piece not in request.cancelled
        ]

    def finish(self, reading: Reading) -> None:
        assert reading.read.wait(REST_SECONDS), "a read hangs"
        assert reading.read.error is None
        assert reading.memory.bytes(len(reading.content)) == reading.content

    # -- what the drive does ---------------------------------------------------------------------------------------

    @precondition(lambda self: self.slabs)
    @rule(succeeds=st.sampled_from([True, True, True, False]))
    def take_one(self, succeeds: bool) -> None:
        """One write ends; its slab goes to the next in the queue, also when the bytes had to be rescued from it."""
        chunk = self.slabs.pop(0)
        if succeeds:
            os.write(self.key, b".")
        else:
            os.environ["FAKE_WRITES"] = "e*"
            os.write(self.key, b"...")  # it is tried twice more
            self.num_errors += 1
        chunk.state = WRITTEN if succeeds else RESCUED
        self.hand_out()
        self.rest()
        os.environ.pop("FAKE_WRITES", None)
        for reading in self.readings:  # they were next at the drive
            self.finish(reading)
        self.readings.clear()

    # -- what always holds -------------------------------------------------------------------------------------------

    def expected(self) -> list[Any]:
        """What the engine must say of itself and of every request when it rests."""
        inflight = sum(sum(chunk.nbytes for chunk in r.chunks) for r in self.requests if not r.is_done)
        rescued = [request.rescued_nbytes for request in self.requests]
        totals = (len(self.slabs) * SLAB_NBYTES, inflight, self.num_errors, sum(rescued), self.peak * SLAB_NBYTES)
        return [
            totals,
            [request.is_done for request in self.requests],
            [request.written_nbytes for request in self.requests],
            rescued,
            [[r.is_piece_copied(i) for i in range(len(r.written.contents))] for r in self.requests],
        ]

    def actual(self) -> list[Any]:
        engine, writes = self.io.engine, [request.written.write for request in self.requests]
        return [
            (
                engine.staging_in_use_nbytes,
                engine.inflight_nbytes,
                engine.num_write_errors,
                engine.rescued_nbytes,
                engine.peak_staging_nbytes,
            ),
            [write.is_done for write in writes],
            [write.written_nbytes for write in writes],
            [write.rescued_nbytes for write in writes],
            [[r.written.write.is_piece_copied(i) for i in range(len(r.written.contents))] for r in self.requests],
        ]

    def is_at_drive(self) -> bool:
        """Whether a write has begun and waits at the gate: then the clock of the drive runs."""
        before = self.io.engine.write_busy_seconds
        return bool(self.io.engine.write_busy_seconds > before)

    @invariant()
    def rest(self) -> None:
        """The engine comes to rest where the model is."""
        deadline = time.monotonic() + REST_SECONDS
        while self.actual() != self.expected() or self.is_at_drive() != bool(self.slabs):
            assert time.monotonic() < deadline, f"\n{self.actual()} instead of\n{self.expected()}"
            time.sleep(0.0001)

    def teardown(self) -> None:
        """The drive takes all that is left: every slab is back, and what was not cancelled comes back."""
        if not hasattr(self, "io"):
            return
        while self.slabs:
            self.take_one(succeeds=True)
        for request, piece in self.readable():
            assert self.io.read(request.written, piece) == request.written.contents[piece]
        for request in self.requests:
            for piece in range(len(request.written.contents)):
                request.written.write.cancel(piece)
        assert self.io.engine.staging_in_use_nbytes == self.io.engine.rescued_nbytes == 0
        self.io.close()
        del os.environ["FAKE_GATE"]
        os.close(self.gate)
        os.close(self.key)


def play(kind: str, directory: str, num_examples: int) -> None:
    """In a process whose writes wait at the gate."""
    machine = type("Leases", (SlabLeases,), {"kind": kind, "directory": directory})
    before = descriptors()
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=num_examples, stateful_step_count=40, deadline=None, derandomize=True, database=None
        ),
    )
    assert (descriptors() - before, os.listdir(directory)) == (set(), [])


@pytest.mark.parametrize("kind", ["threads", "python"])
def test_slab_leases(lab: Lab, tmp_path: Path, kind: str) -> None:
    """Writes, cancels, reads and failures in any order: each slab is where it must be after every step."""
    lab.run(play, kind, tmp_path, NUM_EXAMPLES, seconds=dose(180, 1800))
