"""Finds a placement with a low peak and no stall: simple rules first, then small changes where the peak is.

[Note: how it searches]
1. *Rules.* Everything whose time away is at least some threshold moves, the earliest saved first, as long as the
   channels keep up. In a single forward and backward that is a prefix of the records, as in the SSDTrain paper; with
   several passes alive it is a prefix of each. A few thresholds are tried.
2. *Repairs.* At the moment of the peak something kept is sent, something sent is kept, or the two are exchanged, while
   that lowers the peak or the time spent near it. Sending begins after the one that was sent last, keeping with one
   record of each size: a model has few sizes, and what equals a failure fails too.
3. *Shakes.* A few random changes (always the same ones), then repairs again: out of dead ends.
4. *Pruning.* What does not lower the peak stays in memory after all: less is written.
The first three end as soon as the peak is within half a percent of a bound that no placement gets below, see
[Note: the bound], or under what the budget asks for. The steps of real models, with layers that repeat, mostly end so,
after a few dozen trials. Where bound and peak do not meet, shakes end when many in a row changed nothing.
Every trial costs one walk along the timeline, or half of one when it is found out early to be no good, and the number
of walks is bounded through the number of records: the work is the same on every machine, and small. Few records are
placed almost optimally, thousands nearly so, because one of thousands makes little difference.
No search starts from the plan in force: a new one is asked for when the drive has changed by a quarter or more, and
then the rules are the better start.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from ssdtrain.planner.lower_bound import Moment, least_at, moments_near_peak
from ssdtrain.planner.recorded_step import Where
from ssdtrain.planner.timeline import Moves, Timeline

_WORK = 25_000  # records walked along in all
_MIN_WALKS, _MAX_WALKS = 5, 700
_FOR_RULES, _FOR_CHANGES = 0.5, 0.9  # of the walks, from the beginning
_FOR_PRUNING = 0.2  # of as many, from where changes end
_MANY_WALKS = 20  # below that the records are too many for changes of one at a time to matter
_MAX_THRESHOLDS = 16
_ROUNDS = 3
_NEAR = 0.97  # of the peak
_MAX_CHANGES = 4  # of one shake
_MAX_IDLE = 30  # shakes in a row that change nothing for the better
_AT_BOUND = 1.005  # of the bound: a peak this low is low enough
_MAX_ASKED = 16  # moments at which the bound is worked out for one placement

Score = tuple[float, float]
"""Peak, and how far and often memory is near it: the lower the better."""


class Search:
    """One search on one timeline; `best` is the placement found so far."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        num = len(timeline.nbytes)
        self.num_walks = 0.0
        self._most_walks = min(_MAX_WALKS, max(_MIN_WALKS, _WORK // max(1, num)))
        self.best: list[int] = [int(Where.KEEP)] * num
        self.kept_peak = self.best_peak = timeline.peak(self.best)
        self._latest = -1  # to be sent for the better
        self._enough, self._bound, self._asked = 0.0, 0.0, set[Moment]()
        self._away = {where: self._seconds_away(where) for where in timeline.tiers}
        aways = list(self._away.values())
        self._longest = list(map(max, *aways)) if len(aways) > 1 else aways[0] if aways else [-1.0] * num
        self._movable = [i for i, seconds in enumerate(self._longest) if seconds > 0]

    def run(self, enough: float = 0.0) -> list[int]:
        """The placement with the lowest peak found; below `enough` nothing more is moved."""
        self._enough = enough
        if self._movable:
            self._try_rules()
            if self._is_thorough:
                self._repair()
                self._shake()
            self._prune(max(enough, self.best_peak))
        return self.best

    @property
    def _is_thorough(self) -> bool:
        return self._most_walks >= _MANY_WALKS

    # -- the end -----------------------------------------------------------------------------------------------------

    def _is_over(self, fraction: float) -> bool:
        """Whether the peak is low enough, or this part of the walks is used up."""
        return self.num_walks >= fraction * self._most_walks or self._is_low(self.best_peak)

    def _is_low(self, peak: float) -> bool:
        return peak <= max(self._enough, _AT_BOUND * self._bound)

    def _ask_bound(self) -> None:
        """Raises the bound, where that can show that the peak is low enough already; see `bound`."""
        if not self._is_thorough or self._is_low(self.best_peak):
            return
        self.num_walks += 1
        moments = moments_near_peak(self.timeline, self.timeline.moves(self.best), self.best_peak / _AT_BOUND)
        for moment in [moment for moment in moments if moment not in self._asked][:_MAX_ASKED]:
            self.num_walks += 1
            self._asked.add(moment)
            self._bound = max(self._bound, least_at(self.timeline, moment))
            if self._is_low(self.best_peak):
                return

    def _seconds_away(self, where: Where) -> list[float]:
        """How long each record would be out of memory if it had the channels for itself."""
        timeline, tier = self.timeline, self.timeline.tiers[where]
        per_byte, most = 1 / tier.write_bandwidth + 1 / tier.read_bandwidth, timeline.machine.prefetch_nbytes
        ends = map(min, timeline.needed, timeline.released)
        return [
            end - saved - nbytes * per_byte if most else -1.0
            for nbytes, saved, end in zip(timeline.nbytes, timeline.saved, ends, strict=True)
        ]

    def longest_away(self) -> list[tuple[float, int]]:
        """For every record the most seconds it could be out of memory, and where it would be then."""
        tiers = list(self._away)
        return [max([(self._away[w][i], int(w)) for w in tiers]) for i in range(len(self.best))] if tiers else []

    def _peak(self, placement: list[int]) -> float:
        self.num_walks += 1
        return self.timeline.peak(placement)

    # -- rules -------------------------------------------------------------------------------------------------------

    def _try_rules(self) -> None:
        for wish in self._wishes():
            if self._is_over(_FOR_RULES):
                return
            placement, peak = self._admit(wish)
            if peak < self.best_peak:
                self.best, self.best_peak = placement, peak
                self._ask_bound()

    def _wishes(self) -> Iterator[list[int]]:
        """What each rule would send, the most generous one first."""
        if len(self._away) == 2:
            host, disk = self._away[Where.HOST], self._away[Where.DISK]
            for threshold in self._thresholds(disk):
                yield [_choose(h, d, threshold) for h, d in zip(host, disk, strict=True)]
        for where, away in self._away.items():
            for threshold in self._thresholds(away):
                yield [int(where) if seconds > threshold else int(Where.KEEP) for seconds in away]

    def _thresholds(self, away: list[float]) -> list[float]:
        """Seconds away that divide the bytes that could move evenly; zero first."""
        movable = sorted([(seconds, n) for seconds, n in zip(away, self.timeline.nbytes, strict=True) if seconds > 0])
        total = sum([nbytes for _, nbytes in movable])
        num = max(2, min(_MAX_THRESHOLDS, self._most_walks // 8))
        found, sum_ = [0.0], 0
        for seconds, nbytes in movable:
            sum_ += nbytes
            if sum_ * num >= total * len(found) and len(found) < num and seconds > found[-1]:
                found.append(seconds)
        return found

    def _admit(self, wish: list[int]) -> tuple[list[int], float]:
        """What of a wish the machine can do, and its peak: what does not fit one tier may go to the other, or stays."""
        placement, moved = wish.copy(), set[int]()
        for _ in range(_ROUNDS):
            self.num_walks += 1
            moves = self.timeline.moves(placement)
            if moves.is_clean:
                return placement, max(self.timeline.levels_of(moves), default=0)
            for i in moves.late or moves.refused:  # without the late ones there may be room for the refused
                placement[i] = int(Where.KEEP) if i in moved else self._second_choice(i, placement[i])
                moved.add(i)
        moves = self.timeline.moves(placement)
        for i in moves.late + moves.refused:
            placement[i] = int(Where.KEEP)
        return placement, self._peak(placement)

    def _second_choice(self, i: int, where: int) -> int:
        other = Where.HOST if where == Where.DISK else Where.DISK
        return int(other) if other in self._away and self._away[other][i] > 0 else int(Where.KEEP)

    # -- changes -----------------------------------------------------------------------------------------------------

    def _repair(self) -> None:
        self._ask_bound()
        score = self._score(self.best)
        while not self._is_over(_FOR_CHANGES):
            better = self._better_neighbour(score)
            if better is None:
                return
            score, self.best = better
            if score[0] < self.best_peak:
                self.best_peak = score[0]
                self._ask_bound()

    def _score(self, placement: list[int], at: float = 0.0, most: float = math.inf) -> Score:
        levels = self.timeline.levels(placement, at, most)
        if levels is None:
            self.num_walks += 0.5  # it was broken off
            return math.inf, math.inf
        self.num_walks += 1
        limit = _NEAR * self.best_peak
        return max(levels, default=0), sum([level - limit for level in levels if level > limit])

    def _better_neighbour(self, score: Score) -> tuple[Score, list[int]] | None:
        moves = self.timeline.moves(self.best)
        at = self.timeline.moment_of_peak(moves)
        for changes in self._neighbours(at, moves):
            if self._is_over(_FOR_CHANGES):
                break
            placement = self.best.copy()
            for i, where in changes:
                placement[i] = where
            new = self._score(placement, at, score[0])
            if new < score:
                self._latest = changes[-1][0]
                return new, placement
        return None

    def _neighbours(self, at: float, moves: Moves) -> Iterator[list[tuple[int, int]]]:
        """Single changes, then exchanges of one that is away for one that is there at the moment of the peak."""
        sends: list[tuple[int, int]] = []
        away, back = list[int](), list[int]()
        for i in self._movable:
            if self.best[i]:
                (away if moves.written[i] <= at < moves.reloaded[i] else back).append(i)
            sends += [(i, int(w)) for w in self._away if w != self.best[i] and self.timeline.can_be_away(i, w, at)]
        sends.sort(key=lambda change: change[0] <= self._latest)
        keeps = [(i, int(Where.KEEP)) for i in self._by_size(away) + self._by_size(back)]
        yield from ([change] for change in sends + keeps)
        yield from ([keep, send] for keep in keeps for send in sends if send[0] != keep[0])

    def _by_size(self, some: list[int]) -> list[int]:
        """One of each size, the smallest first, then the second of each, and so on: equal ones matter equally."""
        seen, ranks = dict[int, int](), []
        for i in some:
            nbytes = self.timeline.nbytes[i]
            seen[nbytes] = seen.get(nbytes, 0) + 1
            ranks.append((seen[nbytes], nbytes, i))
        return [i for _, _, i in sorted(ranks)]

    def _shake(self) -> None:
        chance = random.Random(0)
        best, best_peak = self.best, self.best_peak
        num_idle = 0
        while num_idle < _MAX_IDLE and not self._is_over(_FOR_CHANGES):
            self.best, self.best_peak = self._admit(self._shaken(best, chance))
            self._repair()
            num_idle += 1
            if self.best_peak < best_peak:
                best, best_peak, num_idle = self.best, self.best_peak, 0
            self.best, self.best_peak = best, best_peak

    def _shaken(self, placement: list[int], chance: random.Random) -> list[int]:
        """A few places changed, or, one time in two, a part of any size."""
        places = [int(Where.KEEP), *map(int, self._away)]
        num = len(self._movable)
        num_changes = chance.randint(1, _MAX_CHANGES) if chance.random() < 0.5 else chance.randint(1, num)
        placement = placement.copy()
        for i in chance.sample(self._movable, min(num, num_changes)):
            placement[i] = chance.choice([where for where in places if where != placement[i]])
        return placement

    # -- pruning -----------------------------------------------------------------------------------------------------

    def _prune(self, most: float) -> None:
        """Keeps what need not be offloaded for a peak of `most`, what would be away for the shortest time first."""
        moving = [i for i, where in enumerate(self.best) if where]
        moving.sort(key=self._longest.__getitem__)
        doubtful = [moving]
        most_walks = self.num_walks + _FOR_PRUNING * self._most_walks
        while doubtful and self.num_walks < most_walks:
            some = doubtful.pop()
            placement = self.best.copy()
            for i in some:
                placement[i] = int(Where.KEEP)
            peak = self._peak(placement)
            if peak <= most:
                self.best, self.best_peak = placement, peak
            elif len(some) > 1:
                doubtful += [some[len(some) // 2 :], some[: len(some) // 2]]


def _choose(host: float, disk: float, threshold: float) -> int:
    """The drive for what is away long enough, host memory for the rest."""
    if disk > threshold:
        return int(Where.DISK)
    return int(Where.HOST) if host > 0 else int(Where.KEEP)
