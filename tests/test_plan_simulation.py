"""Checkpoints and failures: the simulation against the closed form, books that balance, intervals that are best."""

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs.errors import ConfigError
from configs.load import load_config
from jobs.commands import planning
from jobs.plan.checkpoints import MEETING_SECONDS, CheckpointCost, best_interval, checkpoint_cost, expected_goodput
from jobs.plan.devices import find_device
from jobs.plan.layout import Layout
from jobs.plan.parameters import shape_of
from jobs.plan.simulation import simulate
from tests.test_layout import ROOT

DAY = 86400.0
HOUR = 3600.0


@settings(deadline=None, max_examples=25)
@given(
    mtbf=st.floats(1 * HOUR, 24 * HOUR),
    stall=st.floats(0.1, 60.0),
    restart=st.floats(10.0, 900.0),
    ratio=st.floats(0.3, 4.0),
    nodes=st.sampled_from([1, 64, 2048]),
    seed=st.integers(0, 2**32),
)
def test_goodput_is_that_of_daly(mtbf, stall, restart, ratio, nodes, seed):
    """Daly 2006, equation 13: copies that commit at once. Four standard deviations of some 4,000 failures' cost."""
    cost = CheckpointCost(0.0, stall, 0.0, restart)
    interval = ratio * math.sqrt(2 * stall * mtbf)
    found = simulate(4000 * mtbf, interval, cost, mtbf, nodes, seed)
    expected = expected_goodput(interval, cost, mtbf)
    per_failure = (interval + stall + restart) / mtbf
    assert found.goodput == pytest.approx(expected, abs=4 * per_failure / math.sqrt(4000) + 1e-3)


@pytest.mark.parametrize("lag", [60.0, 300.0, 600.0])
def test_writing_behind_training_costs_what_the_closed_form_says(lag):
    cost = CheckpointCost(0.0, 5.0, lag, 120.0 + lag)
    found = simulate(4000 * 3 * HOUR, 600.0, cost, 3 * HOUR, 256, seed=5)
    assert found.goodput == pytest.approx(expected_goodput(600.0, cost, 3 * HOUR), abs=0.006)
    assert found.goodput < expected_goodput(600.0, CheckpointCost(0.0, 5.0, 0.0, 120.0), 3 * HOUR)


@settings(deadline=None, max_examples=60)
@given(
    interval=st.floats(1.0, 20000.0),
    stall=st.floats(0.0, 300.0),
    lag=st.floats(0.0, 3000.0),
    restart=st.floats(0.0, 3000.0),
    mtbf=st.floats(300.0, 1e6),
    nodes=st.integers(1, 300),
    spares=st.none() | st.integers(0, 5),
    seed=st.integers(0, 2**32),
)
def test_every_second_is_accounted_for(interval, stall, lag, restart, mtbf, nodes, spares, seed):
    horizon = 20 * DAY
    found = simulate(horizon, interval, CheckpointCost(0.0, stall, lag, restart), mtbf, nodes, seed, spares, HOUR)
    spent = found.progress + found.lost + found.restarting + found.waiting + found.stalled
    assert spent == pytest.approx(horizon, rel=1e-9)
    assert min(found.progress, found.lost, found.restarting, found.waiting, found.stalled) >= 0
    times = [when for when, _ in found.path]
    assert times == sorted(times) and times[-1] <= horizon
    again = simulate(horizon, interval, CheckpointCost(0.0, stall, lag, restart), mtbf, nodes, seed, spares, HOUR)
    assert again == found
    if spares is None:
        assert found.waiting == 0


def step_by_step(horizon, interval, cost, failures):
    """A clock that ticks through training, copies and restarts by whole seconds."""
    progress = committed = since = 0
    pending, restart, stall = [], 0, 0
    for now in range(horizon):
        pending, arrived = [p for p in pending if p[0] > now], [p[1] for p in pending if p[0] <= now]
        committed = max([committed, *arrived])
        if now in failures:
            progress, since, pending, stall, restart = committed, 0, [], 0, int(cost.restart)
        if restart:
            restart -= 1
        elif stall:
            stall -= 1
            if not stall:
                pending.append((now + 1 + cost.lag, progress))
        else:
            progress, since = progress + 1, since + 1
            if since == interval:
                since, stall = 0, int(cost.stall)
    return progress


@pytest.mark.parametrize("lag", [0, 7, 45, 200])
def test_a_run_equals_one_that_is_ticked_through(lag, monkeypatch):
    cost, failures = CheckpointCost(0.0, 5.0, float(lag), 30.0), [100, 333, 340, 900, 1500, 1526]
    clocks = iter([*(float(a - b) for a, b in zip(failures, [0, *failures], strict=False)), 1e9])
    monkeypatch.setattr("random.Random.expovariate", lambda *_: next(clocks))
    found = simulate(3000.0, 60.0, cost, 1.0, 1, seed=0)
    assert found.failure_times == failures
    assert found.progress == step_by_step(3000, 60, cost, set(failures))


def test_a_run_without_spares_waits_for_repairs():
    cost = CheckpointCost(0.0, 1.0, 0.0, 60.0)
    many, few, none = (simulate(60 * DAY, 600.0, cost, 3 * HOUR, 64, 3, spares) for spares in (None, 2, 0))
    assert many.waiting == 0 < few.waiting < none.waiting
    # Without any spare each failure waits for one whole repair, failures during which find nothing to fail.
    assert none.waiting == pytest.approx(len(none.failure_times) * 4 * HOUR, rel=0.02)


@pytest.mark.parametrize("mtbf", [1 * HOUR, 3 * HOUR, 24 * HOUR])
def test_the_best_interval_is_best(mtbf):
    cost = CheckpointCost(0.0, 30.0, 0.0, 120.0)
    best = best_interval(cost, mtbf)
    assert best == pytest.approx(math.sqrt(2 * 30.0 * mtbf), rel=0.15)
    at_best = expected_goodput(best, cost, mtbf)
    grid = [expected_goodput(best * factor / 50, cost, mtbf) for factor in range(5, 500)]
    assert at_best >= max(grid) - 1e-4
    assert at_best > expected_goodput(best / 3, cost, mtbf) and at_best > expected_goodput(best * 3, cost, mtbf)
    assert best_interval(CheckpointCost(0.0, 0.001, 900.0, 120.0), mtbf) == 900.0


def test_a_checkpoint_is_twelve_bytes_per_parameter_over_all_nodes():
    config = load_config(ROOT / "configs/gpt_124m.yaml")
    device = find_device("h100")
    one, two = (checkpoint_cost(config, shape_of(config), Layout(1, 1, 8 * n, 1, 8), device) for n in (1, 2))
    assert one.bytes == two.bytes == 12 * 124_439_808
    assert one.lag == pytest.approx(2 * two.lag)
    assert one.stall - MEETING_SECONDS == pytest.approx(2 * (two.stall - MEETING_SECONDS))


def test_a_month_of_16384_devices_takes_seconds_and_can_be_drawn(tmp_path):
    picture = tmp_path / "run.png"
    began = time.process_time()
    found = planning.plan(
        str(ROOT / "configs/llama3_405b.yaml"),
        nodes=2048,
        gpus_per_node=8,
        device="h200",
        mtbf="3h",
        simulate="30d",
        seed=1,
    )
    assert time.process_time() - began < 2
    simulated = found.facts["simulation"]["best"]
    assert simulated["goodput"] >= found.facts["simulation"]["configured"]["goodput"]
    assert simulated["nodes"] == 2048 and 180 < simulated["failures"] < 300
    assert simulated["goodput"] == pytest.approx(simulated["expected_goodput"], abs=0.01)
    planning.plan(str(ROOT / "configs/gpt_124m.yaml"), nodes=1, mtbf="3h", simulate="3d", plot=str(picture))
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > 800
    with pytest.raises(ConfigError, match=r"must end in \.png"):
        planning.plan(str(ROOT / "configs/gpt_124m.yaml"), simulate="3d", plot=str(tmp_path / "run.txt"))
    with pytest.raises(ConfigError, match="cannot be written"):
        planning.plan(str(ROOT / "configs/gpt_124m.yaml"), simulate="3d", plot=str(tmp_path / "none/run.png"))
