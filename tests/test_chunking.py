"""Dense rows: the stream of texts cut every S tokens, whatever the lengths."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.packing
from data.chunking import chunk, row_tokens


def texts_of(sizes):
    first = 0
    for source, labels in sizes:
        both = np.arange(first, first + source + labels, dtype=np.int32)
        yield both[:source], both[source:]
        first += source + labels


def by_hand(sizes, capacity):
    """Rows as lists of (token, is label, is context), made one token at a time."""
    rows = [[]]
    for source, labels in texts_of(sizes):
        both = [*source.tolist(), *labels.tolist()]
        for at, token in enumerate(both):
            if len(rows[-1]) == capacity:
                rows.append([])
            if not rows[-1] and at:
                rows[-1].append((both[at - 1], False, True))
            rows[-1].append((token, at >= len(source), False))
    return [row for row in rows if row]


SIZES = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), max_size=30)


@settings(deadline=None, max_examples=150)
@given(sizes=SIZES, capacity=st.integers(2, 12), seed=st.integers(0, 99))
def test_rows_are_the_stream_cut_every_capacity_tokens(sizes, capacity, seed):
    counts = Counter()
    rows = list(chunk(texts_of(sizes), capacity, seed, counts))
    assert all(row_tokens(row) == capacity for row in rows[:-1])
    found = sorted([token for pair in row for part in pair for token in part.tolist()] for row in rows)
    expected = by_hand(sizes, capacity)
    assert found == sorted([token for token, _, _ in row] for row in expected)
    labels = sorted(token for row in rows for _, part in row for token in part.tolist())
    assert labels == [token for row in expected for token, is_label, _ in row if is_label]
    assert counts["cut"] == sum(
        len({n for n, row in enumerate(expected) if any(t in span and not c for t, _, c in row)}) > 1
        for span in spans(sizes)
    )


def spans(sizes):
    first = 0
    for source, labels in sizes:
        yield range(first, first + source + labels)
        first += source + labels


@settings(deadline=None, max_examples=100)
@given(sizes=SIZES, capacity=st.integers(2, 12))
def test_a_piece_that_goes_on_begins_with_the_token_before_and_texts_stay_apart(sizes, capacity):
    starts = {span.start for span in spans(sizes)}
    owner = {token: number for number, span in enumerate(spans(sizes)) for token in span}
    labels_begin = {span.start + source for span, (source, _) in zip(spans(sizes), sizes, strict=True)}
    new = []
    for row in chunk(texts_of(sizes), capacity, 0, Counter()):
        for number, (source, labels) in enumerate(row):
            tokens = [*source.tolist(), *labels.tolist()]
            assert tokens == list(range(tokens[0], tokens[0] + len(tokens))) and len({owner[t] for t in tokens}) == 1
            goes_on = tokens[0] not in starts or (number == 0 and tokens[0] in new)
            assert not goes_on or number == 0, "only a row's first pair goes on from another row"
            if goes_on and labels.size and labels[0] not in labels_begin:
                assert source.tolist() == [labels[0] - 1]
            new += tokens[goes_on:]


def test_rows_are_shuffled_within_windows_and_the_short_one_is_last(monkeypatch):
    monkeypatch.setattr(data.packing, "WINDOW_PAIRS", 50)
    rows = list(chunk(texts_of([(0, 1003)]), 11, 1, Counter()))
    assert len(rows) == 100 + 1 and row_tokens(rows[-1]) < 11
    first = [int(row[0][1][0]) for row in rows[:-1]]
    for window in (first[:50], first[50:100]):
        assert window != sorted(window)
    assert max(first[:50]) < min(first[50:])


@pytest.mark.parametrize("room", range(1, 8))
def test_a_cut_inside_a_source_keeps_its_rest_with_the_labels(room):
    texts = [(np.zeros(0, np.int32), np.full(10 - room, 9, np.int32)), (np.arange(5), np.arange(5, 9))]
    rows = list(chunk(iter(texts), 10, 0, Counter()))
    second = rows[0][1], rows[1][0]
    whole = min(room, 5), max(room - 5, 0)
    assert (len(second[0][0]), len(second[0][1])) == whole
    assert [part.tolist() for part in second[1]] == [
        list(range(room - 1, 5)) if room < 5 else [room - 1],
        list(range(max(5, room), 9)),
    ]
