"""Cutting, shortening and packing: every token a label once, nothing over capacity, rows well filled."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.packing
from data.packing import best_fit, cut_pairs, cut_sequence, fit_prompt, fit_source, one_per_row, windows
from data.rows import RowFormat, rows_of

EOS = 2
FORMS = [
    RowFormat("pairs", "best_fit", 24, 16),
    RowFormat("pairs", "none", 24, 16),
    RowFormat("sequence", "best_fit", 999, 16),
    RowFormat("sequence", "chunk", 999, 16),
    RowFormat("sequence", "none", 999, 16),
]
SIZES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70)), max_size=40)


def named(form):
    return f"{form.layout}-{form.packing}"


def text(number, source, target):
    """Source and target whose every token is different from all others and tells its text, side and place."""
    first = 10 + number * 1000
    ids = np.arange(first, first + 1000, dtype=np.int32)
    return ids[:source], ids[500 : 500 + target]


def texts_of(sizes, layout):
    # An encoder always has something to read.
    least = 1 if layout == "pairs" else 0
    return [text(number, max(source, least), target) for number, (source, target) in enumerate(sizes)]


def check_rows(rows, texts, form):
    """Every label of every text once and in order, each piece with its own text's context, every row within bounds."""
    pieces = {number: [] for number in range(len(texts))}
    for row in rows:
        assert row
        sources, labels = (sum(len(pair[side]) for pair in row) for side in (0, 1))
        if form.layout == "pairs":
            assert sources <= form.source_tokens and 0 < labels <= form.target_tokens
        else:
            assert sources + labels <= form.target_tokens and labels > 0
        for source, label in row:
            told = [token for token in (*source.tolist(), *label.tolist()) if token != EOS]
            owners = {(token - 10) // 1000 for token in told}
            assert len(owners) <= 1, "one pair holds tokens of two texts"
            if owners:
                pieces[owners.pop()].append((source.tolist(), label.tolist()))
            else:
                # An empty target in one pair with no source: its eos stands alone, whosever it is.
                empty = next(n for n, (s, t) in enumerate(texts) if not len(s) + len(t) and not pieces[n])
                pieces[empty].append(([], label.tolist()))
    for number, (source, target) in enumerate(texts):
        stream = [*source.tolist(), *target.tolist(), EOS]
        place = {token: at for at, token in enumerate(stream)}
        found = sorted(pieces[number], key=lambda piece: place[(piece[1] or piece[0])[0]])
        assert [token for _, labels in found for token in labels] == [*target.tolist(), EOS]
        for context, labels in found:
            # A piece that does not begin the target is predicted from the very token before it.
            if labels and labels[0] != stream[len(source)]:
                assert context[-1] == stream[place[labels[0]] - 1]


@settings(deadline=None, max_examples=200)
@given(sizes=SIZES, seed=st.integers(0, 2**32))
@pytest.mark.parametrize("form", FORMS, ids=named)
def test_every_label_stands_once_in_order_and_no_row_is_too_long(form, sizes, seed):
    texts = texts_of(sizes, form.layout)
    counts = Counter()
    rows = list(rows_of(iter(texts), form, EOS, seed, counts))
    check_rows(rows, texts, form)
    again = list(rows_of(iter(texts), form, EOS, seed, Counter()))
    assert [[(s.tolist(), t.tolist()) for s, t in row] for row in rows] == [
        [(s.tolist(), t.tolist()) for s, t in row] for row in again
    ]
    if form.packing == "none":
        assert all(len(row) == 1 for row in rows)
    if form.packing != "chunk":
        lone = [cut(form, *each) for each in texts]
        assert counts["cut"] == sum(len(pairs) > 1 for pairs in lone)
        assert sum(map(len, rows)) == sum(map(len, lone))


def cut(form, source, target):
    if form.layout == "sequence":
        return cut_sequence(source, target, EOS, form.target_tokens)
    return cut_pairs(source, target, EOS, form.source_tokens, form.target_tokens)


@pytest.mark.parametrize("form", FORMS, ids=named)
@pytest.mark.parametrize("limit", [("WINDOW_PAIRS", 5), ("WINDOW_TOKENS", 60)], ids=lambda limit: limit[0])
def test_small_windows_lose_nothing_and_are_all_that_is_held(form, limit, monkeypatch):
    monkeypatch.setattr(data.packing, *limit)
    generator = np.random.default_rng(3)
    texts = texts_of(generator.integers(0, 40, size=(100, 2)).tolist(), form.layout)
    taken = [0]

    def stream():
        for each in texts:
            taken[0] += 1
            yield each

    rows, done, most = [], 0, 0
    for row in rows_of(stream(), form, EOS, 1, Counter()):
        rows.append(row)
        done += sum(len(labels) for _, labels in row)
        most = max(most, sum(len(target) + 1 for _, target in texts[: taken[0]]) - done)
    check_rows(rows, texts, form)
    # What was read but not yet given out is a window and the text at hand, not the stream.
    total = sum(len(target) + 1 for _, target in texts)
    assert taken[0] == 100 and most < total / 4


def test_windows_keep_both_bounds(monkeypatch):
    monkeypatch.setattr(data.packing, "WINDOW_PAIRS", 3)
    monkeypatch.setattr(data.packing, "WINDOW_TOKENS", 10)
    found = list(windows([4, 4, 4, 1, 1, 1, 1, 30, 2], lambda size: size))
    assert found == [[4, 4], [4, 1, 1], [1, 1], [30], [2]]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 10)), min_size=1, max_size=120),
    seed=st.integers(0, 2**32),
    joint=st.booleans(),
)
def test_best_fit_leaves_no_two_rows_that_fit_together(lengths, seed, joint):
    pairs = [(np.zeros(s, np.int32), np.zeros(t, np.int32)) for s, t in lengths]
    capacities = (30,) if joint else (20, 10)
    rows = list(best_fit(iter(pairs), capacities, seed))
    sizes = [np.array([sum(len(pair[side]) for pair in row) for side in (0, 1)]) for row in rows]
    for i, one in enumerate(sizes):
        for other in sizes[:i]:
            both = one + other
            assert both.sum() > 30 if joint else (both > [20, 10]).any()


def slow_best_fit(lengths, capacity):
    """Best-fit decreasing by trying every row for every length."""
    free = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, left in enumerate(free) if left >= length]
        best = min(fits, key=lambda i: (free[i], i), default=None)
        if best is None:
            free.append(capacity - length)
        else:
            free[best] -= length
    return sorted(free)


@settings(deadline=None, max_examples=80)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=150))
def test_best_fit_of_sequences_fills_rows_like_a_search_through_all_of_them(lengths):
    pairs = [(np.zeros(0, np.int32), np.zeros(length, np.int32)) for length in lengths]
    rows = best_fit(iter(pairs), (50,), 0)
    assert sorted(50 - sum(len(labels) for _, labels in row) for row in rows) == slow_best_fit(lengths, 50)


def lognormal_texts(count, seed):
    generator = np.random.default_rng(seed)
    for length in generator.lognormal(5.5, 1.2, size=count).astype(int).tolist():
        yield np.zeros(0, np.int32), np.zeros(length, np.int32)


def test_how_full_rows_are_on_lognormal_lengths():
    used, labels = {}, set()
    for packing in ("best_fit", "chunk", "none"):
        form = RowFormat("sequence", packing, 0, 2048)
        rows = list(rows_of(lognormal_texts(6000, 0), form, EOS, 0, Counter()))
        used[packing] = sum(len(part) for row in rows for pair in row for part in pair) / (2048 * len(rows))
        labels.add(sum(len(pair[1]) for row in rows for pair in row))
    assert len(labels) == 1
    assert used["best_fit"] > 0.995 and used["chunk"] > 0.999 and used["none"] < 0.3


def test_best_fit_of_pairs_is_near_the_lower_bound_on_mixed_lengths():
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.lognormal(3.3, 0.9, size=(4000, 2)).astype(int) + 1, [256, 256])
    pairs = [(np.zeros(s, np.int32), np.zeros(t, np.int32)) for s, t in lengths]
    assert len(list(best_fit(pairs, (256, 256), 1))) <= 1.12 * lengths.sum(axis=0).max() / 256


def test_packing_shuffles():
    pairs = [(np.zeros(0, np.int32), np.full(10, number, np.int32)) for number in range(200)]
    for rows in (one_per_row(pairs, 1), best_fit(pairs, (20,), 1)):
        order = [int(labels[0]) for row in rows for _, labels in row]
        assert sorted(order) == list(range(200)) and abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.2


@settings(deadline=None, max_examples=100)
@given(source=st.integers(1, 60), target=st.integers(0, 100), capacity=st.tuples(st.integers(4, 20), st.integers(1, 9)))
def test_cut_pairs_keep_every_target_token_once_in_order(source, target, capacity):
    ids, labels = np.arange(100, 100 + source), np.arange(1000, 1000 + target)
    pairs = cut_pairs(ids, labels, 2, *capacity)
    assert np.concatenate([label for _, label in pairs]).tolist() == [*labels.tolist(), 2]
    assert all(0 < len(one) <= capacity[0] and 0 < len(label) <= capacity[1] for one, label in pairs)
    for _, label in pairs[:-1]:
        assert len(label) == capacity[1]
    for (one, label), (_, before) in zip(pairs[1:], pairs[:-1], strict=True):
        assert (one[-1] == before[-1] and label[0] == before[-1] + 1) or label[0] == 2


@settings(deadline=None, max_examples=100)
@given(source=st.integers(0, 60), target=st.integers(0, 100), capacity=st.integers(2, 20), keep_head=st.booleans())
def test_cut_sequence_fills_all_pieces_but_the_last_and_leaves_labels_their_share(source, target, capacity, keep_head):
    ids, labels = text(0, source, target)
    pairs = cut_sequence(ids, labels, EOS, capacity, keep_head)
    assert np.concatenate([label for _, label in pairs]).tolist() == [*labels.tolist(), EOS]
    for one, label in pairs[:-1]:
        assert len(one) + len(label) == capacity
    assert all(len(label) > 0 and len(one) + len(label) <= capacity for one, label in pairs)
    for (one, _), (_, before) in zip(pairs[1:], pairs[:-1], strict=True):
        assert one.tolist() == [before[-1]]
    first = pairs[0][0]
    if len(first) < source:
        # What the labels leave is used up, and half of the row is theirs where they want it.
        assert len(first) + min(target + 1, capacity - capacity // 2) == capacity
        assert first.tolist() == fit_source(ids, len(first), keep_head).tolist()


def test_a_long_source_keeps_head_and_tail():
    assert fit_source(np.arange(10), 8).tolist() == [0, 1, 4, 5, 6, 7, 8, 9]
    assert fit_source(np.arange(10), 8, keep_head=False).tolist() == list(range(2, 10))
    assert fit_source(np.arange(8), 8).tolist() == list(range(8))


def test_a_long_prompt_takes_what_labels_leave_and_at_most_half_of_what_they_want():
    assert len(fit_prompt(np.arange(100), 3, 16)) == 13
    assert len(fit_prompt(np.arange(100), 50, 16)) == 8
    assert len(fit_prompt(np.arange(5), 50, 16)) == 5
    assert len(fit_prompt(np.arange(100), 1, 2)) == len(fit_prompt(np.arange(100), 9, 2)) == 1
