"""The order of samples: exactly once, random access, any world size, reads in windows, no pattern, no memory."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import Order
from data.permutation import Permutations, keyed_hash, permute
from data.schedule import Schedule, quotas
from tests.order_reference import dealt, shuffled

SEEDS = st.integers(0, 2**63 - 1)
SHAPES = {"lanes": st.integers(1, 9), "block_rows": st.integers(1, 16), "window_blocks": st.integers(1, 9)}


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 3000), seed=SEEDS)
def test_permute_is_a_bijection(size, seed):
    assert np.array_equal(np.sort(permute(np.arange(size), size, keyed_hash(seed))), np.arange(size))


@settings(deadline=None, max_examples=30)
@given(size=st.integers(2**32, 2**62), seed=SEEDS, start=st.integers(0, 2**32 - 300))
def test_permute_of_huge_domains_stays_inside_and_never_collides(size, seed, start):
    images = permute(np.arange(start, start + 257), size, keyed_hash(seed))
    assert images.min() >= 0 and images.max() < size and len(set(images.tolist())) == 257


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=6), seed=SEEDS)
def test_a_family_permutes_as_its_members_do_alone(sizes, seed):
    keys = keyed_hash(seed, np.arange(len(sizes)))
    index = np.concatenate([np.arange(size) for size in sizes])
    which = np.repeat(np.arange(len(sizes)), sizes)
    alone = [permute(np.arange(size), size, key[None]) for size, key in zip(sizes, keys, strict=True)]
    assert np.array_equal(Permutations(np.array(sizes), keys)(index, which), np.concatenate(alone))
    assert np.array_equal(permute(index, np.array(sizes)[which], keys[which]), np.concatenate(alone))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_small_permutations_are_all_drawn_and_equally_often(size):
    number = 24_000
    keys = np.repeat(keyed_hash(7, np.arange(number)), size)
    images = permute(np.tile(np.arange(size), number), size, keys).reshape(number, size)
    _, counts = np.unique(images, axis=0, return_counts=True)
    possible = len(list(itertools.permutations(range(size))))
    expected = number / possible
    assert len(counts) == possible
    assert ((counts - expected) ** 2 / expected).sum() < possible + 5 * np.sqrt(2 * possible)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 3000) | st.integers(1, 2**14) | st.integers(1, 2**40), min_size=1, max_size=3),
    seed=SEEDS,
    data=st.data(),
    **SHAPES,
)
def test_the_order_is_what_the_docstrings_say(sizes, seed, data, lanes, block_rows, window_blocks):
    several = st.lists(st.integers(0, 5), min_size=len(sizes), max_size=len(sizes)).filter(any)
    schedule = Schedule.constant(data.draw(several)).changed(100, data.draw(several), lanes)
    schedule = schedule.changed(300, data.draw(several), lanes)
    segments = [(segment.first, quotas(segment.weights)) for segment in schedule.segments]
    # The reference walks windows one by one, so far ones are too far for it.
    far = 20_000 if max(sizes) > 2**14 else 10**7
    positions = data.draw(st.lists(st.integers(0, 700) | st.integers(0, far), min_size=1, max_size=30))
    order = Order(sizes, schedule, seed, lanes, block_rows, window_blocks)
    for position, corpus, epoch, row in zip(positions, *map(list, order(np.array(positions))), strict=True):
        expected, draw = dealt(position, segments, seed, lanes)
        shape = (seed, lanes, block_rows, window_blocks)
        assert (corpus, epoch, row) == (expected, *shuffled(expected, draw, sizes[expected], *shape))


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


@pytest.mark.parametrize("lanes", [1, 7, 64])
def test_every_row_stands_once_when_an_epoch_spans_many_chunks(lanes):
    rows = 100_003
    _, epoch, row = Order([rows], [1.0], 5, lanes, 64, 8)(np.arange(2 * rows))
    for turn in range(2):
        assert np.array_equal(np.sort(row[epoch == turn]), np.arange(rows))
    assert not np.array_equal(row[epoch == 0], row[epoch == 1])


def walk_windows(lane_blocks, window_blocks):
    """(first block, blocks) of each window of a lane's walk, by walking it."""
    first, size = 0, 1
    while first < lane_blocks:
        yield first, min(size, window_blocks, lane_blocks - first)
        first, size = first + min(size, window_blocks), 2 * size


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 2**40), seed=SEEDS, data=st.data(), **SHAPES)
def test_windows_anywhere_hold_whole_blocks_of_their_own(rows, seed, data, lanes, block_rows, window_blocks):
    """Up to 2^40 rows: the windows at three places of an epoch are disjoint unions of whole blocks, sized by a ramp."""
    order = Order([rows], [1.0], seed, lanes, block_rows, window_blocks)
    lane_blocks = rows // block_rows // lanes
    ramp = list(itertools.islice(walk_windows(lane_blocks, window_blocks), 40))
    epoch = data.draw(st.integers(0, 2**20))
    seen = []
    for _ in range(3 if ramp else 0):
        first, size = data.draw(st.sampled_from(ramp))
        lane = data.draw(st.integers(0, lanes - 1))
        if size == window_blocks:
            # Any later window too: from here on they all have this size.
            later = data.draw(st.integers(0, (lane_blocks - first) // window_blocks - 1))
            first += later * window_blocks
        if any(earlier[:2] == (lane, first) for earlier in seen):
            continue
        index = np.arange(first * block_rows, (first + size) * block_rows) * lanes + lane
        corpus, epochs, row = order(epoch * rows + index)
        assert (corpus == 0).all() and (epochs == epoch).all() and row.min() >= 0 and row.max() < rows
        blocks, counts = np.unique(row // block_rows, return_counts=True)
        assert len(blocks) == size and (counts == block_rows).all() and len(np.unique(row)) == len(row)
        seen.append((lane, first, set(blocks.tolist())))
    assert sum(len(blocks) for *_, blocks in seen) == len(set().union(*(blocks for *_, blocks in seen)))


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(2**20, 2**40), seed=SEEDS, data=st.data())
def test_samples_of_huge_epochs_never_collide(rows, seed, data):
    order = Order([rows, 2**40 - 3], [2, 1], seed, 64, 256, 8)
    start = data.draw(st.integers(0, rows // 2))
    stride = data.draw(st.integers(1, 97))
    corpus, epoch, row = order(start + stride * np.arange(3000))
    assert len(np.unique(np.stack([corpus, epoch, row]), axis=1).T) == 3000
    assert (row >= 0).all() and (row < np.array([rows, 2**40 - 3])[corpus]).all()


def test_the_end_of_a_huge_epoch_is_what_remains_of_it():
    rows, lanes, size = 2**40 + 12_345, 64, 256
    blocks = rows // size
    order = Order([rows], [1.0], 3, lanes, size, 8)
    whole = blocks // lanes * lanes * size
    _, epoch, row = order(np.arange(whole, rows))
    assert (epoch == 0).all() and len(np.unique(row)) == rows - whole
    assert set(range(blocks * size, rows)) <= set(row.tolist())
    _, counts = np.unique(row[row < blocks * size] // size, return_counts=True)
    assert (counts == size).all()


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, data=st.data(), **SHAPES)
def test_random_access_equals_sequential(seed, data, lanes, block_rows, window_blocks):
    order = Order([301, 40, 7], [0.7, 0.2, 0.1], seed, lanes, block_rows, window_blocks)
    whole = order(np.arange(2000))
    some = np.array(data.draw(st.lists(st.integers(0, 1999), min_size=1, max_size=50)))
    for part, reference in zip(order(some), whole, strict=True):
        assert np.array_equal(part, reference[some])


@pytest.mark.parametrize("rows", [[2**40], [60_000], [50_000, 9_000, 33], [10**9, 400] + [1000] * 70])
def test_slices_of_all_lengths_agree(rows):
    """The many ways inside (one key per window or per row, corpus by corpus or all at once) give one order."""
    order = Order(rows, [3.0, 1.0, *[0.5] * 70][: len(rows)], 11, 8, 64, 8)
    start, total = 45_000, 40_000
    whole = order(np.arange(start, start + total))
    for length in (1, 7, 300, 5000, 17_000):
        for first in (0, 123, total - length):
            for part, reference in zip(order(start + np.arange(first, first + length)), whole, strict=True):
                assert np.array_equal(part, reference[first : first + length])
    backwards = order(np.arange(start, start + total)[::-1])
    for part, reference in zip(backwards, whole, strict=True):
        assert np.array_equal(part[::-1], reference)


def global_batches(worlds, batch, micro, make):
    """Samples of the steps, one world size per step, each rank asking an order of its own for its micro-batches."""
    for step, ranks in enumerate(worlds):
        found = {}
        for rank in range(ranks):
            order = make()
            for number in range(rank, batch // micro, ranks):
                first = step * batch + number * micro
                found[number] = np.stack(order(np.arange(first, first + micro)))
        yield np.concatenate([found[number] for number in range(batch // micro)], axis=1)


def test_global_batches_are_the_same_at_every_world_size_and_through_resizes():
    def make():
        return Order([500, 120, 31], [5, 2, 1], 23, 8, 8, 4)

    steps, batch, micro = 60, 24, 2
    whole = np.stack(make()(np.arange(steps * batch))).reshape(3, steps, batch)
    worlds = {f"{ranks} ranks": [ranks] * 6 for ranks in range(1, 10)}
    worlds["4 to 3 to 8 ranks in the first epoch"] = [4] * 8 + [3] * 9 + [8] * (steps - 17)
    for name, sizes in worlds.items():
        for step, found in enumerate(global_batches(sizes, batch, micro, make)):
            assert np.array_equal(found, whole[:, step]), (name, step)


@pytest.mark.parametrize("lanes", [1, 8, 64])
@pytest.mark.parametrize("batch", [16, 32, 256])
def test_the_first_batch_needs_one_block_per_lane(lanes, batch):
    order = Order([10**7], [1.0], 3, lanes, 64, 512)
    _, _, row = order(np.arange(batch))
    assert len(set((row // 64).tolist())) <= max(lanes, 2 * batch // 64)


def test_the_first_batch_of_a_mixture_needs_one_block_per_lane_and_corpus():
    corpus, _, row = Order([10**6, 10**6, 10**6], [3, 1, 1], 3, 8, 64, 8)(np.arange(512))
    for number in range(3):
        assert len(set((row[corpus == number] // 64).tolist())) <= 8


def test_reads_stay_within_lanes_times_window_blocks():
    lanes, size, window = 8, 64, 4
    order = Order([64 * 8 * 40], [1.0], 3, lanes, size, window)
    # After windows of 1 and 2 blocks all have 4.
    positions = lanes * 3 * size + np.arange(lanes * window * size)
    assert len(set((order(positions)[2] // size).tolist())) == lanes * window


def lag_1(numbers):
    return np.corrcoef(numbers[:-1], numbers[1:])[0, 1]


def is_uncorrelated(numbers):
    return abs(lag_1(numbers)) < 0.01


def serial_pair_z(numbers, size, bins=32):
    """Standard scores by which counts of pairs (one number, the next) in a grid of bins exceed those of chance."""
    cells = numbers.astype(np.int64) * bins // size
    pairs = cells[:-1:2] * bins + cells[1::2]
    expected = len(pairs) / bins**2
    chi_square = ((np.bincount(pairs, minlength=bins**2) - expected) ** 2 / expected).sum()
    return (chi_square - (bins**2 - 1)) / np.sqrt(2 * (bins**2 - 1))


def seed_seq(seed, count):
    """std::seed_seq{seed}.generate of `count` (2 to 6) numbers, after [rand.util.seedseq] of the C++ standard."""

    def stirred(value):
        return (value ^ (value >> 27)) & 0xFFFFFFFF

    state, t = [0x8B8B8B8B] * count, (count - 1) // 2
    p, most = (count - t) // 2, max(2, count)
    q = p + t
    for k in range(most):
        r1 = 1664525 * stirred(state[k % count] ^ state[(k + p) % count] ^ state[(k - 1) % count]) & 0xFFFFFFFF
        r2 = r1 + (1 if k == 0 else k % count + (seed if k == 1 else 0)) & 0xFFFFFFFF
        state[(k + p) % count] = state[(k + p) % count] + r1 & 0xFFFFFFFF
        state[(k + q) % count] = state[(k + q) % count] + r2 & 0xFFFFFFFF
        state[k % count] = r2
    for k in range(most, most + count):
        total = state[k % count] + state[(k + p) % count] + state[(k - 1) % count] & 0xFFFFFFFF
        r3 = 1566083941 * stirred(total) & 0xFFFFFFFF
        r4 = r3 - k % count & 0xFFFFFFFF
        state[(k + p) % count] ^= r3
        state[(k + q) % count] ^= r4
        state[k % count] = r4
    return state


def grain_shuffle(size, seed, rounds=4):
    """What google/grain's index_shuffle does with 0 .. size - 1: Simon with few rounds (`.shuffle()` asks for 4).

    Written after grain/_src/python/experimental/index_shuffle/index_shuffle.cc.
    """
    bits = max(16, int(np.ceil(np.log2(size - 1))))
    word = (bits + bits % 2) // 2
    mask = (1 << word) - 1
    keys = [key & mask for key in seed_seq(seed, rounds)]

    def rotated(x, by):
        return (x << by | x >> (word - by)) & mask

    def mixed(x):
        return rotated(x, 1) & rotated(x, 8) ^ rotated(x, 2)

    value, todo = np.arange(size), np.arange(size)
    while todo.size:
        left, right = value[todo] >> word, value[todo] & mask
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            left = left ^ mixed(right) ^ first
            right = right ^ mixed(left) ^ second
        value[todo] = left << word | right
        todo = todo[value[todo] >= size]
    return value


def test_neighbours_are_uncorrelated_and_grains_shuffle_is_caught():
    rows = 1_000_000
    for seed, lanes in itertools.product((11, 12, 13), (8, 64)):
        assert is_uncorrelated(Order([rows], [1.0], seed, lanes, 64, 8)(np.arange(rows))[2])
    for seed in range(3):
        weak = grain_shuffle(rows, seed)
        assert np.array_equal(np.sort(weak), np.arange(rows))
        assert not is_uncorrelated(weak)


def test_pairs_of_neighbours_are_as_by_chance_and_grains_shuffle_is_caught():
    rows = 1_000_000
    for seed in range(3):
        assert abs(serial_pair_z(permute(np.arange(rows), rows, keyed_hash(seed)), rows)) < 5
        assert serial_pair_z(grain_shuffle(rows, seed), rows) > 100
    row = Order([rows], [1.0], 5, 8, 64, 8)(np.arange(rows))[2]
    assert abs(serial_pair_z(row % 64, 64)) < 5
    # One after the other in a lane.
    assert abs(serial_pair_z(row[: rows // 8 * 8].reshape(-1, 8).T.ravel() % 64, 64)) < 5
    assert abs(serial_pair_z(np.random.default_rng(0).permutation(rows), rows)) < 5


def test_start_up_and_planning_take_the_same_memory_at_any_number_of_rows():
    peaks = []
    for rows in (10**6, 10**6, 10**9, 2**40):
        tracemalloc.start()
        Order([rows, rows], [0.7, 0.3], 1, 8, 64, 8)(rows // 3 + np.arange(20_000))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks[1:]) < 1.1 * min(peaks[1:]) and max(peaks[1:]) < 8 * 2**20


def test_what_cannot_be_ordered_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        Order([10, 0], [1, 1], 0, 1, 1, 1)
    with pytest.raises(ValueError, match="each corpus needs a weight"):
        Order([10, 10], [1], 0, 1, 1, 1)


def test_order_does_not_change():
    """Runs resume with this order: changing it silently would repeat and lose samples."""
    corpus, epoch, row = Order([1000, 300], [2, 1], 42, 4, 16, 2)(np.array([0, 1, 2, 3, 999, 5000]))
    assert corpus.tolist() == [0, 0, 1, 0, 0, 0]
    assert epoch.tolist() == [0, 0, 0, 0, 0, 3]
    assert row.tolist() == [487, 465, 121, 810, 656, 207]
