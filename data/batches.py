"""Micro-batches as NumPy arrays, laid out from rows of shards without a loop over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.ring import Arrays
from data.shards import Row, Samples

# Widths are rounded up to whole multiples where they vary.
WIDTH_STEP = 8


@dataclass(frozen=True)
class Batch:
    """One micro-batch: tokens and labels int64, positions and segments int32, `loss_weight` float32.

    Arrays are `[batch, source]` (fields `source_*`) and `[batch, target]` (all others), as wide as the capacities of
    the data, with length buckets as wide as the longest row rounded up to a multiple of 8. Segments number the pairs of
    a row from 1, the same in source and target; 0 is padding. Positions count from 0 in each segment.

    Layout pairs: `labels` are the targets of the pairs one behind the other, `source_tokens` their sources. Layout
    sequence: source arrays are `[batch, 0]`; in a segment `labels` are the pair's source and target one behind the
    other. In both, `target_tokens` of a segment is bos followed by its `labels` without the last, and `loss_weight` is
    1 on labels that come from targets, 0 on sources and padding.

    `index` is the micro-batch's number in its global batch; numbers past the last real one mark copies whose
    `loss_weight` is all 0, which keep replicas in step. A row without pairs stands for a sample in quarantine. Arrays
    that may not be written to are shared with other batches.
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
        return replace(self, index=index, loss_weight=np.zeros(self.loss_weight.shape, dtype=np.float32))


class Collator:
    """Lays rows out in arrays that it is given; padding has `pad_id`, position 0, segment 0 and weight 0.

    `rows`: most rows of a micro-batch; `fitted`: arrays are as wide as their longest row, not as the capacities.
    """

    def __init__(
        self,
        sequence: bool,
        rows: int,
        source_capacity: int,
        target_capacity: int,
        pad_id: int,
        bos_id: int,
        fitted: bool = False,
    ) -> None:
        self._sequence, self._fitted = sequence, fitted
        self._source_capacity, self._target_capacity = 0 if sequence else source_capacity, target_capacity
        self._pad_id, self._bos_id = pad_id, bos_id
        size = rows * max(self._source_capacity, target_capacity)
        self._count = np.arange(size, dtype=np.int32)
        # What rows of one full pair have in common.
        full = rows, target_capacity
        self._positions = _shared(np.tile(np.arange(target_capacity, dtype=np.int32), (rows, 1)))
        self._segments = _shared(np.ones(full, dtype=np.int32))
        self._weight = _shared(np.ones(full, dtype=np.float32))

    @property
    def sizes(self) -> tuple[int, int]:
        """Elements of a source array and of a target array."""
        rows = len(self._positions)
        return rows * self._source_capacity, rows * self._target_capacity

    def fill(self, rows: Sequence[Row], index: int, arrays: Arrays) -> Batch:
        """The micro-batch of `rows`, written to `arrays`, whose memory it keeps using."""
        count = len(rows)
        if self._sequence:
            pairs = [row[1] + row[3] if len(row[0]) else row[3] for row in rows]
            lengths = [len(row[0]) + len(row[2]) for row in rows]
        else:
            pairs, lengths = [row[3] for row in rows], [len(row[2]) for row in rows]
        width = self._width(lengths, self._target_capacity)
        labels = arrays.labels[: count * width].reshape(count, width)
        tokens = arrays.target_tokens[: count * width].reshape(count, width)
        segments, positions, starts = self._pieces(
            pairs, lengths, width, arrays.target_segments, arrays.target_positions
        )
        for line, row, length in zip(labels, rows, lengths, strict=True):
            if self._sequence:
                join(row, line)
            else:
                np.copyto(line[:length], row[2])
            line[length:] = self._pad_id
        tokens[:, 1:] = labels[:, :-1]
        tokens.reshape(-1)[starts] = self._bos_id
        for line, length in zip(tokens, lengths, strict=True):
            line[length:] = self._pad_id
        weight = self._weights(rows, lengths, segments, arrays.loss_weight)
        return Batch(index, *self._source(rows, arrays), tokens, positions, segments, labels, weight)

    def fill_full(self, labels: Sequence[np.ndarray], index: int, arrays: Arrays) -> Batch:
        """The micro-batch of rows of layout sequence that are one pair of full width without source."""
        count, width = len(labels), self._target_capacity
        lines = arrays.labels[: count * width].reshape(count, width)
        tokens = arrays.target_tokens[: count * width].reshape(count, width)
        for line, row in zip(lines, labels, strict=True):
            np.copyto(line, row)
        tokens[:, 0] = self._bos_id
        tokens[:, 1:] = lines[:, :-1]
        empty = arrays.source_tokens.reshape(count, 0), *[arrays.source_segments.reshape(count, 0)] * 2
        return Batch(
            index, *empty, tokens, self._positions[:count], self._segments[:count], lines, self._weight[:count]
        )

    def _source(self, rows: Sequence[Row], arrays: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lengths = [0] * len(rows) if self._sequence else [len(row[0]) for row in rows]
        width = self._width(lengths, self._source_capacity)
        tokens = arrays.source_tokens[: len(rows) * width].reshape(len(rows), width)
        if self._sequence:
            empty = arrays.source_segments[:0].reshape(len(rows), 0)
            return tokens, empty, empty
        for line, row, length in zip(tokens, rows, lengths, strict=True):
            np.copyto(line[:length], row[0])
            line[length:] = self._pad_id
        segments, positions, _ = self._pieces(
            [row[1] for row in rows], lengths, width, arrays.source_segments, arrays.source_positions
        )
        return tokens, positions, segments

    def _width(self, lengths: Sequence[int], capacity: int) -> int:
        longest = max(lengths)
        assert longest <= capacity, "a row is longer than the data's capacity"
        return min(capacity, -(-max(longest, 1) // WIDTH_STEP) * WIDTH_STEP) if self._fitted else capacity

    def _pieces(
        self,
        pairs: Sequence[np.ndarray],
        lengths: Sequence[int],
        width: int,
        segments: np.ndarray,
        positions: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Segments and positions `[rows, width]` and where pairs start in them, of rows of pairs of given lengths."""
        count = len(pairs)
        if width == self._positions.shape[1] and all(
            len(pair) == 1 and length == width for pair, length in zip(pairs, lengths, strict=True)
        ):
            return self._segments[:count], self._positions[:count], np.arange(count) * width
        # The padding of a row counts as one more piece of it.
        rooms = np.array([len(pair) + 1 for pair in pairs])
        last = np.cumsum(rooms) - 1
        number = np.arange(1, last[-1] + 2) - np.repeat(last + 1 - rooms, rooms)
        number[last] = 0
        sizes = np.empty(len(number), dtype=np.int64)
        sizes[number > 0] = np.concatenate(pairs)
        sizes[last] = width - np.asarray(lengths)
        starts = np.cumsum(sizes) - sizes
        total = count * width
        segments, positions = segments[:total], positions[:total]
        segments[:] = np.repeat(number, sizes)
        np.subtract(self._count[:total], np.repeat(starts, sizes), out=positions, casting="unsafe")
        positions *= segments > 0
        kept = (number > 0) & (sizes > 0)
        return segments.reshape(count, width), positions.reshape(count, width), starts[kept]

    def _weights(
        self, rows: Sequence[Row], lengths: Sequence[int], segments: np.ndarray, weight: np.ndarray
    ) -> np.ndarray:
        count, width = segments.shape
        sources = self._sequence and any(len(row[0]) for row in rows)
        if not sources and segments.base is self._segments.base:
            return self._weight[:count]
        weight = weight[: count * width].reshape(count, width)
        np.greater(segments, 0, out=weight)
        if sources:
            for line, row, length in zip(weight, rows, lengths, strict=True):
                line[:length][of_source(row)] = 0
        return weight


def of_source(row: Row) -> np.ndarray | slice:
    """Which tokens of a row of layout sequence come from sources: a mask, or a slice where they lead the row."""
    source, source_lengths, _, target_lengths = row
    if len(source_lengths) == 0 or source_lengths[0] == len(source):
        return slice(0, len(source))
    sizes = np.stack([source_lengths, target_lengths], axis=1).ravel()
    return np.repeat(np.tile([True, False], len(source_lengths)), sizes)


def join(row: Row, out: np.ndarray) -> int:
    """Write the tokens of a row of layout sequence, each pair's source and target in turn; returns their number."""
    source, _, target, _ = row
    length = len(source) + len(target)
    here = of_source(row)
    if isinstance(here, slice):
        np.copyto(out[: len(source)], source)
        np.copyto(out[len(source) : length], target)
    else:
        out[:length][here] = source
        out[:length][~here] = target
    return length


def rows_of(samples: Samples) -> list[Row]:
    """The rows that were concatenated into `samples`."""
    ends = np.cumsum(samples.pairs)
    parts = [np.split(lengths, ends[:-1]) for lengths in (samples.source_lengths, samples.target_lengths)]
    tokens = [
        np.split(values, np.cumsum([int(part.sum()) for part in lengths])[:-1])
        for values, lengths in zip((samples.source, samples.target), parts, strict=True)
    ]
    return list(zip(tokens[0], parts[0], tokens[1], parts[1], strict=True))


def collate(
    samples: Samples, index: int, source_capacity: int, target_capacity: int, pad_id: int, bos_id: int
) -> Batch:
    """Samples of layout pairs as a micro-batch of full width, in arrays of its own."""
    collator = Collator(False, len(samples.pairs), source_capacity, target_capacity, pad_id, bos_id)
    return collator.fill(rows_of(samples), index, Arrays.empty(*collator.sizes))


def _shared(array: np.ndarray) -> np.ndarray:
    """A view that may not be written to."""
    view = array.view()
    view.flags.writeable = False
    return view
