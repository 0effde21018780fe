"""Weights of the mixture over the positions of a run, as a value: segments, each with its integer quotas.

A superblock of weights is `lanes` x (sum of quotas) positions that hold each corpus exactly quota x lanes times. A
segment ends at a whole superblock of its own, so the mixture is exact in every aligned superblock, and the draws of a
corpus go on without a gap over the change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_SLOTS = 4096
_SLOTS_TRIED_AT_ONCE = 256


def quotas(weights: Sequence[float]) -> list[int]:
    """Slots of each corpus in a superblock: exact where at most 4,096 slots allow, else by largest remainder.

    A weight of 0 gets no slot. Raises ValueError when no weight is above 0, or one is too small to get a slot.
    """
    values = np.asarray(weights, dtype=np.float64)
    if not (np.isfinite(values).all() and (values >= 0).all() and values.sum() > 0):
        raise ValueError(f"weights {list(weights)} must be finite numbers of 0 or more, one of them above 0")
    drawn = np.flatnonzero(values)
    shares = values[drawn] / values.sum()
    counts = _exact_counts(shares)
    if counts is None:
        counts = _nearest_counts(shares)
    if (counts == 0).any():
        number = int(drawn[np.argmin(counts)])
        least = values.sum() / MOST_SLOTS
        raise ValueError(
            f"weight {weights[number]} of corpus {number} is less than 1/{MOST_SLOTS} of all weights "
            f"({values.sum():g}); raise it to {least:.6g} or more, or remove the corpus"
        )
    found = np.zeros(len(values), dtype=np.int64)
    found[drawn] = counts
    return found.tolist()


def _exact_counts(shares: np.ndarray) -> np.ndarray | None:
    """Counts of the smallest superblock that holds the shares exactly, None when none of 4,096 slots or fewer does."""
    for start in range(len(shares), MOST_SLOTS + 1, _SLOTS_TRIED_AT_ONCE):
        slots = np.arange(start, min(start + _SLOTS_TRIED_AT_ONCE, MOST_SLOTS + 1))
        exact = slots[:, None] * shares
        counts = np.rint(exact)
        near = (np.abs(exact - counts) < 1e-9 * slots[:, None]).all(1)
        fits = np.flatnonzero(near & (counts > 0).all(1) & (counts.sum(1) == slots))
        if fits.size:
            return counts[fits[0]].astype(np.int64)
    return None


def _nearest_counts(shares: np.ndarray) -> np.ndarray:
    """Counts of 4,096 slots by largest remainder."""
    exact = shares * MOST_SLOTS
    counts = np.floor(exact).astype(np.int64)
    missing = MOST_SLOTS - int(counts.sum())
    counts[np.argsort(-(exact - counts), kind="stable")[:missing]] += 1
    return counts


@dataclass(frozen=True)
class Segment:
    """Positions from `first` on (up to the next segment), drawn with `weights`, one per corpus."""

    first: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Schedule:
    """Segments in ascending order, the first at position 0.

    `lanes` is part of a superblock's length, so a schedule belongs to one number of lanes.
    """

    segments: tuple[Segment, ...]

    @classmethod
    def constant(cls, weights: Sequence[float]) -> Schedule:
        """The same weights for all positions; raises ValueError when they have no quotas."""
        quotas(weights)
        return cls((Segment(0, tuple(float(weight) for weight in weights)),))

    def changed(self, position: int, weights: Sequence[float], lanes: int) -> Schedule:
        """This schedule with other weights from `position` on, rounded up to a whole superblock of the last segment.

        A last segment that begins there or later is replaced: it would be empty. Raises ValueError when the weights
        have no quotas or are not as many as before.
        """
        last = self.segments[-1]
        if len(weights) != len(last.weights):
            raise ValueError(f"{len(weights)} weights for {len(last.weights)} corpora; give each corpus one")
        quotas(weights)
        superblock = lanes * sum(quotas(last.weights))
        first = last.first + math.ceil(max(0, position - last.first) / superblock) * superblock
        segment = Segment(first, tuple(float(weight) for weight in weights))
        kept = self.segments[:-1] if first == last.first else self.segments
        return Schedule((*kept, segment))

    def before(self, position: int) -> Schedule:
        """The segments that decide positions below `position` (1 or more)."""
        return Schedule(tuple(segment for segment in self.segments if segment.first < max(1, position)))

    def as_list(self) -> list[list]:
        """JSON value: [[first position, [weight of each corpus]], ...]."""
        return [[segment.first, list(segment.weights)] for segment in self.segments]

    @classmethod
    def from_list(cls, value: Sequence[Sequence]) -> Schedule:
        """Inverse of `as_list`."""
        return cls(tuple(Segment(int(first), tuple(float(w) for w in weights)) for first, weights in value))
