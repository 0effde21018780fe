"""Dense rows for decoders: texts one behind the other, cut where a row is full. Pure.

Rows are filled as for GPT-3 (Brown et al. 2020, appendix B), but keep the boundaries that it has no mask for: each
text is a pair of its own in the row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from data.packing import Pair, Row, pair_tokens, windows


def chunk(texts: Iterable[Pair], capacity: int, seed: int, counts: Counter[str]) -> Iterator[Row]:
    """Rows of exactly `capacity` (2 or more) tokens, the last maybe fewer, that hold every label exactly once.

    `texts` are (source, labels) of any length. A text that reaches the end of a row goes on in another row, as a pair
    whose source begins with the token before the cut: a context of one token. Where the cut falls into the source, the
    pair before the cut has no label and the source's rest follows the context. Rows are shuffled within windows.
    `counts["cut"]` grows by the number of texts that were cut.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    for window in windows(_dense(texts, capacity, counts), row_tokens):
        # Only the last row of all can be short; it stays the last.
        full = [row for row in window if row_tokens(row) == capacity]
        yield from (full[i] for i in generator.permutation(len(full)))
        yield from window[len(full) :]


def row_tokens(row: Row) -> int:
    """Tokens of a row, sources and labels."""
    return sum(map(pair_tokens, row))


def _dense(texts: Iterable[Pair], capacity: int, counts: Counter[str]) -> Iterator[Row]:
    row: Row = []
    room = capacity
    for source, labels in texts:
        size = len(source) + len(labels)
        at = 0
        while at < size:
            # A cut happens at a row's end alone, so a context finds an empty row.
            context = _span(source, labels, at - 1, at) if at else (source[:0], labels[:0])
            before = pair_tokens(context)
            end = min(at + room - before, size)
            piece = _span(source, labels, at, end)
            row.append((np.concatenate([*context, piece[0]]), piece[1]))
            room -= before + end - at
            counts["cut"] += at == 0 and end < size
            at = end
            if room == 0:
                yield row
                row, room = [], capacity
    if row:
        yield row


def _span(source: np.ndarray, labels: np.ndarray, start: int, end: int) -> Pair:
    """Tokens [start, end) of source and labels joined, still apart."""
    skipped = len(source)
    return source[start:end], labels[max(start - skipped, 0) : max(end - skipped, 0)]
