"""Which ranks hang, by their signs of life; and how many replicas fit on nodes."""

import pytest

from cluster.nodes import replicas_that_fit
from cluster.placement import RankResources
from configs.errors import ConfigError
from configs.load import parse_config
from configs.schema import ParallelismSection
from jobs.progress import Beat, HangWatch, Progress
from tests.test_end_to_end import TINY


def watch_of(ranks=2, floor=4.0):
    return HangWatch(ranks, floor_seconds=floor, first_seconds=100.0, data_seconds=50.0, storage_seconds=90.0)


def hear(watch, at, *beats):
    for rank, (count, doing) in enumerate(beats):
        progress = Progress()
        for _ in range(count):
            progress.beat(doing, count)
        watch.heard(rank, progress.latest, at)


def test_a_rank_that_falls_silent_is_named_and_the_ones_that_wait_for_it_are_not():
    watch = watch_of()
    watch.step_took(0.1)
    hear(watch, 1.0, (5, "step"), (4, "step"))
    assert watch.hung(4.9) == []
    hear(watch, 4.0, (5, "step"), (4, "step"))
    assert watch.hung(5.1) == [1], "an old sign of life was taken for a new one"
    hear(watch, 7.0, (5, "step"))
    assert watch.hung(7.1) == [1] and watch.hung(9.5) == [0, 1]
    hear(watch, 9.0, (5, "step"))
    assert watch.hung(9.1) == [1], "the one that does not answer is the one that hangs"
    hear(watch, 9.2, (6, "step"), (5, "step"))
    assert watch.hung(13.0) == []


def test_ranks_that_start_are_not_watched_and_the_first_step_may_take_long():
    watch = watch_of()
    assert watch.hung(1000.0) == [] and not watch.all_train
    watch.heard(0, Progress().latest, 1.0)
    hear(watch, 1.0, (3, "step"))
    assert watch.hung(1000.0) == []
    hear(watch, 2.0, (3, "step"), (1, "step"))
    assert watch.all_train and watch.hung(90.0) == [] and watch.hung(103.0) == [0, 1]


def test_the_deadline_follows_the_steps_and_what_waits_for_storage():
    watch = watch_of()
    watch.step_took(0.2)
    assert watch.deadline_seconds() == 4.0
    watch.step_took(3.0)
    assert watch.deadline_seconds() == 30.0
    hear(watch, 1.0, (3, "step"), (3, "data"))
    assert watch.deadline_seconds() == 80.0
    hear(watch, 1.0, (3, "storage"), (3, "data"))
    assert watch.deadline_seconds() == 120.0
    for _ in range(60):
        watch.step_took(1.0)
    hear(watch, 1.0, (3, "step"), (3, "step"))
    assert watch.deadline_seconds() == 10.0


def test_replicas_fit_whole_on_a_node():
    one = RankResources(cpus=2, gpus=0)
    free = {"a": {"CPU": 7.0}, "b": {"CPU": 4.0, "GPU": 2.0}, "c": {"memory": 1.0}, "d": {"CPU": 64.0}}
    assert replicas_that_fit(one, ParallelismSection(tensor=1), free, {"a", "b", "c"}) == 5
    assert replicas_that_fit(one, ParallelismSection(tensor=2), free, {"a", "b", "c"}) == 2
    assert replicas_that_fit(one, ParallelismSection(tensor=3), free, {"a", "b", "c"}) == 1
    # Stages stand on several nodes, the tensor ranks of one do not.
    assert replicas_that_fit(one, ParallelismSection(pipeline=2), free, {"a", "b", "c"}) == 2
    assert replicas_that_fit(one, ParallelismSection(pipeline=2, tensor=2), free, {"a", "b", "c"}) == 1
    assert replicas_that_fit(RankResources(1, 1), ParallelismSection(tensor=1), free, {"a", "b", "c", "gone"}) == 2
    assert replicas_that_fit(one, ParallelismSection(tensor=1), {"a": {"CPU": 1.9999999}}, {"a"}) == 1


@pytest.mark.parametrize(
    ("elastic", "field"),
    [
        ({"min_replicas": 3}, "elastic.min_replicas"),
        ({"max_replicas": 1}, "elastic.max_replicas"),
        ({"max_replicas": 5}, "elastic.max_replicas: 5 replicas share 4 micro-batches"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(elastic, field):
    with pytest.raises(ConfigError, match=field):
        parse_config({**TINY, "elastic": elastic}, "test")


def test_a_run_has_a_fixed_size_unless_told_otherwise():
    fixed, elastic = parse_config(TINY, "test"), parse_config({**TINY, "elastic": {"max_replicas": 4}}, "test")
    assert (fixed.min_replicas, fixed.max_replicas) == (2, 2)
    assert (elastic.min_replicas, elastic.max_replicas) == (2, 4)


def test_the_rank_that_waits_longest_for_data_is_the_slowest():
    watch = watch_of(3)
    hear(watch, 1.0, (5, "step"))
    assert watch.slowest() is None, "not all have begun"
    for rank, wait in enumerate((0.1, 0.7, 0.2)):
        watch.heard(rank, Beat(7, "step", 3, wait), 2.0)
    assert watch.slowest() == (1, 0.7)
    alone = watch_of(1)
    alone.heard(0, Beat(7, "step", 3, 0.5), 1.0)
    assert alone.slowest() is None


def test_only_waiting_for_data_counts(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("jobs.progress.time.monotonic", lambda: now[0])
    progress = Progress()
    for step in range(200):
        for doing, seconds in (("data", 0.5), ("step", 3.0), ("storage", 20.0)):
            progress.beat(doing, step)
            now[0] += seconds
    assert abs(progress.latest.data_wait_seconds - 0.5) < 1e-6
