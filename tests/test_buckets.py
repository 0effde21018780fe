"""Length buckets: a keyed permutation of each window whose micro-batches hold samples of like length."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.buckets import arrange

WINDOWS = st.tuples(st.integers(1, 12), st.integers(1, 8)).flatmap(
    lambda shape: st.tuples(
        st.lists(
            st.tuples(st.integers(0, 20), st.integers(1, 20)),
            min_size=shape[0] * shape[1],
            max_size=shape[0] * shape[1],
        ),
        st.just(shape[1]),
    )
)


def arranged(lengths, seed, window, micro):
    source, target = np.array(lengths).T
    return arrange(source, target, seed, window, micro)


@settings(deadline=None, max_examples=150)
@given(case=WINDOWS, seed=st.integers(0, 2**63 - 1), window=st.integers(0, 2**40))
def test_an_arrangement_is_a_permutation_that_depends_on_its_arguments_alone(case, seed, window):
    lengths, micro = case
    found = arranged(lengths, seed, window, micro)
    assert found.dtype == np.int64 and sorted(found.tolist()) == list(range(len(lengths)))
    assert np.array_equal(found, arranged(lengths, seed, window, micro))


@settings(deadline=None, max_examples=100)
@given(case=WINDOWS, seed=st.integers(0, 2**63 - 1))
def test_micro_batches_are_runs_of_the_sorted_lengths(case, seed):
    lengths, micro = case
    # One length (layout sequence): a plain sort.
    targets = np.array([target for _, target in lengths])
    found = targets[arrange(np.zeros_like(targets), targets, seed, 3, micro)].reshape(-1, micro)
    runs = sorted(sorted(batch) for batch in found.tolist())
    assert list(chain.from_iterable(runs)) == sorted(targets.tolist())
    # Two lengths: strips of whole micro-batches by target, each sorted by source. Targets are made to differ, for
    # which of several equal ones comes into which strip is left to the hash.
    lengths = [(source, target * 1000 + number) for number, (source, target) in enumerate(lengths)]
    found = arranged(lengths, seed, 3, micro).reshape(-1, micro)
    batches = len(found)
    strips = max(1, round(batches**0.5))
    by_target = sorted(range(len(lengths)), key=lambda i: lengths[i][1])
    expected = []
    for strip in range(strips):
        low, high = (-(-number * batches // strips) * micro for number in (strip, strip + 1))
        by_source = sorted(by_target[low:high], key=lambda i: lengths[i])
        expected += [sorted(by_source[start : start + micro]) for start in range(0, high - low, micro)]
    assert sorted(sorted(batch) for batch in found.tolist()) == sorted(expected)


def test_ties_batches_and_windows_are_shuffled():
    one, other = (arrange(np.full(512, 7), np.full(512, 9), 1, window, 8) for window in (0, 1))
    assert not np.array_equal(one, other) and not np.array_equal(
        one, arrange(np.full(512, 7), np.full(512, 9), 2, 0, 8)
    )
    assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.15
    lengths = np.arange(512)
    batches = arrange(np.zeros(512, int), lengths, 1, 0, 8)
    assert not np.array_equal(batches, np.arange(512))
    mean = batches.reshape(-1, 8).mean(axis=1)
    assert abs(np.corrcoef(mean[:-1], mean[1:])[0, 1]) < 0.4, "short and long micro-batches must follow each other"
    # Every global batch of 8 micro-batches holds lengths from all over the window.
    assert (np.ptp(mean.reshape(-1, 8), axis=1) > 200).all()


def test_a_window_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="a window of 10 samples does not divide into micro-batches of 4"):
        arrange(np.ones(10, int), np.ones(10, int), 0, 0, 4)


def padded_tokens(source, target, micro):
    """Positions of all micro-batches when each is padded to its longest row, rounded up to a multiple of 8."""
    return sum(
        -(-int(side[start : start + micro].max()) // 8) * 8 * micro
        for side in (source, target)
        for start in range(0, len(side), micro)
    )


@pytest.mark.parametrize(("correlation", "most"), [(0.0, 0.55), (0.9, 0.5)])
def test_buckets_halve_the_padding_of_lognormal_lengths(correlation, most):
    generator = np.random.default_rng(0)
    normal = generator.normal(size=(2, 4096))
    normal[1] = correlation * normal[0] + (1 - correlation**2) ** 0.5 * normal[1]
    source, target = np.clip(np.exp(4 + 0.8 * normal).astype(int), 1, 512)
    micro, window = 16, 1024
    found = np.concatenate(
        [
            at + arrange(source[at : at + window], target[at : at + window], 5, at, micro)
            for at in range(0, 4096, window)
        ]
    )
    assert padded_tokens(source[found], target[found], micro) < most * padded_tokens(source, target, micro)
