"""Which blocks are in memory: the ones in use, the next ones, and single parameters gathered for somebody.

Knows blocks and the records of their parameters, and neither hooks nor optimizers.

[Note: when a block leaves]
In forward after its forward, unless it is the next one needed. In backward when two other blocks have been needed
since: autograd runs operators in the reverse order of forward, but one of another block may come in between.

[Note: gathered parameters]
A parameter that somebody uses while its block does not run is gathered alone. Within a forward or backward its whole
block is reloaded, and released as blocks are. Gathered ones are released, the oldest first, when together they have
more bytes than the largest block, when a block is needed, and at `flush`: but those whose memory somebody else has
(``p.data`` in a list, a graph) stay as long as that is so, for evicting them would free nothing and lose what is
written there. One that was taken
out of its module (``block.fc.weight``) counts as changed, and may be used past PyTorch's Python functions, where
autograd saves the parameter itself: it stays until the second forward from then begins, when that graph has been
used. So does one whose address somebody has: addresses tell parameters apart.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence

import torch

from ssdtrain.parameters.block_order import BlockOrder
from ssdtrain.parameters.blocks import Block
from ssdtrain.parameters.parameter import ParameterRecord, ParameterRecords
from ssdtrain.state_stats import StateCounters

_NUM_FORWARDS = 2  # that begin before those leave that may be used past PyTorch's Python functions


class WorkingSet:
    """The blocks of one module, and which of them are needed."""

    def __init__(
        self, records: ParameterRecords, counters: StateCounters, prefetch_nbytes: int, num_blocks: int
    ) -> None:
        """Knows no block yet."""
        self.lock = threading.RLock()
        self.records = records
        self.blocks: list[Block] = []
        self._by_id: dict[int, tuple[ParameterRecord, Block]] = {}  # parameters, which it keeps alive
        self._counters = counters
        self._prefetch_nbytes = prefetch_nbytes
        self._order = BlockOrder(num_blocks)
        self._active: list[Block] = []  # the latest last
        self._ahead: list[Block] = []  # read before they are needed
        self._gathered: dict[ParameterRecord, int] = {}  # and the forward with which they leave; the oldest first
        self._gathered_nbytes = 0  # what they may have
        self._num_forwards = 0
        self._num_running = 0  # forwards of the whole module

    def __iter__(self) -> Iterator[ParameterRecord]:
        """All parameters."""
        return iter([r for r, _ in self._by_id.values()])

    def add(self, block: Block) -> None:
        """Another block, whose parameters leave as soon as they are written."""
        self.blocks.append(block)
        self._gathered_nbytes = max(self._gathered_nbytes, sum(r.nbytes for r in block.records))
        for r in block.records:
            self._by_id[id(r.parameter)] = r, block
            self.records.adopt(r)
        self.records.offload(block.records)

    def find(self, parameters: Iterable[torch.Tensor]) -> list[ParameterRecord]:
        """The records of those of `parameters` that are offloaded here."""
        return [self._by_id[id(p)][0] for p in parameters if id(p) in self._by_id]

    def clear(self) -> None:
        """Forgets all blocks: the offload is closed."""
        self.blocks, self._by_id, self._active, self._ahead, self._gathered = [], {}, [], [], {}

    # -- blocks --------------------------------------------------------------------------------------------------------

    def begin_forward(self) -> None:
        """A forward of the whole module begins."""
        self._num_running += 1
        self._num_forwards += 1

    def end_forward(self) -> None:
        """A forward of the whole module has ended."""
        self._num_running -= 1

    def use(self, block: Block) -> None:
        """`block` is needed now: it is reloaded, others are released, the next ones are prefetched."""
        is_backward = is_in_backward()
        with self.lock:
            if not self.blocks:  # closed meanwhile: all is in memory
                return
            if is_backward and self._active and self._active[-1] is block:
                self.records.reload(block.records)
                return
            if not is_backward and not self._num_running and block.index <= self._order.latest:
                self._num_forwards += 1
            self._order.note(block.index)
            self.records.reload(block.records)
            self._active = [*(b for b in self._active if b is not block), block]
            self._dismiss(self._active[: -2 if is_backward else -1])
            self.release_gathered()
            self._prefetch()

    def use_parameter(self, r: ParameterRecord) -> None:
        """A parameter is needed: its whole block is reloaded, and the current stream uses it."""
        known = self._by_id.get(id(r.parameter))
        if known is not None and (r.storage is None or not self._active or self._active[-1] is not known[1]):
            self.use(known[1])
        r.use()

    def end_use(self, block: Block) -> None:
        """The forward of `block` has ended: it is released, unless it is the next one needed."""
        with self.lock:
            if next(self._order.upcoming(), None) != block.index:
                self._dismiss([block])

    def dismiss_idle(self) -> None:
        """Releases the blocks that do not run, and all parameters that nobody has gathered."""
        with self.lock:
            if not is_in_backward():
                self._dismiss(list(self._active))
            self.release_gathered()
            self.release(self)

    def _dismiss(self, blocks: Sequence[Block]) -> None:
        gone = [block for block in blocks if not block.num_running]
        self._active = [block for block in self._active if block not in gone]
        leaving = [r for block in gone for r in block.records]
        shared = [r for r in leaving if r.is_shared]  # who has their memory may write there: they stay meanwhile
        self.gather(shared)
        self.records.note_changed(shared)
        self.release(leaving)

    def _prefetch(self) -> None:
        """Reads ahead within the budget, and forgets what was read ahead in error."""
        room, wanted = self._prefetch_nbytes, list[Block]()
        for index in self._order.upcoming():
            block = self.blocks[index]
            if block in wanted:
                break
            room -= sum(r.nbytes for r in block.records if r.storage is None)
            if room < 0:
                break
            wanted.append(block)
        self.records.forget(r for block in self._ahead if block not in wanted for r in block.records)
        self._ahead = wanted
        for block in wanted:
            self._counters.num_prefetched += self.records.prefetch(block.records)

    # -- gathered parameters -------------------------------------------------------------------------------------------

    def gather_taken_out(self, parameter: torch.Tensor) -> None:
        """Somebody takes a parameter out of its module: it is gathered, alone or with its block."""
        known = self._by_id.get(id(parameter))
        if known is None or known[1].num_running:
            return
        if not self._pass_through(known[1]):
            self.gather([known[0]], _NUM_FORWARDS if torch.is_grad_enabled() else 0)
            self.records.note_changed([known[0]])  # through `.data`, perhaps

    def access(self, records: Sequence[ParameterRecord], *, stays: bool) -> None:
        """Gathers parameters that somebody computes with, and holds meanwhile. `stays`: and knows where they are."""
        with self.lock:
            for r in records:
                known = self._by_id.get(id(r.parameter))
                if known is not None and not self._pass_through(known[1]):
                    self.gather([r], _NUM_FORWARDS if stays else 0)

    def _pass_through(self, block: Block) -> bool:
        """Within a forward of the module or a backward, its whole block is reloaded; false: neither runs."""
        if not is_in_backward() and self._num_running == 0:
            return False
        with self.lock:
            if self._active and self._active[-1] is block:
                self.records.reload(block.records)
            else:
                self.use(block)
        return True

    def gather(self, records: Sequence[ParameterRecord], num_forwards: int = 0) -> None:
        """Reloads parameters; they stay at least until so many forwards have begun and a block is needed."""
        with self.lock:
            until = self._num_forwards + num_forwards
            for r in records:
                self._gathered[r] = max(until, self._gathered.pop(r, 0))
                r.note_gathered(is_gathered=True)
            self.records.reload(records)

    def release_gathered(self, nbytes: int = 0) -> None:
        """Releases gathered parameters that may leave, the oldest first, until the others have at most `nbytes`."""
        with self.lock:
            excess = sum(r.nbytes for r in self._gathered) - nbytes
            leaving = []
            for r, until in self._gathered.items():
                if excess <= 0:
                    break
                if until <= self._num_forwards and not r.num_pins and not r.is_shared:
                    leaving.append(r)
                    excess -= r.nbytes
            for r in leaving:
                del self._gathered[r]
                r.note_gathered(is_gathered=False)
            self.release(leaving)

    def limit_gathered(self) -> None:
        """See [Note: gathered parameters]."""
        self.release_gathered(self._gathered_nbytes)

    def release(self, records: Iterable[ParameterRecord]) -> None:
        """Offloads these, but those that are gathered or whose block is in use."""
        with self.lock:
            self.records.offload([r for r in records if r not in self._gathered and not self._is_in_use(r)])

    def _is_in_use(self, r: ParameterRecord) -> bool:
        known = self._by_id.get(id(r.parameter))
        return known is None or known[1] in self._active or known[1].num_running > 0


def is_in_backward() -> bool:
    """Whether this thread is running a graph backward."""
    return bool(torch._C._current_graph_task_id() != -1)
