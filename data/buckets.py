"""Length buckets: within a window of positions, which sample stands where, so that micro-batches pad little. Pure.

The windows are aligned spans of `bucket_batches * global_batch_sequences` positions of the order. A window's samples
change places among themselves only, by a rule of seed and window number: each is still served exactly once, and every
world size sees the same global batches.
"""

from __future__ import annotations

import numpy as np

from data.order import keyed_hash, permute

# Uses of the hash that no other part of the order has.
_TIES, _PLACES = 0x7469, 0x706C


def arrange(
    source_lengths: np.ndarray, target_lengths: np.ndarray, seed: int, window: int, micro_batch: int
) -> np.ndarray:
    """Which sample of the window, int64 `[samples]`, stands at each of its positions: a permutation.

    `source_lengths` and `target_lengths` (int, `[samples]`) are tokens of each sample in the order's sequence; layout
    sequence gives zeros and the sums. Samples are sorted by length (see `_sorted`), cut into micro-batches of
    `micro_batch` samples, and the micro-batches shuffled, so that a global batch holds short and long ones (sequence
    bucketing, Khomenko et al. 2016). Raises ValueError when the window does not divide into micro-batches.
    """
    samples = len(target_lengths)
    if samples % micro_batch:
        raise ValueError(f"a window of {samples} samples does not divide into micro-batches of {micro_batch}")
    ordered = _sorted(source_lengths, target_lengths, keyed_hash(seed, _TIES, window, np.arange(samples)), micro_batch)
    batches = samples // micro_batch
    places = permute(np.arange(batches), batches, keyed_hash(seed, _PLACES, window))
    return ordered.reshape(batches, micro_batch)[places].ravel()


def _sorted(source: np.ndarray, target: np.ndarray, ties: np.ndarray, micro_batch: int) -> np.ndarray:
    """Samples so sorted that neighbours are near in both lengths; equal ones in the sequence of `ties`.

    By target into strips of whole micro-batches, in each strip by source: as many strips as a strip has micro-batches,
    so that both lengths are cut equally often. Sources of one length leave a plain sort by target.
    """
    batches = len(target) // micro_batch
    strips = max(1, round(batches**0.5))
    strip = np.empty(len(target), dtype=np.int64)
    strip[np.lexsort((ties, target))] = np.arange(len(target)) // micro_batch * strips // batches
    return np.lexsort((ties, target, source, strip))
