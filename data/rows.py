"""Which cut and which packing a configuration takes: a stream of tokenized texts becomes a stream of rows. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from data.chunking import chunk
from data.packing import Pair, Row, best_fit, cut_pairs, cut_sequence, fit_prompt, one_per_row


@dataclass(frozen=True)
class RowFormat:
    """`data.layout`, `data.packing` and capacities in tokens; `keep_head` as in `packing.fit_source`."""

    layout: str
    packing: str
    source_tokens: int
    target_tokens: int
    keep_head: bool = True


def rows_of(texts: Iterable[Pair], form: RowFormat, eos_id: int, seed: int, counts: Counter[str]) -> Iterator[Row]:
    """Rows that hold each token of each target, and one eos after it, exactly once as a label.

    `texts` are (source, target) of int32 tokens. Memory is bounded by the largest text and `packing.WINDOW_TOKENS`;
    the rows depend on texts, format and seed alone. `counts` grows by "cut" (targets in more than one piece) and
    "shortened" (source tokens left out).
    """
    assert form.layout == "sequence" or form.packing != "chunk"
    if form.packing == "chunk":
        return chunk(_prompted(texts, form, eos_id, counts), form.target_tokens, seed, counts)
    pairs = _pieces(texts, form, eos_id, counts)
    if form.packing == "none":
        return one_per_row(pairs, seed)
    sequence = form.layout == "sequence"
    return best_fit(pairs, (form.target_tokens,) if sequence else (form.source_tokens, form.target_tokens), seed)


def _pieces(texts: Iterable[Pair], form: RowFormat, eos_id: int, counts: Counter[str]) -> Iterator[Pair]:
    for source, target in texts:
        if form.layout == "sequence":
            pairs = cut_sequence(source, target, eos_id, form.target_tokens, form.keep_head)
        else:
            pairs = cut_pairs(source, target, eos_id, form.source_tokens, form.target_tokens, form.keep_head)
        counts["cut"] += len(pairs) > 1
        counts["shortened"] += len(source) - len(pairs[0][0])
        yield from pairs


def _prompted(texts: Iterable[Pair], form: RowFormat, eos_id: int, counts: Counter[str]) -> Iterator[Pair]:
    for source, target in texts:
        labels = np.append(target, eos_id).astype(np.int32)
        prompt = fit_prompt(source, len(labels), form.target_tokens, form.keep_head)
        counts["shortened"] += len(source) - len(prompt)
        yield prompt, labels
