"""The order of samples as a pure function: position in the run -> (corpus, epoch, row). No state, no tables of rows.

Positions are dealt to `lanes` in turn. Each lane walks superblocks of P slots that hold every corpus in exact integer
quotas, spread evenly, so any superblock of `lanes * P` aligned positions has the exact mixture. The n-th draw of a
corpus is epoch n // rows; within an epoch each lane walks its own share of a keyed permutation of blocks, a window of
blocks at a time, and rows are permuted inside the window; what lanes x blocks leave over comes last, permuted too.
Reads stay within `lanes * window_blocks` blocks at a time. Permutations are Feistel networks with cycle walking
(Black and Rogaway 2002), eight rounds over a 64-bit mixer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUNDS = 8
MOST_SLOTS = 4096

U = np.uint64
_GOLDEN = U(0x9E3779B97F4A7C15)


def _mix(value: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A 64-bit finaliser (splitmix64, Steele et al. 2014) of value + key; arithmetic is modulo 2^64."""
    value = value + key
    value = (value ^ (value >> U(30))) * U(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> U(27))) * U(0x94D049BB133111EB)
    return value ^ (value >> U(31))


def keyed_hash(*parts: np.ndarray | int) -> np.ndarray:
    """uint64 hash of numbers or arrays of one shape, element by element."""
    state = np.array([0x243F6A8885A308D3], dtype=U)
    for part in parts:
        state = _mix(np.atleast_1d(np.asarray(part)).astype(U) ^ state, _GOLDEN)
    return state


def permute(index: np.ndarray, size: np.ndarray | int, key: np.ndarray) -> np.ndarray:
    """Image of each `index` under the permutation of [0, size) that `key` selects; int64, element by element."""
    index = np.asarray(index, dtype=np.int64)
    size = np.broadcast_to(np.asarray(size, dtype=np.int64), index.shape)
    key = np.broadcast_to(key, index.shape)
    bits = np.maximum(2, _bit_length(size - 1))
    result = index.astype(U)
    todo = np.arange(index.size)
    while todo.size:
        result[todo] = _feistel(result[todo], bits[todo].astype(U), key[todo])
        todo = todo[result[todo] >= size[todo].astype(U)]
    return result.astype(np.int64)


def _bit_length(value: np.ndarray) -> np.ndarray:
    """Bits of each non-negative number; exact, unlike a floating-point logarithm."""
    length = np.zeros(value.shape, dtype=np.int64)
    rest = value.copy()
    for shift in (32, 16, 8, 4, 2, 1):
        big = rest >= (1 << shift)
        length[big] += shift
        rest[big] >>= shift
    return length + (rest > 0)


def _feistel(value: np.ndarray, bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A permutation of [0, 2^bits): the halves are added to in turn, each by a hash of the other."""
    low_bits = bits - bits // U(2)
    low_mask = (U(1) << low_bits) - U(1)
    high_mask = (U(1) << (bits // U(2))) - U(1)
    high, low = value >> low_bits, value & low_mask
    for number in range(ROUNDS):
        round_key = _mix(key, np.array([number + 1], dtype=U) * _GOLDEN)
        if number % 2:
            low = (low + _mix(high, round_key)) & low_mask
        else:
            high = (high + _mix(low, round_key)) & high_mask
    return (high << low_bits) | low


def quotas(weights: Sequence[float]) -> list[int]:
    """Slots of each corpus in a superblock: exact where at most 4,096 slots allow, else by largest remainder.

    Raises ValueError when a weight is too small to get a slot.
    """
    total = sum(weights)
    shares = np.asarray(weights, dtype=np.float64) / total
    for slots in range(len(shares), MOST_SLOTS + 1):
        exact = shares * slots
        counts = np.rint(exact)
        if (np.abs(exact - counts) < 1e-9 * slots).all() and (counts > 0).all() and counts.sum() == slots:
            return [int(count) for count in counts]
    exact = shares * MOST_SLOTS
    counts = np.floor(exact).astype(int)
    missing = MOST_SLOTS - int(counts.sum())
    counts[np.argsort(-(exact - counts), kind="stable")[:missing]] += 1
    if (counts == 0).any():
        number = int(np.argmin(counts))
        raise ValueError(
            f"weight {weights[number]} of corpus {number} is less than 1/{MOST_SLOTS} of all weights ({total}); raise "
            f"it to {total / MOST_SLOTS:.6g} or more, or remove the corpus"
        )
    return [int(count) for count in counts]


class Order:
    """`order(positions)` for any positions, in any sequence, at the same cost.

    `rows` and `weights` are per corpus. Raises ValueError for a corpus without rows or with too small a weight.
    """

    def __init__(
        self,
        rows: Sequence[int],
        weights: Sequence[float],
        seed: int,
        lanes: int,
        block_rows: int,
        window_blocks: int,
    ) -> None:
        if len(rows) != len(weights) or min(rows) < 1:
            raise ValueError(f"each corpus needs a weight and at least one row; rows are {list(rows)}")
        self._rows = np.asarray(rows, dtype=np.int64)
        self._seed, self._lanes = seed, lanes
        self._block_rows, self._window_blocks = block_rows, window_blocks
        self._quotas = np.asarray(quotas(weights), dtype=np.int64)
        # Slot table of a superblock: each corpus's draws at equal distances, the corpora interleaved.
        corpus = np.repeat(np.arange(len(rows)), self._quotas)
        draw = np.concatenate([np.arange(quota) for quota in self._quotas])
        place = np.argsort((draw + 0.5) / self._quotas[corpus], kind="stable")
        self._slot_corpus, self._slot_draw = corpus[place], draw[place]

    @property
    def superblock(self) -> int:
        """Aligned positions over which the mixture is exact."""
        return self._lanes * len(self._slot_corpus)

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Corpus, epoch and row of each position, int64 `[positions]`; positions are 0 or more."""
        positions = np.asarray(positions, dtype=np.int64)
        slots = len(self._slot_corpus)
        lane, turn = positions % self._lanes, positions // self._lanes
        superblock = turn // slots
        # Lanes are evenly staggered over the slot table, so that neighbouring positions have the mixture too.
        stagger = lane * slots // self._lanes
        rotation = (keyed_hash(self._seed, 1, superblock) % U(slots)).astype(np.int64)
        slot = (turn + stagger + rotation) % slots
        corpus = self._slot_corpus[slot]
        draw = (superblock * self._quotas[corpus] + self._slot_draw[slot]) * self._lanes + lane
        epoch = draw // self._rows[corpus]
        return corpus, epoch, self._shuffled(corpus, epoch, draw % self._rows[corpus])

    def _shuffled(self, corpus: np.ndarray, epoch: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Row at place `index` of an epoch of a corpus."""
        rows, size = self._rows[corpus], self._block_rows
        blocks = rows // size
        lane_blocks = blocks // self._lanes
        in_lanes = lane_blocks * self._lanes * size
        block_key = keyed_hash(self._seed, 2, corpus, epoch)
        result = np.empty_like(index)

        inside = np.flatnonzero(index < in_lanes)
        if inside.size:
            lane, place = index[inside] % self._lanes, index[inside] // self._lanes
            window_rows = self._window_blocks * size
            window = place // window_rows
            width = np.minimum(window_rows, lane_blocks[inside] * size - window * window_rows)
            key = keyed_hash(self._seed, 3, corpus[inside], epoch[inside], lane, window)
            at = permute(place % window_rows, width, key)
            block = lane * lane_blocks[inside] + window * self._window_blocks + at // size
            result[inside] = permute(block, blocks[inside], block_key[inside]) * size + at % size

        rest = np.flatnonzero(index >= in_lanes)
        if rest.size:
            key = keyed_hash(self._seed, 4, corpus[rest], epoch[rest])
            at = permute(index[rest] - in_lanes[rest], rows[rest] - in_lanes[rest], key)
            whole = blocks[rest] * size
            # Blocks that did not divide among lanes, then the rows of the last, short block.
            block = np.minimum(lane_blocks[rest] * self._lanes + at // size, blocks[rest] - 1)
            in_block = in_lanes[rest] + at < whole
            result[rest] = in_lanes[rest] + at
            moved = rest[in_block]
            result[moved] = permute(block[in_block], blocks[moved], block_key[moved]) * size + at[in_block] % size
        return result
