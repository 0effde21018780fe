"""The arithmetic of the benchmarks of training, on measurements that are made up; nothing is timed or started."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench import checkpoint, recovery, soak, summary, train
from tests.bench.figures import Spread
from tests.bench.result import rows, show

SECONDS = {"none": [10.0, 20.0], "telar": [10.5, 21.0], "snapshots": [12.0, 24.0], "deepspeed": [15.0, 30.0]}


def step(number, at, attempt=1, seconds=1.0, replicas=3, loss=0.0):
    return {
        "step": number, "unix_seconds": at, "attempt": attempt, "step_seconds": seconds, "world_size": replicas,
        "loss": loss,
    }  # fmt: skip


def test_costs_are_what_a_block_takes_longer():
    paid = checkpoint.costs(SECONDS, steps=10)
    assert paid["step"] == Spread(1.5, 1.0, 2.0, 2)
    assert paid["telar"]["seconds"] == [0.5, 1.0] and paid["deepspeed"]["seconds"] == [5.0, 10.0]
    # Half a second of the thirty that 20 steps take.
    assert paid["telar"]["percent"] == pytest.approx([100 / 60, 100 / 30])
    assert paid["snapshots"]["seconds"] == pytest.approx([0.2, 0.4])
    assert paid["snapshots"]["percent"] == pytest.approx([100 * 0.2 / 1.5, 100 * 0.4 / 1.5])
    assert checkpoint.quotient([5.0, 10.0], [0.5, 1.0]) == "10.0 (10.0 to 10.0)"


def test_a_cost_below_the_noise_gives_no_ratio_of_pairs():
    assert checkpoint.quotient([5.0, 5.0, 5.0], [-1.0, 1.0, 2.0]).startswith("5.0 by medians (1 of 3")
    assert checkpoint.quotient([5.0], [-1.0]).startswith("not measurable")


def test_recovery_from_records():
    before = [step(number, float(number)) for number in range(1, 11)]
    # Killed at 9.5: step 10 was still done. The next attempt does step 10 again.
    after = [step(10, 15.0, 2, replicas=2), step(11, 16.0, 2, replicas=2)]
    expected = {"next": 5.5, "caught_up": 6.5, "redone": 1, "replicas": 2}
    assert recovery.recovery(before + after, 9.5) == expected
    assert recovery.recovery(before + after[:1], 9.5) is None and recovery.recovery(before, 9.5) is None
    nothing_redone = recovery.recovery([*before, step(11, 14.0, 2)], 10.5)
    assert nothing_redone == {"next": 3.5, "caught_up": 3.5, "redone": 0, "replicas": 3}


@given(st.integers(0, 2**32), st.floats(1.0, 5000.0), st.floats(5.0, 100.0))
def test_kills_are_planned_in_time_and_by_the_seed(seed, seconds, every):
    kills = soak.plan(seed, seconds, every)
    assert kills == soak.plan(seed, seconds, every)
    assert [kill.seconds for kill in kills] == sorted(kill.seconds for kill in kills)
    assert all(0 < kill.seconds < seconds and 0 <= kill.which < 1 and kill.what in ("rank", "node") for kill in kills)


def test_kills_come_as_often_as_they_should():
    kills = soak.plan(1, 60_000, 60)
    assert 900 < len(kills) < 1100
    assert 0.4 < sum(kill.what == "rank" for kill in kills) / len(kills) < 0.6


def test_goodput_counts_each_step_once():
    # Steps 1..3, 3 again after a loss: four seconds of useful steps in ten of wall time behind the first.
    records = [step(1, 0.0), step(2, 2.0, seconds=2.0), step(3, 4.0, seconds=2.0)]
    found = soak.figures([*records, step(3, 10.0, 2, seconds=2.0, replicas=2)])
    assert found["goodput"] == pytest.approx(0.4) and found["wall_seconds"] == 10.0
    assert (found["steps"], found["redone"], found["missing"], found["attempts"]) == (3, 1, 0, 2)
    assert found["replicas"] == {2: 1, 3: 2}
    assert soak.figures([step(1, 0.0), step(3, 1.0)])["missing"] == 1


def test_differences_of_redone_steps_count_and_what_is_wrong_is_said():
    assert soak.difference({1: [1.0], 2: [2.0, 2.5]}, {1: [1.0], 2: [2.0]}) == (0.5, 2)
    with pytest.raises(AssertionError, match="steps differ"):
        soak.difference({1: [1.0]}, {1: [1.0], 2: [1.0]})
    good = {
        "state": "stopped", "missing": 0, "largest_difference": 0.0, "at_step": 1, "steps_with_other_samples": [],
        "processes_left": [],
    }  # fmt: skip
    assert soak.problems(good, 1e-3) == []
    wrong = [("state", "failed"), ("missing", 1), ("largest_difference", 1.0), ("steps_with_other_samples", [4])]
    for name, value in [*wrong, ("processes_left", [7])]:
        assert len(soak.problems({**good, name: value}, 1e-3)) == 1, name


def test_overheads_and_losses():
    assert train.percent([1.1, 2.2], [1.0, 2.0]) == "10.0% (10.0 to 10.0)"
    assert train.apart([1.0, 2.0], [1.0, 2.5]) == 0.5
    assert show(Spread(1.0, 0.5, 2.0, 1)) == "1.00" and rows(("a",), [("1",)]) == ["| a |", "| --- |", "| 1 |"]


def test_the_configurations_are_legal():
    from configs.load import parse_config

    for size in train.SIZES:
        config = parse_config(train.make_tree(size, 90, "/nowhere"), "bench")
        assert config.model.d_model % train.HEAD_WIDTH == 0
    assert checkpoint.make_config(64, 1, 2, 8, "/nowhere", 1).elastic.snapshot_every == 1


def test_the_summary_has_a_line_for_every_figure_and_failure():
    recovered = {kill: {"next": 2.0} for kill in recovery.KILLS}
    slower = {kill: {"next": 8.0} for kill in recovery.KILLS}
    contents = {
        "data": {
            "runs": [
                {"workload": 1, "loader": name, "result": {"tokens_per_cpu_second": rate}}
                for name, rate in (("telar", 4.0), ("peer", 2.0))
            ]
        },
        "attention": {
            "runs": [{"kind": kind, "tokens": 8, "seconds": [s]} for kind, s in (("full", 4.0), ("linear", 1.0))]
        },
        "generate": {
            "runs": [{"model": "M", "batch": 1, "tokens_per_second": {"telar": [3.0], "transformers": [2.0]}}]
        },
        "train": {"sizes": {"small": {"telar": [{"seconds": 1.1}], "loop": [{"seconds": 1.0}]}}},
        "checkpoint": {"seconds": SECONDS, "settings": {"steps": 10}},
        "recovery": {"runs": [{"way": "telar", "found": recovered}, {"way": "ray train", "found": slower}]},
    }
    assert contents.keys() == summary.SMALL.keys() == summary.FIGURES.keys()
    found = {name: {"content": json.loads(json.dumps(content))} for name, content in contents.items()}
    text = "\n".join(summary.table({**found, "memory": {"failed": "no | room"}}))
    for line in ("times peer's | 2.0 |", "times full's speed | 4.00 |", "tokens/s | 1.50 |", "(small) | 10.0% |"):
        assert line in text
    assert "DeepSpeed's checkpoint, times Telar's cost | 10.0 (10.0 to 10.0) |" in text
    assert "times Telar's: 4.0 |" in text and "| memory |  | failed: no / room |" in text
