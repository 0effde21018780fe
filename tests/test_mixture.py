"""The mixture: exact quotas in every aligned superblock, weights that change, and what a resumed run may change."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import commit
from cluster.storage import Storage
from configs.errors import ConfigError
from configs.load import parse_config
from data.mixture import make_order, make_schedule
from data.order import Order
from data.schedule import Schedule, Segment, quotas
from jobs.commands.resuming import check_resumable, check_weight_changes
from jobs.commands.runs import RunPlace
from tests.test_commit import write_ranks

SEEDS = st.integers(0, 2**63 - 1)


@st.composite
def schedules(draw):
    """(lanes, schedule of 2 to 4 segments for 3 corpora), changes wanted at positions of any kind, zero weights too."""
    lanes = draw(st.integers(1, 8))
    some = st.tuples(*[st.sampled_from([1.0, 2.0, 5.0])] * 3)
    other = st.tuples(*[st.sampled_from([0.0, 0.0, 1.0, 3.0, 7.0])] * 3).filter(any)
    schedule, position = Schedule.constant(draw(some)), 0
    for _ in range(draw(st.integers(1, 3))):
        position += draw(st.integers(1, 600))
        schedule = schedule.changed(position, draw(other), lanes)
    return lanes, schedule


def superblocks(schedule, lanes, until):
    """(first position, length, quotas) of each superblock below `until`, by walking the schedule."""
    for segment, following in zip(schedule.segments, (*schedule.segments[1:], Segment(until, ())), strict=True):
        counts, first = quotas(segment.weights), segment.first
        while first < following.first:
            yield first, lanes * sum(counts), counts
            first += lanes * sum(counts)


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


@settings(deadline=None, max_examples=60)
@given(laned=schedules(), seed=SEEDS, data=st.data())
def test_across_changes_superblocks_are_exact_and_every_row_stands_once_in_an_epoch(laned, seed, data):
    lanes, schedule = laned
    rows = data.draw(st.lists(st.integers(1, 150), min_size=3, max_size=3))
    order = Order(rows, schedule, seed, lanes, 4, 3)
    until = schedule.segments[-1].first + 900
    blocks = list(superblocks(schedule, lanes, until))
    end = blocks[-1][0] + blocks[-1][1]
    corpus, epoch, row = order(np.arange(end))
    for first, length, counts in blocks:
        found = np.bincount(corpus[first : first + length], minlength=3)
        assert found.tolist() == [lanes * count for count in counts]
    for number, size in enumerate(rows):
        drawn = np.sort((epoch * size + row)[corpus == number])
        full = len(drawn) // size * size
        # Whole epochs hold every row once; what is begun holds none twice and no epoch but the last is open.
        assert np.array_equal(drawn[:full], np.arange(full)) and len(np.unique(drawn)) == len(drawn)
        assert full == len(drawn) or drawn[-1] < full + size
    some = np.array(data.draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=40)))
    for part, whole in zip(order(some), (corpus, epoch, row), strict=True):
        assert np.array_equal(part, whole[some])


@settings(deadline=None, max_examples=40)
@given(laned=schedules(), seed=SEEDS, position=st.integers(0, 3000))
def test_a_change_leaves_everything_before_it_as_it_was(laned, seed, position):
    lanes, schedule = laned
    changed = schedule.changed(position, (1, 0, 4), lanes)
    assert changed.before(position) == schedule.before(position) if position else len(changed.segments) >= 1
    rows = [333, 50, 1000]
    for one, other in zip(
        Order(rows, schedule, seed, lanes, 4, 2)(np.arange(position)),
        Order(rows, changed, seed, lanes, 4, 2)(np.arange(position)),
        strict=True,
    ):
        assert np.array_equal(one, other)


def test_a_change_begins_at_the_next_whole_superblock_of_the_weights_before_it():
    schedule = Schedule.constant([3, 1])
    assert schedule.changed(9, [1, 1], 2).segments == (Segment(0, (3.0, 1.0)), Segment(16, (1.0, 1.0)))
    assert schedule.changed(16, [1, 1], 2).segments[1].first == 16
    twice = schedule.changed(9, [1, 1], 2).changed(17, [0, 5], 2)
    assert [segment.first for segment in twice.segments] == [0, 16, 20]
    # One that begins where its follower does has no positions of its own.
    assert schedule.changed(9, [1, 1], 2).changed(12, [0, 5], 2).segments[1:] == (Segment(16, (0.0, 5.0)),)
    assert schedule.changed(0, [0, 5], 2) == Schedule.constant([0, 5])


def test_the_same_weights_again_change_nothing():
    schedule = Schedule.constant([3, 1])
    again = schedule.changed(1000, [6, 2], 4)
    assert len(again.segments) == 2
    for one, other in zip(
        Order([500, 77], schedule, 8, 4, 8, 2)(np.arange(4000)),
        Order([500, 77], again, 8, 4, 8, 2)(np.arange(4000)),
        strict=True,
    ):
        assert np.array_equal(one, other)


def test_a_weight_of_zero_ends_a_corpus_and_it_goes_on_where_it_was():
    schedule = Schedule.constant([1, 1]).changed(200, [1, 0], 2).changed(600, [1, 1], 2)
    corpus, epoch, row = Order([10_000, 1000], schedule, 3, 2, 8, 4)(np.arange(2400))
    first, second = schedule.segments[1].first, schedule.segments[2].first
    assert (corpus[first:second] == 0).all() and (corpus[:first] == 1).any() and (corpus[second:] == 1).any()
    drawn = row[corpus == 1]
    assert len(drawn) == 1000 and np.array_equal(np.sort(drawn), np.arange(1000)) and (epoch[corpus == 1] == 0).all()


def test_quotas_are_exact_where_they_can_be_and_near_elsewhere():
    assert quotas([3, 1, 1]) == [3, 1, 1]
    assert quotas([0.5, 0.25, 0.25]) == [2, 1, 1]
    assert quotas([0.7, 0.29, 0.01]) == [70, 29, 1]
    assert quotas([0.0, 2.0, 0.0, 1.0]) == [0, 2, 0, 1]
    assert quotas([4095, 1]) == [4095, 1]
    weights = [np.pi, np.e, 1.0]
    found = np.array(quotas(weights))
    assert found.sum() == 4096
    assert np.abs(found / 4096 - np.array(weights) / sum(weights)).max() < 1 / 4096


@pytest.mark.parametrize("weights", [[0, 0], [1, -1], [1, float("nan")], [float("inf"), 1]])
def test_weights_that_are_no_shares_are_refused(weights):
    with pytest.raises(ValueError, match="finite numbers of 0 or more"):
        quotas(weights)


def test_a_weight_without_a_slot_is_refused_with_the_fix():
    with pytest.raises(ValueError, match=r"weight 1e-05 of corpus 1 .* raise it to"):
        quotas([1.0, 1e-5])
    with pytest.raises(ValueError, match=r"weight 1e-05 of corpus 2 .* raise it to"):
        quotas([1.0, 0.0, 1e-5])


def test_batches_of_the_smoke_size_keep_close_to_the_mixture():
    corpus, _, _ = Order([9091, 2341, 1651], [3, 1, 1], 17, 8, 64, 8)(np.arange(3200))
    for batch in corpus.reshape(-1, 32):
        counts = np.bincount(batch, minlength=3)
        assert np.abs(counts - np.array([19.2, 6.4, 6.4])).max() <= 4


def test_a_schedule_is_a_small_json_value():
    schedule = Schedule.constant([0.7, 0.2, 0.05, 0.04, 0.01])
    for number in range(12):
        schedule = schedule.changed(10**11 * (number + 1), [0.6, 0.3, 0.05, 0.04, 0.01 * (number % 2)], 64)
    text = json.dumps(schedule.as_list())
    assert len(text) < 1000 and len(schedule.segments) == 13
    assert Schedule.from_list(json.loads(text)) == schedule


def test_a_schedule_that_changes_inside_a_superblock_is_refused():
    with pytest.raises(ValueError, match="position 7, which is no whole number of superblocks of 8"):
        Order([10, 10], Schedule((Segment(0, (3, 1)), Segment(7, (1, 1)))), 0, 2, 4, 2)
    with pytest.raises(ValueError, match="begins at position 0"):
        Order([10, 10], Schedule((Segment(8, (3, 1)),)), 0, 2, 4, 2)


def config_of(changes=(), **corpora):
    tree = {
        "run": {"seed": 4},
        "data": {
            "corpora": [
                {"name": name, "kind": "text", "path": name, "target": "{text}", "continuation": True, "weight": weight}
                for name, weight in (corpora or {"prose": 3.0, "code": 1.0}).items()
            ],
            "lanes": 2,
            "block_rows": 4,
            "window_blocks": 2,
            "weight_changes": list(changes),
        },
        "train": {"steps": 5, "global_batch_sequences": 12, "micro_batch_sequences": 2},
    }
    return parse_config(tree, "test")


def manifest_of(config, rows=100):
    """What make_order needs of a manifest: names, weights and rows."""
    return SimpleNamespace(
        corpora=[SimpleNamespace(name=corpus.name, weight=corpus.weight, rows=rows) for corpus in config.data.corpora]
    )


def change(step, **weights):
    return {"from_step": step, "weights": weights}


def test_make_order_takes_weights_and_changes_from_the_configuration():
    config = config_of([change(2, code=0), change(7, prose=1, code=2)])
    order = make_order(manifest_of(config), config)
    assert order.schedule == make_schedule(manifest_of(config), config)
    # 24 samples are 3 superblocks of 8; from there one corpus has superblocks of 2; 84 is a whole number of them.
    assert order.schedule.as_list() == [[0, [3.0, 1.0]], [24, [3.0, 0.0]], [84, [1.0, 2.0]]]
    plain = Order([100, 100], order.schedule, 4, 2, 4, 2)
    for part, reference in zip(order(np.arange(300)), plain(np.arange(300)), strict=True):
        assert np.array_equal(part, reference)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ([change(5, prose=1), change(5, code=1)], "weight_changes.1.from_step: 5 must be above 5"),
        ([change(5, prose=1), change(3, code=1)], "weight_changes.1.from_step: 3 must be above 5"),
        ([change(5, verse=1)], "weight_changes.0.weights: no corpus 'verse'; corpora are prose, code"),
        ([change(5, code=-1)], "data.weight_changes.0.weights: -1.0 of 'code'"),
        ([change(5)], "data.weight_changes.0.weights"),
    ],
)
def test_a_wrong_change_is_refused_when_the_configuration_is_read(changes, part):
    with pytest.raises(ConfigError) as error:
        config_of(changes)
    assert part in str(error.value)


def test_a_change_that_has_no_quotas_is_named():
    config = config_of([change(1, code=2), change(2, code=1e-6)])
    with pytest.raises(
        ConfigError, match=r"data\.weight_changes\[1\]\.weights: weight 1e-06 of corpus 1 .*prose, code"
    ):
        make_order(manifest_of(config), config)
    config = config_of([change(1, code=0, prose=0)])
    with pytest.raises(ConfigError, match=r"data\.weight_changes\[0\]\.weights: .* one of them above 0"):
        make_order(manifest_of(config), config)
    config = config_of(prose=1.0, code=1e-6)
    with pytest.raises(ConfigError, match=r"data\.corpora\.weight: weight 1e-06"):
        make_order(manifest_of(config), config)
    config = config_of([change(1, code=2)])
    with pytest.raises(ConfigError, match=r"data\.weight_changes\[0\]\.weights: no corpus 'code'; corpora are prose"):
        make_order(SimpleNamespace(corpora=manifest_of(config).corpora[:1]), config)


OLD = [change(10, code=2), change(20, code=3), change(30, code=4)]


@pytest.mark.parametrize(
    ("new", "committed"),
    [
        (OLD, 25),
        ([*OLD, change(40, code=0)], 25),
        ([*OLD[:2], change(25, code=0)], 25),
        (OLD[:2], 25),
        ([*OLD[:2], change(26, prose=9), change(31, code=1)], 25),
        ([change(1, code=7)], 0),
        ([], 10),
    ],
)
def test_a_resumed_run_may_change_weights_to_come(new, committed):
    check_weight_changes(config_of(OLD), config_of(new), committed)


@pytest.mark.parametrize(
    ("new", "committed", "number"),
    [
        ([change(10, code=9), *OLD[1:]], 25, 0),
        ([OLD[0], change(21, code=3), OLD[2]], 25, 1),
        ([OLD[0], change(15, code=3), OLD[1]], 25, 1),
        ([*OLD[:2], change(24, code=3)], 25, 2),
        (OLD[:1], 25, 1),
        ([], 11, 0),
    ],
)
def test_a_resumed_run_cannot_change_weights_of_steps_that_are_committed(new, committed, number):
    with pytest.raises(ConfigError, match=rf"data\.weight_changes\[{number}\]: .*steps up to {committed} are trained"):
        check_weight_changes(config_of(OLD), config_of(new), committed)


def test_the_latest_commit_decides_what_is_past(tmp_path):
    place = RunPlace(Storage(str(tmp_path)), "mine")
    old, new = config_of(), config_of([change(4, code=2)])
    check_resumable(old, new, place)
    checkpoints = place.storage.child("mine", "checkpoints")
    assert commit.latest(checkpoints)[0] is None
    commit.commit(checkpoints, 4, 1, write_ranks(checkpoints, 4, 1), 2, {})
    check_resumable(old, new, place)
    commit.commit(checkpoints, 5, 1, write_ranks(checkpoints, 5, 1), 2, {})
    with pytest.raises(ConfigError, match=r"data\.weight_changes\[0\]: steps up to 5 .* from_step: 5 or later"):
        check_resumable(old, new, place)
    other = parse_config({**json.loads(old.model_dump_json()), "run": {"seed": 5}}, "test")
    with pytest.raises(ConfigError, match=r"run\.seed: cannot change"):
        check_resumable(old, other, place)
