"""From tokenized texts to pairs that fit a row, and from pairs to rows: cutting, shortening, best fit. All pure.

A pair is (source tokens, label tokens), a row one or more pairs. Layout pairs: the sources of a row fit the encoder,
its labels the decoder. Layout sequence: sources and labels of a row together fit the decoder.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

Pair = tuple[np.ndarray, np.ndarray]
Row = list[Pair]
# Pairs, or dense rows, that are held in memory and shuffled together: at most so many, of at most so many tokens.
WINDOW_PAIRS = 8192
WINDOW_TOKENS = 1 << 23


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


def fit_prompt(source: np.ndarray, labels: int, capacity: int, keep_head: bool = True) -> np.ndarray:
    """The source of a sequence of `capacity` tokens that `labels` label tokens follow, shortened by `fit_source`.

    It may take what the labels leave free, and half of the capacity (rounded down) where they leave less: at least
    half stays for labels that want it, and one token always.
    """
    return fit_source(source, max(capacity - labels, capacity // 2), keep_head)


def cut_sequence(
    source: np.ndarray, target: np.ndarray, eos_id: int, capacity: int, keep_head: bool = True
) -> list[Pair]:
    """Pairs of layout sequence, each of at most `capacity` (2 or more) tokens in all; labels joined as in `cut_pairs`.

    The source stands before the first piece, shortened by `fit_prompt`. The source of each later piece is the label
    before its own first one, a context of one token: so each label has a token that it is predicted from.
    """
    labels = np.append(target, eos_id).astype(np.int32)
    source = fit_prompt(source, len(labels), capacity, keep_head)
    first = capacity - len(source)
    pairs = [(source, labels[:first])]
    for start in range(first, len(labels), capacity - 1):
        pairs.append((labels[start - 1 : start], labels[start : start + capacity - 1]))
    return pairs


def pair_tokens(pair: Pair) -> int:
    """Tokens of a pair, source and labels."""
    return len(pair[0]) + len(pair[1])


def windows(items: Iterable, tokens: Callable[..., int]) -> Iterator[list]:
    """Consecutive items in lists of at most WINDOW_PAIRS items and WINDOW_TOKENS tokens; a larger item stands alone."""
    window: list = []
    held = 0
    for item in items:
        size = tokens(item)
        if window and (len(window) == WINDOW_PAIRS or held + size > WINDOW_TOKENS):
            yield window
            window, held = [], 0
        window.append(item)
        held += size
    if window:
        yield window


def one_per_row(pairs: Iterable[Pair], seed: int) -> Iterator[Row]:
    """Each pair in a row of its own, shuffled within windows."""
    generator = np.random.Generator(np.random.PCG64(seed))
    for window in windows(pairs, pair_tokens):
        yield from ([window[i]] for i in generator.permutation(len(window)))


def best_fit(pairs: Iterable[Pair], capacities: Sequence[int], seed: int) -> Iterator[Row]:
    """Rows that hold every pair exactly once and fit `capacities`: (encoder, decoder), or (sequence,) for their sum.

    Pairs are taken in windows, and within a window placed largest first into the open row where least room would
    remain (best-fit decreasing, Ding et al. 2024, section 3; with two capacities, room is the sum of the free shares).
    Pairs of equal size and the rows of a window are shuffled. The result depends on the arguments alone.
    """
    capacity = np.asarray(capacities, dtype=np.int64)
    generator = np.random.Generator(np.random.PCG64(seed))
    for window in windows(pairs, pair_tokens):
        window = [window[i] for i in generator.permutation(len(window))]
        lengths = np.array([(len(source), len(labels)) for source, labels in window], dtype=np.int64)
        if len(capacity) == 1:
            lengths = lengths.sum(axis=1, keepdims=True)
        assert (lengths <= capacity).all(), "a pair is longer than a row"
        if len(capacity) == 1:
            rows = _best_fit_one(lengths[:, 0], int(capacity[0]))
        else:
            rows = _best_fit_two(lengths, capacity)
        for i in generator.permutation(len(rows)):
            yield [window[pair] for pair in rows[i]]


def _best_fit_one(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing over `lengths` `[pairs]`; ties go to the earlier pair and the row opened first."""
    rows: list[list[int]] = []
    # Open rows by free tokens, then by number: the best fit is the first with enough.
    free: list[tuple[int, int]] = []
    order = np.argsort(-lengths, kind="stable")
    for pair, need in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(free, (need, -1))
        if place == len(free):
            left, number = capacity, len(rows)
            rows.append([])
        else:
            left, number = free.pop(place)
        rows[number].append(pair)
        if left > need:
            insort(free, (left - need, number))
    return rows


def _best_fit_two(lengths: np.ndarray, capacity: np.ndarray) -> list[list[int]]:
    """Best-fit decreasing over `lengths` `[pairs, 2]`; ties go to the earlier pair and an open row of lower place."""
    first_capacity, second_capacity = capacity.tolist()
    smallest_first, smallest_second = lengths.min(axis=0).tolist()
    full = 2 * first_capacity * second_capacity
    rows: list[list[int]] = []
    # Open rows: their free tokens, the sum of their free shares (times both capacities, so that it is exact) and their
    # numbers, in arrays that are compacted as rows fill up.
    first, second, shares, number = np.empty((4, len(lengths)), dtype=np.int64)
    opened = 0
    order = np.argsort(-(lengths / capacity).max(axis=1), kind="stable")
    for pair, (need_first, need_second) in zip(order.tolist(), lengths[order].tolist(), strict=True):
        best = opened
        if opened:
            fits = (first[:opened] >= need_first) & (second[:opened] >= need_second)
            room = np.where(fits, shares[:opened], full + 1)
            found = int(room.argmin())
            if room[found] <= full:
                best = found
        if best == opened:
            first[best], second[best], shares[best], number[best] = first_capacity, second_capacity, full, len(rows)
            rows.append([])
            opened += 1
        first[best] -= need_first
        second[best] -= need_second
        shares[best] -= need_first * second_capacity + need_second * first_capacity
        rows[number[best]].append(pair)
        if first[best] < smallest_first or second[best] < smallest_second:
            # Nothing fits any more: the last open row takes this one's place.
            opened -= 1
            for array in (first, second, shares, number):
                array[best] = array[opened]
    return rows
