"""The order of samples: exactly once, exact mixture, random access, and no pattern."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import Order, keyed_hash, permute, quotas

SEEDS = st.integers(0, 2**63 - 1)
SHAPES = {"lanes": st.integers(1, 9), "block_rows": st.integers(1, 16), "window_blocks": st.integers(1, 5)}


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 3000), seed=SEEDS)
def test_permute_is_a_bijection(size, seed):
    assert np.array_equal(np.sort(permute(np.arange(size), size, keyed_hash(seed))), np.arange(size))


@settings(deadline=None, max_examples=30)
@given(size=st.integers(2**32, 2**62), seed=SEEDS, start=st.integers(0, 2**32 - 300))
def test_permute_of_huge_domains_stays_inside_and_never_collides(size, seed, start):
    images = permute(np.arange(start, start + 257), size, keyed_hash(seed))
    assert images.min() >= 0 and images.max() < size and len(set(images.tolist())) == 257


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.integers(1, 400), min_size=1, max_size=3), seed=SEEDS, **SHAPES)
def test_every_row_stands_once_in_every_epoch(rows, seed, lanes, block_rows, window_blocks):
    order = Order(rows, [1.0] * len(rows), seed, lanes, block_rows, window_blocks)
    positions = np.arange(order.superblock * (3 * max(rows) * len(rows) // order.superblock + 2))
    corpus, epoch, row = order(positions)
    for number, size in enumerate(rows):
        for turn in range(2):
            seen = row[(corpus == number) & (epoch == turn)]
            assert np.array_equal(np.sort(seen), np.arange(size))


def test_epochs_have_different_orders():
    _, epoch, row = Order([100], [1.0], 5, 2, 8, 2)(np.arange(200))
    assert not np.array_equal(row[epoch == 0], row[epoch == 1])


@settings(deadline=None, max_examples=40)
@given(
    weights=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=4),
    seed=SEEDS,
    lanes=st.integers(1, 8),
    number=st.integers(0, 10**9),
)
def test_mixture_is_exact_in_every_aligned_superblock(weights, seed, lanes, number):
    order = Order([97] * len(weights), weights, seed, lanes, 4, 2)
    corpus, _, _ = order(np.arange(number * order.superblock, (number + 1) * order.superblock))
    counts = np.bincount(corpus, minlength=len(weights))
    assert counts.tolist() == [quota * lanes for quota in quotas(weights)]


def test_quotas_are_exact_where_they_can_be_and_near_elsewhere():
    assert quotas([3, 1, 1]) == [3, 1, 1]
    assert quotas([0.5, 0.25, 0.25]) == [2, 1, 1]
    weights = [np.pi, np.e, 1.0]
    found = np.array(quotas(weights))
    assert found.sum() == 4096
    assert np.abs(found / 4096 - np.array(weights) / sum(weights)).max() < 1 / 4096


def test_batches_of_the_smoke_size_keep_close_to_the_mixture():
    corpus, _, _ = Order([9091, 2341, 1651], [3, 1, 1], 17, 8, 64, 8)(np.arange(3200))
    for batch in corpus.reshape(-1, 32):
        counts = np.bincount(batch, minlength=3)
        assert np.abs(counts - np.array([19.2, 6.4, 6.4])).max() <= 4


def test_a_weight_without_a_slot_is_refused_with_the_fix():
    with pytest.raises(ValueError, match=r"weight 1e-05 of corpus 1 .* raise it to"):
        quotas([1.0, 1e-5])
    with pytest.raises(ValueError, match="at least one row"):
        Order([10, 0], [1, 1], 0, 1, 1, 1)


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, data=st.data(), **SHAPES)
def test_random_access_equals_sequential(seed, data, lanes, block_rows, window_blocks):
    order = Order([301, 40, 7], [0.7, 0.2, 0.1], seed, lanes, block_rows, window_blocks)
    whole = order(np.arange(2000))
    some = np.array(data.draw(st.lists(st.integers(0, 1999), min_size=1, max_size=50)))
    for part, reference in zip(order(some), whole, strict=True):
        assert np.array_equal(part, reference[some])


def test_neighbours_are_uncorrelated_and_a_weak_shuffle_is_caught():
    rows, first = 1_000_000, 200_000
    _, _, row = Order([rows], [1.0], 11, 64, 64, 8)(np.arange(first))
    assert abs(np.corrcoef(row[:-1], row[1:])[0, 1]) < 0.01
    # The same measure on blocks that are shuffled while rows inside stay in order.
    blocks = np.random.default_rng(0).permutation(rows // 64)[:, None] * 64 + np.arange(64)
    weak = blocks.ravel()[:first]
    assert abs(np.corrcoef(weak[:-1], weak[1:])[0, 1]) > 0.5


def test_reads_stay_within_lanes_times_window_blocks():
    order = Order([64 * 8 * 40], [1.0], 3, 8, 64, 4)
    _, _, row = order(np.arange(8 * 4 * 64))
    assert len(set((row // 64).tolist())) == 8 * 4


def test_order_does_not_change():
    """Runs resume with this order: changing it silently would repeat and lose samples."""
    corpus, epoch, row = Order([1000, 300], [2, 1], 42, 4, 16, 2)(np.array([0, 1, 2, 3, 999, 5000]))
    assert corpus.tolist() == [0, 0, 1, 0, 0, 0]
    assert epoch.tolist() == [0, 0, 0, 0, 0, 3]
    assert row.tolist() == [573, 634, 170, 206, 712, 789]
