"""Scores of a unigram model that depend on the texts alone.

The library's trainer chooses the pieces, but sums their expected counts in an order that differs from process to
process. Here counts are whole numbers: each word is cut in its most probable way, pieces are counted, and that is
done again with the new scores (hard EM; Kudo 2018, section 3.2, has the soft form).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping

ROUNDS = 4
# Of pieces that no best segmentation uses: less than one occurrence.
UNSEEN = 0.1


def scores_of(pieces: Collection[str], words: Mapping[str, int]) -> dict[str, float]:
    """Log-probability of each piece; `words` and how often each occurs. Single characters must be among the pieces."""
    longest = max(map(len, pieces))
    known = frozenset(pieces)
    counts: Counter[str] = Counter()
    for word, times in words.items():
        for piece in _within(word, known, longest):
            counts[piece] += times
    for _ in range(ROUNDS):
        total = sum(counts.values()) + UNSEEN * len(known)
        scores = {piece: math.log((counts[piece] or UNSEEN) / total) for piece in known}
        counts = Counter()
        for word, times in words.items():
            for piece in segment(word, scores, longest):
                counts[piece] += times
    return scores


def _within(word: str, known: Collection[str], longest: int) -> list[str]:
    return [
        word[start:end]
        for start in range(len(word))
        for end in range(start + 1, min(len(word), start + longest) + 1)
        if word[start:end] in known
    ]


def segment(word: str, scores: Mapping[str, float], longest: int) -> list[str]:
    """The most probable pieces of a word; of equal ways the one with longer last pieces."""
    best = [0.0] + [-math.inf] * len(word)
    cut = [0] * (len(word) + 1)
    for end in range(1, len(word) + 1):
        for start in range(max(0, end - longest), end):
            score = scores.get(word[start:end])
            if score is not None and best[start] + score > best[end]:
                best[end], cut[end] = best[start] + score, start
    pieces, end = [], len(word)
    while end:
        pieces.append(word[cut[end] : end])
        end = cut[end]
    return pieces[::-1]
