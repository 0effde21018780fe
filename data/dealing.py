"""Positions of a run are dealt to corpora: position -> (corpus, number of the draw from it), by the schedule.

In a segment of the schedule that begins at position F, with quotas q[c], P = sum(q) slots and L lanes, position p has
lane = (p - F) mod L, turn = (p - F) div L, superblock = turn div P, and takes slot
(turn + lane * P div L + hash(seed, 1, F + superblock * L * P)) mod P of a table. The table holds the draws
d = 0 .. q[c] - 1 of every corpus c, sorted by (d + 1/2) / q[c], then by c, so that each corpus's stand at equal
distances. The draw's number within the run is base[c] + (superblock * q[c] + d) * L + lane, where base[c] counts the
draws of all segments before. So every superblock of L * P aligned positions has the exact mixture, and draws
0, 1, 2, ... of a corpus happen once each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data.permutation import keyed_hash
from data.schedule import Schedule, Segment, quotas


class _Deal:
    """One segment of the schedule: positions -> (corpus, draw number). Tables have one entry per slot."""

    def __init__(self, segment: Segment, base: np.ndarray, seed: int, lanes: int) -> None:
        self.quotas = np.asarray(quotas(segment.weights), dtype=np.int64)
        self.first, self.slots, self.base = segment.first, int(self.quotas.sum()), base
        self._seed, self._lanes = seed, lanes
        corpus = np.repeat(np.arange(len(self.quotas)), self.quotas)
        draw = np.concatenate([np.arange(quota) for quota in self.quotas])
        place = np.argsort((draw + 0.5) / self.quotas[corpus], kind="stable")
        self._corpus, self._draw = corpus[place], draw[place]
        self._slot_quota, self._slot_base = self.quotas[self._corpus], base[self._corpus]

    @property
    def superblock(self) -> int:
        return self._lanes * self.slots

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray | np.int64, np.ndarray]:
        """Corpus (one number where the segment has one) and draw number of each position, all in this segment."""
        local = positions - self.first
        if self.slots == 1:
            return self._corpus[0], local + self._slot_base[0]
        turn, lane = divided(local, self._lanes)
        superblock, place = divided(turn, self.slots)
        # Lanes are evenly staggered over the slot table, so that neighbouring positions have the mixture too.
        slot = place + lane * self.slots // self._lanes + _by_value(self._rotation, superblock)
        slot = divided(slot, self.slots)[1]
        draw = (superblock * self._slot_quota[slot] + self._draw[slot]) * self._lanes + lane
        return self._corpus[slot], draw + self._slot_base[slot]

    def _rotation(self, superblock: np.ndarray) -> np.ndarray:
        key = keyed_hash(self._seed, 1, superblock * self.superblock + self.first)
        return (key % np.uint64(self.slots)).astype(np.int64)


class Dealing:
    """`dealing(positions)` over all segments of a schedule; tables have one entry per slot and segment.

    Raises ValueError for a schedule that does not begin at 0 or changes inside a superblock.
    """

    def __init__(self, schedule: Schedule, corpora: int, seed: int, lanes: int) -> None:
        self._deals: list[_Deal] = []
        base = np.zeros(corpora, dtype=np.int64)
        if not schedule.segments or schedule.segments[0].first != 0:
            raise ValueError("a schedule begins at position 0")
        for segment in schedule.segments:
            if self._deals:
                before = self._deals[-1]
                superblocks, over = divmod(segment.first - before.first, before.superblock)
                if superblocks < 1 or over:
                    raise ValueError(
                        f"weights change at position {segment.first}, which is no whole number of superblocks of "
                        f"{before.superblock} positions after {before.first}"
                    )
                base = before.base + superblocks * before.quotas * lanes
            self._deals.append(_Deal(segment, base, seed, lanes))
        self._firsts = np.array([deal.first for deal in self._deals], dtype=np.int64)

    @property
    def superblock(self) -> int:
        """Aligned positions over which the mixture is exact, in the first segment."""
        return self._deals[0].superblock

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray | np.int64, np.ndarray]:
        """Corpus (one number where all have the same by their weights) and draw number, int64 `[positions]`."""
        first, last = np.searchsorted(self._firsts, (positions.min(), positions.max()), side="right") - 1
        if first == last:
            return self._deals[first](positions)
        corpus, draw = np.empty_like(positions), np.empty_like(positions)
        segment = np.searchsorted(self._firsts, positions, side="right") - 1
        for number in range(first, last + 1):
            chosen = np.flatnonzero(segment == number)
            if chosen.size:
                corpus[chosen], draw[chosen] = self._deals[number](positions[chosen])
        return corpus, draw


def divided(value: np.ndarray, divisor: int) -> tuple[np.ndarray, np.ndarray]:
    """Quotient and remainder; NumPy divides by one number several times faster than it takes remainders."""
    quotient = value // divisor
    return quotient, value - quotient * divisor


def _by_value(function: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    """function(values), evaluated once per number of their range where that is less work."""
    low, high = int(values.min()), int(values.max())
    if high - low >= values.size:
        return function(values)
    return function(np.arange(low, high + 1))[values - low]
