"""Unigram and interpolated bigram models of token ids, the yardsticks beside the transformer's likelihood.

Smoothing is Witten-Bell (Witten and Bell 1991, method C; Chen and Goodman 1998, equation 16), the bigram with the
unigram below it and the unigram with the uniform distribution below it:

    P(w)     = (c(w) + T * 1/V) / (N + T)                 T: distinct tokens seen, N: tokens seen, V: vocabulary
    P(w | h) = (c(h w) + T(h) * P(w)) / (c(h) + T(h))     T(h): distinct tokens seen after h; P(w) when c(h) = 0
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

MERGE_TOKENS = 2_000_000


@dataclass(frozen=True)
class NGrams:
    """Counts of one token stream. `pairs` holds h * V + w ascending, `pair_counts` how often each stood there."""

    vocabulary_size: int
    bos_id: int
    unigrams: np.ndarray
    pairs: np.ndarray
    pair_counts: np.ndarray
    history_counts: np.ndarray
    history_types: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens counted."""
        return int(self.unigrams.sum())

    @cached_property
    def probabilities(self) -> np.ndarray:
        """P(w) of every token, `[vocabulary]`."""
        types = np.count_nonzero(self.unigrams)
        if types == 0:
            return np.full(self.vocabulary_size, 1.0 / self.vocabulary_size)
        return (self.unigrams + types / self.vocabulary_size) / (self.unigrams.sum() + types)

    def unigram_nll(self, tokens: np.ndarray) -> np.ndarray:
        """-log P(w) in nats of each token of one sequence, `[tokens]`."""
        return -np.log(self.probabilities[tokens])

    def bigram_nll(self, tokens: np.ndarray) -> np.ndarray:
        """-log P(w | h) in nats of each token of one sequence, `[tokens]`; the first one's history is bos."""
        tokens = np.asarray(tokens, dtype=np.int64)
        history = np.concatenate([[self.bos_id], tokens[:-1]]).astype(np.int64)[: tokens.size]
        key = history * self.vocabulary_size + tokens
        seen = np.zeros(tokens.size)
        if self.pairs.size:
            place = np.minimum(np.searchsorted(self.pairs, key), self.pairs.size - 1)
            seen = np.where(self.pairs[place] == key, self.pair_counts[place], 0)
        below = self.probabilities[tokens]
        types, total = self.history_types[history], self.history_counts[history]
        known = np.maximum(total + types, 1)
        return -np.log(np.where(total > 0, (seen + types * below) / known, below))

    def unigram_guess(self) -> int:
        """The most probable token; the smallest id among equals."""
        return int(self.unigrams.argmax())

    def bigram_guesses(self) -> np.ndarray:
        """The most probable token after each history, `[vocabulary]`.

        Interpolation with P(w) can change the order of counts, so each history's candidates are the tokens seen
        after it and the most probable token of all.
        """
        size = self.vocabulary_size
        below = self.probabilities
        history, word = self.pairs // size, self.pairs % size
        score = self.pair_counts + self.history_types[history] * below[word]
        best = np.full(size, self.unigram_guess(), dtype=np.int64)
        best_score = self.history_types * below[self.unigram_guess()]
        order = np.lexsort((-word, score, history))
        last = np.flatnonzero(np.r_[history[order][1:] != history[order][:-1], True]) if order.size else order
        chosen = order[last]
        better = score[chosen] > best_score[history[chosen]]
        best[history[chosen][better]] = word[chosen][better]
        return best


def count(sequences: Iterable[np.ndarray], vocabulary_size: int, bos_id: int) -> NGrams:
    """Count sequences of token ids; every sequence starts after bos. Memory grows with distinct pairs, not tokens."""
    unigrams = np.zeros(vocabulary_size, dtype=np.int64)
    pairs, pair_counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    waiting: list[np.ndarray] = []
    waiting_tokens = 0
    for sequence in sequences:
        if len(sequence) == 0:
            continue
        stream = np.concatenate([[bos_id], sequence]).astype(np.int64)
        waiting.append(stream[:-1] * vocabulary_size + stream[1:])
        waiting_tokens += len(sequence)
        if waiting_tokens >= MERGE_TOKENS:
            pairs, pair_counts = _merge(pairs, pair_counts, np.concatenate(waiting))
            waiting, waiting_tokens = [], 0
    if waiting:
        pairs, pair_counts = _merge(pairs, pair_counts, np.concatenate(waiting))
    np.add.at(unigrams, pairs % vocabulary_size, pair_counts)
    history = pairs // vocabulary_size
    history_counts = np.bincount(history, weights=pair_counts, minlength=vocabulary_size).astype(np.int64)
    history_types = np.bincount(history, minlength=vocabulary_size).astype(np.int64)
    return NGrams(vocabulary_size, bos_id, unigrams, pairs, pair_counts, history_counts, history_types)


def _merge(pairs: np.ndarray, counts: np.ndarray, more: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    fresh, fresh_counts = np.unique(more, return_counts=True)
    both = np.concatenate([pairs, fresh])
    merged, where = np.unique(both, return_inverse=True)
    total = np.zeros(merged.size, dtype=np.int64)
    np.add.at(total, where, np.concatenate([counts, fresh_counts]))
    return merged, total
