"""The order of samples as a pure function: position in the run -> (corpus, epoch, row). No state, no tables of rows.

`data/dealing.py` maps positions to draws of corpora; this file maps draws to rows.

Shuffling. Draw n of a corpus of N rows belongs to epoch n div N, at index i = n mod N. Rows come in blocks of B; each
of the L lanes owns K = (N div B) div L whole blocks. The first L * K * B indices go to lane i mod L, at place i div L
of its walk. A walk is cut into windows of 1, 2, 4, ... blocks while that is less than W, then of W blocks (the last is
what remains): window j starts at block 2^j - 1 while j < r = bit length of W - 1, and at 2^r - 1 + (j - r) * W after.
Rows are permuted inside the window, by a key of (seed, corpus, epoch, lane, window), and block k of lane l is block
permutation(l * K + k) of the corpus, by a key of (seed, corpus, epoch). So the first rows need one block per lane, and
reads stay within L * W blocks at a time. Blocks that do not divide among lanes and the last, short one come at the end
of the epoch, permuted among themselves. Positions L apart share a window: their rows correlate by about 1 / W.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.dealing import Dealing, divided
from data.permutation import Permutations, keyed_hash, permute
from data.schedule import Schedule

# Positions worked on at one time; what is computed once per window and block then serves many positions.
CHUNK = 65536
# With fewer positions than this per corpus or epoch (on average) all are worked on at once, each with keys of its own.
LEAST_GROUP = 4096

Number = np.ndarray | np.int64


class Order:
    """`order(positions)` for any positions, in any sequence; cheapest per position for thousands in ascending order.

    `rows` is per corpus; `weights` too, or a schedule of them. Memory is that of the slot tables (4,096 slots at most
    per segment) and does not depend on rows. Raises ValueError for a corpus without rows, a weight too small for a
    slot, and a schedule that does not begin at 0 or changes inside a superblock.
    """

    def __init__(
        self,
        rows: Sequence[int],
        weights: Sequence[float] | Schedule,
        seed: int,
        lanes: int,
        block_rows: int,
        window_blocks: int,
    ) -> None:
        self.schedule = weights if isinstance(weights, Schedule) else Schedule.constant(weights)
        if any(len(segment.weights) != len(rows) for segment in self.schedule.segments) or min(rows) < 1:
            raise ValueError(f"each corpus needs a weight and at least one row; rows are {list(rows)}")
        self._rows = np.asarray(rows, dtype=np.int64)
        self._seed, self._lanes, self._block_rows, self._window_blocks = seed, lanes, block_rows, window_blocks
        self._blocks = self._rows // block_rows
        self._lane_blocks = self._blocks // lanes
        self._in_lanes = self._lane_blocks * lanes * block_rows
        self._ramp = (window_blocks - 1).bit_length()
        self._ramp_blocks = 2**self._ramp - 1
        self._dealing = Dealing(self.schedule, len(rows), seed, lanes)

    @property
    def superblock(self) -> int:
        """Aligned positions over which the mixture is exact, in the first segment of the schedule."""
        return self._dealing.superblock

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Corpus, epoch and row of each position, int64 `[positions]`; positions are 0 or more."""
        positions = np.asarray(positions, dtype=np.int64)
        corpus, epoch, row = (np.empty_like(positions) for _ in range(3))
        for start in range(0, positions.size, CHUNK):
            part = slice(start, start + CHUNK)
            self._fill(positions[part], corpus[part], epoch[part], row[part])
        return corpus, epoch, row

    def _fill(self, positions: np.ndarray, corpus: np.ndarray, epoch: np.ndarray, row: np.ndarray) -> None:
        which, draw = self._dealing(positions)
        corpus[:] = which
        self._shuffle(which, draw, epoch, row)

    def _shuffle(self, corpus: Number, draw: np.ndarray, epoch: np.ndarray, row: np.ndarray) -> None:
        """Epoch and row of each draw, one corpus after the other where each has many."""
        if np.ndim(corpus) == 0:
            self._shuffle_corpus(corpus, draw, epoch, row)
            return
        counts = np.bincount(corpus, minlength=len(self._rows))
        present = np.flatnonzero(counts)
        if len(present) * LEAST_GROUP > draw.size:
            epoch[:] = draw // self._rows[corpus]
            row[:] = self._rows_at(corpus, epoch, draw - epoch * self._rows[corpus])
            return
        together = np.argsort(corpus.astype(np.uint16), kind="stable")
        ends = np.cumsum(counts)
        for number in present:
            chosen = together[ends[number] - counts[number] : ends[number]]
            found_epoch, found_row = np.empty((2, chosen.size), dtype=np.int64)
            self._shuffle_corpus(number, draw[chosen], found_epoch, found_row)
            epoch[chosen], row[chosen] = found_epoch, found_row

    def _shuffle_corpus(self, corpus: np.int64, draw: np.ndarray, epoch: np.ndarray, row: np.ndarray) -> None:
        epoch[:], index = divided(draw, int(self._rows[corpus]))
        first, last = epoch.min(), epoch.max()
        if first == last:
            row[:] = self._rows_at(corpus, first, index)
        elif (last - first + 1) * LEAST_GROUP > draw.size:
            row[:] = self._rows_at(corpus, epoch, index)
        else:
            for number in range(first, last + 1):
                chosen = np.flatnonzero(epoch == number)
                if chosen.size:
                    row[chosen] = self._rows_at(corpus, np.int64(number), index[chosen])

    def _rows_at(self, corpus: Number, epoch: Number, index: np.ndarray) -> np.ndarray:
        """Row at place `index` of an epoch of a corpus; both may be one number for all."""
        inside = index < self._in_lanes[corpus]
        if inside.all():
            return self._in_windows(corpus, epoch, index)
        row = np.empty_like(index)
        for chosen, rows_of in ((np.flatnonzero(inside), self._in_windows), (np.flatnonzero(~inside), self._left_over)):
            if chosen.size:
                row[chosen] = rows_of(_at(corpus, chosen), _at(epoch, chosen), index[chosen])
        return row

    def _in_windows(self, corpus: Number, epoch: Number, index: np.ndarray) -> np.ndarray:
        lane_blocks, size = self._lane_blocks[corpus], self._block_rows
        place, lane = divided(index, self._lanes)
        window = self._window_of(place // size)
        low, high = int(window.min()), int(window.max())
        single = np.ndim(corpus) == 0 and np.ndim(epoch) == 0
        # One key per (lane, window) where positions lie close together, else one per position.
        which, key_lane, key_window = None, lane, window
        if single and (high + 1 - low) * self._lanes <= index.size:
            which = lane * (high + 1 - low) + (window - low)
            key_lane = np.repeat(np.arange(self._lanes), high + 1 - low)
            key_window = np.tile(np.arange(low, high + 1), self._lanes)
        key = keyed_hash(self._seed, 3, corpus, epoch, key_lane, key_window)
        width = np.minimum(self._width(key_window), lane_blocks - self._first_block(key_window))
        first = self._first_block(window)
        block, row = divided(Permutations(width * size, key)(place - first * size, which), size)
        block += first
        blocks, block_key = self._blocks[corpus], keyed_hash(self._seed, 2, corpus, epoch)
        # Likewise one evaluation per block of the lanes' windows, else one per position.
        low = int(self._first_block(np.int64(low)))
        span = int(block.max()) + 1 - low
        if single and span * self._lanes <= index.size:
            table = np.arange(low, low + span) + np.arange(self._lanes)[:, None] * lane_blocks
            block = permute(table.ravel(), blocks, block_key)[lane * span + (block - low)]
        else:
            block = permute(lane * lane_blocks + block, blocks, block_key)
        return block * size + row

    def _window_of(self, block: np.ndarray) -> np.ndarray:
        """Window of each block of a lane's walk."""
        window = (block - self._ramp_blocks) // self._window_blocks + self._ramp
        if self._ramp_blocks and block.min() < self._ramp_blocks:
            # frexp's exponent is the bit length, exact below 2^53.
            window = np.where(block < self._ramp_blocks, np.frexp(block + 1.0)[1] - 1, window)
        return window

    def _first_block(self, window: Number) -> Number:
        early = np.minimum(window, self._ramp)
        return (1 << early) - 1 + (window - early) * self._window_blocks

    def _width(self, window: Number) -> Number:
        return np.where(window < self._ramp, 1 << np.minimum(window, self._ramp), self._window_blocks)

    def _left_over(self, corpus: Number, epoch: Number, index: np.ndarray) -> np.ndarray:
        rows, blocks, in_lanes, size = (
            self._rows[corpus],
            self._blocks[corpus],
            self._in_lanes[corpus],
            self._block_rows,
        )
        at = permute(index - in_lanes, rows - in_lanes, keyed_hash(self._seed, 4, corpus, epoch)) + in_lanes
        # Rows of whole blocks follow their block; those of the last, short block are where they are.
        moved = np.flatnonzero(at < blocks * size)
        if not moved.size:
            return at
        block, row = divided(at[moved], size)
        key = keyed_hash(self._seed, 2, _at(corpus, moved), _at(epoch, moved))
        at[moved] = permute(block, _at(blocks, moved), key) * size + row
        return at


def _at(value: Number, chosen: np.ndarray) -> Number:
    return value if np.ndim(value) == 0 else value[chosen]
