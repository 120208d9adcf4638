"""Finds a placement with a low peak and no stall: simple rules first, then small changes where the peak is.

[Note: how it searches]
1. *Rules.* Everything whose time away is at least some threshold moves, the earliest saved first, as long as the
   channels keep up. In a single forward and backward that is a prefix of the records, as in the SSDTrain paper; with
   several passes alive it is a prefix of each. A few thresholds are tried.
2. *Repairs.* At the moment of the peak something kept is sent, something sent is kept, or the two are exchanged, while
   that lowers the peak or the time spent near it.
3. *Shakes.* A few random changes (always the same ones), then repairs again: out of dead ends.
4. *Pruning.* What does not lower the peak stays in memory after all: less is written.
Every trial costs one walk along the timeline, and the number of walks is bounded through the number of records: the
work is the same on every machine, and small. Few records are placed almost optimally, thousands nearly so, because one
of thousands makes little difference.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from ssdtrain.planner.step import Where
from ssdtrain.planner.timeline import Timeline

_WORK = 50_000  # records walked along in all
_MIN_WALKS, _MAX_WALKS = 5, 4000
_FOR_RULES, _FOR_CHANGES = 0.5, 0.8  # of the walks; what is left is for pruning
_MANY_WALKS = 20  # below that the records are too many for changes of one at a time to matter
_MAX_THRESHOLDS = 16
_ROUNDS = 3
_NEAR = 0.97  # of the peak
_MAX_CHANGES = 4  # of one shake

Score = tuple[float, float]
"""Peak, and how far and often memory is near it: the lower the better."""


class Search:
    """One search on one timeline; `best` is the placement found so far."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        num = len(timeline.nbytes)
        self.num_walks = 0
        self._most_walks = min(_MAX_WALKS, max(_MIN_WALKS, _WORK // max(1, num)))
        self.best: list[int] = [int(Where.KEEP)] * num
        self.kept_peak = self.best_peak = timeline.peak(self.best)
        self._away = {where: self._seconds_away(where) for where in timeline.tiers}
        aways = list(self._away.values())
        self._longest = list(map(max, *aways)) if len(aways) > 1 else aways[0] if aways else [-1.0] * num
        self._movable = [i for i, seconds in enumerate(self._longest) if seconds > 0]

    def run(self, enough: float = 0.0) -> list[int]:
        """The placement with the lowest peak found; below `enough` nothing more is moved."""
        if self._movable:
            self._try_rules()
            if self._most_walks >= _MANY_WALKS:
                self._repair()
                self._shake()
            self._prune(max(enough, self.best_peak))
        return self.best

    def _seconds_away(self, where: Where) -> list[float]:
        """How long each record would be out of memory if it had the channels for itself."""
        timeline, tier = self.timeline, self.timeline.tiers[where]
        per_byte, most = 1 / tier.write_bandwidth + 1 / tier.read_bandwidth, timeline.machine.prefetch_nbytes
        ends = map(min, timeline.needed, timeline.released)
        return [
            end - saved - nbytes * per_byte if nbytes <= most else -1.0
            for nbytes, saved, end in zip(timeline.nbytes, timeline.saved, ends, strict=True)
        ]

    def longest_away(self) -> list[tuple[float, int]]:
        """For every record the most seconds it could be out of memory, and where it would be then."""
        tiers = list(self._away)
        return [max([(self._away[w][i], int(w)) for w in tiers]) for i in range(len(self.best))] if tiers else []

    def _has_walks(self, fraction: float = 1.0) -> bool:
        return self.num_walks < fraction * self._most_walks

    def _peak(self, placement: list[int]) -> float:
        self.num_walks += 1
        return self.timeline.peak(placement)

    # -- rules -------------------------------------------------------------------------------------------------------

    def _try_rules(self) -> None:
        for wish in self._wishes():
            if not self._has_walks(_FOR_RULES):
                return
            placement, peak = self._admit(wish)
            if peak < self.best_peak:
                self.best, self.best_peak = placement, peak

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
        score = self._score(self.best)
        while self._has_walks(_FOR_CHANGES):
            better = self._better_neighbour(score)
            if better is None:
                return
            score, self.best = better
            self.best_peak = score[0]

    def _score(self, placement: list[int]) -> Score:
        self.num_walks += 1
        levels = self.timeline.levels(placement)
        if levels is None:
            return math.inf, math.inf
        limit = _NEAR * self.best_peak
        return max(levels, default=0), sum([level - limit for level in levels if level > limit])

    def _better_neighbour(self, score: Score) -> tuple[Score, list[int]] | None:
        for changes in self._neighbours():
            if not self._has_walks(_FOR_CHANGES):
                break
            placement = self.best.copy()
            for i, where in changes:
                placement[i] = where
            new = self._score(placement)
            if new < score:
                return new, placement
        return None

    def _neighbours(self) -> Iterator[list[tuple[int, int]]]:
        """Single changes, then exchanges of one that is away for one that is there at the moment of the peak."""
        at = self.timeline.moment_of_peak(self.best)
        saved, released = self.timeline.saved, self.timeline.released
        sends, keeps = [], []
        for i in self._movable:
            if self.best[i]:
                keeps.append((i, int(Where.KEEP)))
            if saved[i] <= at < released[i]:
                sends += [(i, int(w)) for w, away in self._away.items() if w != self.best[i] and away[i] > 0]
        yield from ([change] for change in sends + keeps)
        yield from ([keep, send] for keep in keeps for send in sends if send[0] != keep[0])

    def _shake(self) -> None:
        chance = random.Random(0)
        best, best_peak = self.best, self.best_peak
        while self._has_walks(_FOR_CHANGES):
            self.best, self.best_peak = self._admit(self._shaken(best, chance))
            self._repair()
            if self.best_peak < best_peak:
                best, best_peak = self.best, self.best_peak
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
        """Keeps what need not travel for a peak of `most`, what would be away for the shortest time first."""
        moving = [i for i, where in enumerate(self.best) if where]
        moving.sort(key=self._longest.__getitem__)
        doubtful = [moving]
        while doubtful and self._has_walks():
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
