"""Keyed permutations of [0, size) without tables: Feistel networks with cycle walking (Black and Rogaway 2002, 2.2).

Arithmetic. `bits` is the length of size - 1 (4 at least); a number splits into `high` (bits // 2 bits) and `low` (the
rest, at most 31 bits). Eight rounds add to each half in turn a 32-bit finaliser (murmur3's, Appleby 2011) of the other
half plus the round's key, modulo the half's own power of two; round 0 changes `high`. Results of `size` or more go
through the network again, fewer than two passes each on average above 8. Round keys are the 32-bit halves of splitmix64
(Steele et al. 2014) of the 64-bit key. Everything works on whole arrays; nothing here is meant to resist an attacker.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUNDS = 8
LARGEST_SIZE = 2**62

U64, U32 = np.uint64, np.uint32
_GOLDEN = 0x9E3779B97F4A7C15
# Networks on 3 bits or fewer favour some permutations over others twofold.
_LEAST_BITS = 4


def keyed_hash(*parts: np.ndarray | int) -> np.ndarray:
    """uint64 hash of numbers or arrays (broadcast, one dimension at least), element by element."""
    state = np.array([0x243F6A8885A308D3], dtype=U64)
    for part in parts:
        state = _mix64(np.atleast_1d(np.asarray(part)).astype(U64) ^ state, U64(_GOLDEN))
    return state


def permute(index: np.ndarray, size: np.ndarray | int, key: np.ndarray) -> np.ndarray:
    """Image of each `index` (int64 `[n]`) under the permutation of [0, size) that `key` selects.

    `size` and `key` are one number for all or `[n]`, element by element.
    """
    return Permutations(size, key)(index)


class Permutations:
    """A family of permutations: number k is of [0, size[k]) and selected by key[k] (uint64).

    `size` may be one number for all; `key` has one dimension.
    """

    def __init__(self, size: np.ndarray | int, key: np.ndarray) -> None:
        size = np.asarray(size, dtype=np.int64)
        if size.ndim and (size == size[0]).all():
            size = size[0]
        assert size.min() >= 1 and size.max() <= LARGEST_SIZE, "sizes are 1 to 2^62"
        bits = np.maximum(_LEAST_BITS, _bit_length(size - 1))
        high_bits = (bits // 2).astype(U32)
        low_bits = bits.astype(U32) - high_bits
        self._size, self._low_bits = size.astype(U64), low_bits
        self._masks = tuple(((U64(1) << half.astype(U64)) - U64(1)).astype(U32) for half in (high_bits, low_bits))
        key = np.asarray(key, dtype=U64)
        mixed = [_mix64(key, U64((number + 1) * _GOLDEN % 2**64)) for number in range(ROUNDS // 2)]
        halves = [half.astype(U32) for both in mixed for half in (both >> U64(32), both)]
        self._round_keys = halves if len(key) > 1 else [half[0] for half in halves]

    def __call__(self, index: np.ndarray, which: np.ndarray | None = None) -> np.ndarray:
        """Images, int64 `[n]`, of `index` (int64 `[n]`) under the permutations numbered `which` (int `[n]`).

        Without `which` a family of one serves all, and a family of n serves element by element.
        """
        size, low_bits, high_mask, low_mask, *keys = (
            _take(table, which) for table in (self._size, self._low_bits, *self._masks, *self._round_keys)
        )
        value = _feistel(index.astype(U64), low_bits, high_mask, low_mask, keys)
        outside = np.flatnonzero(value >= size)
        # From inside the walk comes back inside; from outside it might never end.
        assert (index[outside] < _take(size, outside)).all(), "indices are below the size"
        while outside.size:
            part = [_take(table, outside) for table in (low_bits, high_mask, low_mask, *keys)]
            again = _feistel(value[outside], part[0], part[1], part[2], part[3:])
            value[outside] = again
            outside = outside[again >= _take(size, outside)]
        return value.astype(np.int64)


def _take(table: np.ndarray, which: np.ndarray | None) -> np.ndarray:
    return table if which is None or np.ndim(table) == 0 else table[which]


def _feistel(
    value: np.ndarray, low_bits: np.ndarray, high_mask: np.ndarray, low_mask: np.ndarray, keys: Sequence[np.ndarray]
) -> np.ndarray:
    low_bits = low_bits.astype(U64)
    # High bits fall away in the cast, so the masks below need 32 bits only.
    high, low = (value >> low_bits).astype(U32), value.astype(U32) & low_mask
    for number, key in enumerate(keys):
        if number % 2:
            low += _mix32(high, key)
            low &= low_mask
        else:
            high += _mix32(low, key)
            high &= high_mask
    return (high.astype(U64) << low_bits) | low


def _mix32(value: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A 32-bit finaliser of value + key; arithmetic is modulo 2^32."""
    value = value + key
    value ^= value >> U32(16)
    value *= U32(0x85EBCA6B)
    value ^= value >> U32(13)
    value *= U32(0xC2B2AE35)
    value ^= value >> U32(16)
    return value


def _mix64(value: np.ndarray, key: np.ndarray | np.uint64) -> np.ndarray:
    """A 64-bit finaliser of value + key; arithmetic is modulo 2^64."""
    value = value + key
    value ^= value >> U64(30)
    value *= U64(0xBF58476D1CE4E5B9)
    value ^= value >> U64(27)
    value *= U64(0x94D049BB133111EB)
    value ^= value >> U64(31)
    return value


def _bit_length(value: np.ndarray) -> np.ndarray:
    """Bits of each non-negative number; exact, unlike a floating-point logarithm."""
    length, rest = np.zeros_like(value), value
    for shift in (32, 16, 8, 4, 2, 1):
        big = rest >= (1 << shift)
        length, rest = length + shift * big, np.where(big, rest >> shift, rest)
    return length + (rest > 0)
