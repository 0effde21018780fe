"""From tokenized records to packed samples: cutting long targets, shortening sources, best-fit packing. All pure.

A pair is (source tokens, label tokens); a sample is one or more pairs whose sources together fit the encoder and whose
labels together fit the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Pair = tuple[np.ndarray, np.ndarray]
PACKING_WINDOW_PAIRS = 8192


def fit_source(source: np.ndarray, capacity: int, keep_head: bool = True) -> np.ndarray:
    """A source shortened to `capacity` tokens: its first quarter of the capacity, then its end.

    Head and tail together keep the task prefix and what stands next to the target (head+tail truncation, Sun et al.
    2019, section 5.3.1). Without `keep_head` only the end stays.
    """
    if len(source) <= capacity:
        return source
    head = capacity // 4 if keep_head else 0
    return np.concatenate([source[:head], source[len(source) - (capacity - head) :]])


def cut_pairs(
    source: np.ndarray,
    target: np.ndarray,
    eos_id: int,
    source_capacity: int,
    target_capacity: int,
    keep_head: bool = True,
) -> list[Pair]:
    """Pairs (source, labels) whose labels joined are `target` and one `eos_id`, each within both capacities.

    A target that is too long is cut into consecutive pieces; only the last ends with eos. The source of a later piece
    is the record's source with the target so far appended, shortened by `fit_source` to the share of the encoder that
    the piece takes of the decoder (at least a quarter), so that a short last piece can share its sample.
    """
    labels = np.append(target, eos_id).astype(np.int32)
    pairs = [(fit_source(source, source_capacity, keep_head), labels[:target_capacity])]
    for start in range(target_capacity, len(labels), target_capacity):
        piece = labels[start : start + target_capacity]
        share = -(-source_capacity * len(piece) // target_capacity)
        capacity = max(share, source_capacity // 4, 1)
        pairs.append((fit_source(np.concatenate([source, labels[:start]]), capacity, keep_head), piece))
    return pairs


def pack(
    source_lengths: Sequence[int],
    target_lengths: Sequence[int],
    source_capacity: int,
    target_capacity: int,
    seed: int,
) -> list[list[int]]:
    """Samples as lists of pair numbers; every pair stands in exactly one sample and every sample fits.

    Pairs are shuffled, taken in windows of PACKING_WINDOW_PAIRS, and within a window placed largest first into the
    open sample where least room would remain (best-fit decreasing, Ding et al. 2024, section 3, in two dimensions:
    room is the sum of the free shares of encoder and decoder). Samples come out in shuffled order. The result depends
    on the arguments alone.
    """
    lengths = np.stack([np.asarray(source_lengths), np.asarray(target_lengths)], axis=1).astype(np.int64)
    capacity = np.array([source_capacity, target_capacity], dtype=np.int64)
    assert (lengths <= capacity).all(), "a pair is longer than a sample"
    generator = np.random.Generator(np.random.PCG64(seed))
    order = generator.permutation(len(lengths))
    samples: list[list[int]] = []
    for start in range(0, len(order), PACKING_WINDOW_PAIRS):
        window = order[start : start + PACKING_WINDOW_PAIRS]
        packed = _best_fit(lengths[window], capacity)
        samples.extend([int(window[i]) for i in sample] for sample in packed)
    return [samples[i] for i in generator.permutation(len(samples))]


def _best_fit(lengths: np.ndarray, capacity: np.ndarray) -> list[list[int]]:
    """Best-fit decreasing over `lengths` `[pairs, 2]`; ties go to the earlier pair and the sample opened first."""
    size = (lengths / capacity).max(axis=1)
    smallest = lengths.min(axis=0)
    samples: list[list[int]] = []
    # Open samples: their free tokens `[open, 2]` and their numbers, in arrays that are compacted as samples fill up.
    free = np.empty((len(lengths), 2), dtype=np.int64)
    number = np.empty(len(lengths), dtype=np.int64)
    opened = 0
    for pair in np.argsort(-size, kind="stable"):
        need = lengths[pair]
        best = -1
        if opened:
            left = free[:opened] - need
            room = np.where((left >= 0).all(axis=1), (left / capacity).sum(axis=1), np.inf)
            best = int(room.argmin())
            if not np.isfinite(room[best]):
                best = -1
        if best < 0:
            best = opened
            free[best], number[best] = capacity, len(samples)
            samples.append([])
            opened += 1
        free[best] -= need
        samples[number[best]].append(int(pair))
        if (free[best] < smallest).any():
            # Nothing fits any more: the last open sample takes this one's place.
            opened -= 1
            free[best], number[best] = free[opened], number[opened]
    return samples
