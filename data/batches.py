"""Micro-batches as NumPy arrays of fixed shape, collated from packed samples without a loop over tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from data.shards import Samples


@dataclass(frozen=True)
class Batch:
    """One micro-batch; arrays are int32 `[batch, sequence]`, `loss_weight` float32.

    Source arrays have `data.source_tokens` columns, all others `data.target_tokens`. Segments number the packed pairs
    of a row from 1, the same in source and target; 0 is padding. Positions count from 0 in each segment. In each
    segment `target_tokens` is bos followed by `labels` without the last; `loss_weight` is 1 on labels, 0 on padding.
    `index` is the micro-batch's number in its global batch; numbers past the last real one mark copies whose
    `loss_weight` is all 0, which keep replicas in step.
    """

    index: int
    source_tokens: np.ndarray
    source_positions: np.ndarray
    source_segments: np.ndarray
    target_tokens: np.ndarray
    target_positions: np.ndarray
    target_segments: np.ndarray
    labels: np.ndarray
    loss_weight: np.ndarray

    def without_weight(self, index: int) -> Batch:
        """The same samples under another number, with no say in the loss."""
        return replace(self, index=index, loss_weight=np.zeros_like(self.loss_weight))


def collate(
    samples: Samples, index: int, source_capacity: int, target_capacity: int, pad_id: int, bos_id: int
) -> Batch:
    """Lay samples out in arrays, one row each; padding has `pad_id`, position 0 and segment 0."""
    rows = len(samples.pairs)
    source = _Layout(samples.source_lengths, samples.pairs, source_capacity)
    target = _Layout(samples.target_lengths, samples.pairs, target_capacity)
    shifted = np.empty(len(samples.target), dtype=np.int32)
    shifted[1:] = samples.target[:-1]
    shifted[target.starts] = bos_id
    return Batch(
        index=index,
        source_tokens=source.spread(samples.source, rows, pad_id),
        source_positions=source.spread(source.positions, rows, 0),
        source_segments=source.spread(source.segments, rows, 0),
        target_tokens=target.spread(shifted, rows, pad_id),
        target_positions=target.spread(target.positions, rows, 0),
        target_segments=target.spread(target.segments, rows, 0),
        labels=target.spread(samples.target, rows, pad_id),
        loss_weight=target.spread(np.ones(len(shifted)), rows, 0, np.float32),
    )


class _Layout:
    """Where each token of concatenated samples goes, for one side of the pairs."""

    def __init__(self, lengths: np.ndarray, pairs: np.ndarray, capacity: int) -> None:
        ends = np.cumsum(lengths)
        # First token of each pair, counted over all rows; every pair has at least one token.
        self.starts = ends - lengths
        last_pairs = np.cumsum(pairs)
        first_pairs = last_pairs - pairs
        row_starts = self.starts[first_pairs]
        row_lengths = ends[last_pairs - 1] - row_starts
        total = int(ends[-1])
        token = np.arange(total)
        row = np.repeat(np.arange(len(pairs)), row_lengths)
        number = np.arange(len(lengths)) - np.repeat(first_pairs, pairs) + 1
        self.segments = np.repeat(number, lengths)
        self.positions = token - np.repeat(self.starts, lengths)
        self._flat = row * capacity + token - row_starts[row]
        self._capacity = capacity

    def spread(self, values: np.ndarray, rows: int, padding: int, kind: type = np.int32) -> np.ndarray:
        result = np.full(rows * self._capacity, padding, dtype=kind)
        result[self._flat] = values
        return result.reshape(rows, self._capacity)
