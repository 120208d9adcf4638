"""Which blocks are in memory: the ones in use, the next ones, and parameters that came for a visit.

Knows blocks and residences, and neither hooks nor optimizers.

[Note: when a block leaves]
In forward after its forward, unless it is the next one needed. In backward when two other blocks have been needed
since: autograd runs operators in the reverse order of forward, but one of another block may come in between.

[Note: visitors]
A parameter that somebody uses while its block does not run comes alone. Within a forward or backward its whole block
comes, to leave as blocks do. Visitors leave when more of them are there than the largest block has bytes, the oldest
first, when a block is needed, and at `flush`: but those whose memory somebody else has (``p.data`` in a list, a
graph) stay as long as that is so, for leaving would free nothing and lose what is written there. One that was taken
out of its module (``block.fc.weight``) counts as changed, and may be used past PyTorch's Python functions, where
autograd saves the parameter itself: it stays until the second forward from then begins, when that graph has been
used. So does one whose address somebody has: addresses tell parameters apart.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence

import torch

from ssdtrain.parameters.block_order import UseOrder
from ssdtrain.parameters.blocks import Block
from ssdtrain.parameters.parameter import Residence, Residences
from ssdtrain.state_stats import StateCounters

_NUM_FORWARDS = 2  # that begin before those leave that may be used past PyTorch's Python functions


class Uses:
    """The blocks of one module, and which of them are needed."""

    def __init__(self, residences: Residences, counters: StateCounters, prefetch_nbytes: int, num_blocks: int) -> None:
        """Knows no block yet."""
        self.lock = threading.RLock()
        self.residences = residences
        self.blocks: list[Block] = []
        self._by_id: dict[int, tuple[Residence, Block]] = {}  # parameters, which it keeps alive
        self._counters = counters
        self._prefetch_nbytes = prefetch_nbytes
        self._order = UseOrder(num_blocks)
        self._active: list[Block] = []  # the latest last
        self._ahead: list[Block] = []  # read before they are needed
        self._visitors: dict[Residence, int] = {}  # and the forward with which they leave; the oldest first
        self._visitors_nbytes = 0  # what they may have
        self._num_forwards = 0
        self._num_running = 0  # forwards of the whole module

    def __iter__(self) -> Iterator[Residence]:
        """All parameters."""
        return iter([r for r, _ in self._by_id.values()])

    def add(self, block: Block) -> None:
        """Another block, whose parameters leave as soon as they are written."""
        self.blocks.append(block)
        self._visitors_nbytes = max(self._visitors_nbytes, sum(r.nbytes for r in block.residences))
        for r in block.residences:
            self._by_id[id(r.parameter)] = r, block
            self.residences.adopt(r)
        self.residences.leave(block.residences)

    def find(self, parameters: Iterable[torch.Tensor]) -> list[Residence]:
        """Those of `parameters` that are offloaded here."""
        return [self._by_id[id(p)][0] for p in parameters if id(p) in self._by_id]

    def clear(self) -> None:
        """Knows no block any more."""
        self.blocks, self._by_id, self._active, self._ahead, self._visitors = [], {}, [], [], {}

    # -- blocks --------------------------------------------------------------------------------------------------------

    def begin_forward(self) -> None:
        """A forward of the whole module begins."""
        self._num_running += 1
        self._num_forwards += 1

    def end_forward(self) -> None:
        """It is over."""
        self._num_running -= 1

    def use(self, block: Block) -> None:
        """`block` is needed now: it comes, others go, the next ones are read ahead."""
        is_backward = is_in_backward()
        with self.lock:
            if not self.blocks:  # closed meanwhile: all is in memory
                return
            if is_backward and self._active and self._active[-1] is block:
                self.residences.bring(block.residences)
                return
            if not is_backward and not self._num_running and block.index <= self._order.latest:
                self._num_forwards += 1
            self._order.note(block.index)
            self.residences.bring(block.residences)
            self._active = [*(b for b in self._active if b is not block), block]
            self._dismiss(self._active[: -2 if is_backward else -1])
            self.send_visitors_home()
            self._prefetch()

    def use_parameter(self, r: Residence) -> None:
        """One of a block is needed."""
        known = self._by_id.get(id(r.parameter))
        if known is not None and (r.storage is None or not self._active or self._active[-1] is not known[1]):
            self.use(known[1])
        r.use()

    def leave(self, block: Block) -> None:
        """Its forward is over."""
        with self.lock:
            if next(self._order.upcoming(), None) != block.index:
                self._dismiss([block])

    def dismiss_idle(self) -> None:
        """Blocks that do not run leave, and whatever is no guest."""
        with self.lock:
            if not is_in_backward():
                self._dismiss(list(self._active))
            self.send_visitors_home()
            self.let_go(self)

    def _dismiss(self, blocks: Sequence[Block]) -> None:
        gone = [block for block in blocks if not block.num_running]
        self._active = [block for block in self._active if block not in gone]
        leaving = [r for block in gone for r in block.residences]
        lent = [r for r in leaving if r.is_shared]  # who has their memory may write there: they stay meanwhile
        self.invite(lent)
        self.residences.note_changed(lent)
        self.let_go(leaving)

    def _prefetch(self) -> None:
        """Reads ahead within the budget, and forgets what was read ahead in error."""
        room, wanted = self._prefetch_nbytes, list[Block]()
        for index in self._order.upcoming():
            block = self.blocks[index]
            if block in wanted:
                break
            room -= sum(r.nbytes for r in block.residences if r.storage is None)
            if room < 0:
                break
            wanted.append(block)
        self.residences.forget(r for block in self._ahead if block not in wanted for r in block.residences)
        self._ahead = wanted
        for block in wanted:
            self._counters.num_prefetched += self.residences.fetch(block.residences)

    # -- visitors ------------------------------------------------------------------------------------------------------

    def visit(self, parameter: torch.Tensor) -> None:
        """Somebody takes a parameter out of its module."""
        known = self._by_id.get(id(parameter))
        if known is None or known[1].num_running:
            return
        if not self._pass_through(known[1]):
            self.invite([known[0]], _NUM_FORWARDS if torch.is_grad_enabled() else 0)
            self.residences.note_changed([known[0]])  # through `.data`, perhaps

    def access(self, residences: Sequence[Residence], *, stays: bool) -> None:
        """Somebody computes with parameters, and holds them meanwhile. `stays`: and knows where they are."""
        with self.lock:
            for r in residences:
                known = self._by_id.get(id(r.parameter))
                if known is not None and not self._pass_through(known[1]):
                    self.invite([r], _NUM_FORWARDS if stays else 0)

    def _pass_through(self, block: Block) -> bool:
        """Within a forward of the module or a backward, its whole block comes; false: neither runs."""
        if not is_in_backward() and self._num_running == 0:
            return False
        with self.lock:
            if self._active and self._active[-1] is block:
                self.residences.bring(block.residences)
            else:
                self.use(block)
        return True

    def invite(self, residences: Sequence[Residence], num_forwards: int = 0) -> None:
        """Brings parameters for a visit, until so many forwards have begun and a block is needed."""
        with self.lock:
            until = self._num_forwards + num_forwards
            for r in residences:
                self._visitors[r] = max(until, self._visitors.pop(r, 0))
                r.is_visiting = True
            self.residences.bring(residences)

    def send_visitors_home(self, nbytes: int = 0) -> None:
        """Those whose time is over leave, the oldest first, until the others have at most `nbytes`."""
        with self.lock:
            excess = sum(r.nbytes for r in self._visitors) - nbytes
            leaving = []
            for r, until in self._visitors.items():
                if excess <= 0:
                    break
                if until <= self._num_forwards and not r.num_pins and not r.is_shared:
                    leaving.append(r)
                    excess -= r.nbytes
            for r in leaving:
                del self._visitors[r]
                r.is_visiting = False
            self.let_go(leaving)

    def limit_visitors(self) -> None:
        """See [Note: visitors]."""
        self.send_visitors_home(self._visitors_nbytes)

    def let_go(self, residences: Iterable[Residence]) -> None:
        """These leave, unless their block is in use or they are on a visit."""
        with self.lock:
            self.residences.leave([r for r in residences if r not in self._visitors and not self._is_in_use(r)])

    def _is_in_use(self, r: Residence) -> bool:
        known = self._by_id.get(id(r.parameter))
        return known is None or known[1] in self._active or known[1].num_running > 0


def is_in_backward() -> bool:
    """Whether this thread is running a graph backward."""
    return bool(torch._C._current_graph_task_id() != -1)
