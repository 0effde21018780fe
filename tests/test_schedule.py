"""Learning-rate schedules against the paper's equation and torch's own schedulers."""

import pytest
import torch

from configs.schema import OptimizerSection
from model.schedule import learning_rate


def test_noam_equals_equation_3():
    section = OptimizerSection(schedule="noam", warmup_steps=4000, learning_rate=2.0)
    for step in (1, 10, 3999, 4000, 4001, 100_000):
        expected = 2.0 * 512 ** (-0.5) * min(step ** (-0.5), step * 4000 ** (-1.5))
        assert learning_rate(section, 512, step, 100_000) == pytest.approx(expected, rel=1e-12)
    rates = [learning_rate(section, 512, step, 9000) for step in range(1, 9000)]
    assert max(rates) == rates[3999]


def test_constant_climbs_and_stays():
    section = OptimizerSection(schedule="constant", warmup_steps=4, learning_rate=0.01)
    found = [learning_rate(section, 512, step, 9000) for step in range(1, 7)]
    assert found == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    with pytest.raises(ValueError, match="count from 1"):
        learning_rate(section, 512, 0, 10)


def rates(section, steps):
    return [learning_rate(section, 512, step, steps) for step in range(1, steps + 1)]


def torch_rates(make, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_cosine_equals_torch_s_after_a_linear_climb():
    section = OptimizerSection(schedule="cosine", warmup_steps=5, learning_rate=0.01, minimum_ratio=0.1)
    kinds = torch.optim.lr_scheduler
    expected = torch_rates(lambda o: kinds.CosineAnnealingLR(o, T_max=45, eta_min=0.001), 46)
    found = rates(section, 50)
    assert found[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])
    assert found[4:] == pytest.approx(expected)
    assert learning_rate(section, 512, 60, 50) == pytest.approx(0.001)


def test_wsd_is_flat_then_falls_linearly_to_the_last_step():
    section = OptimizerSection(schedule="wsd", warmup_steps=5, learning_rate=0.01, decay_steps=20, minimum_ratio=0.2)
    kinds = torch.optim.lr_scheduler
    expected = torch_rates(lambda o: kinds.LinearLR(o, start_factor=1.0, end_factor=0.2, total_iters=20), 21)
    found = rates(section, 100)
    assert found[4:79] == pytest.approx([0.01] * 75)
    assert found[79:] == pytest.approx(expected)
    tenth = OptimizerSection(schedule="wsd", warmup_steps=5, learning_rate=0.01)
    assert [rate < 0.01 for rate in rates(tenth, 100)].count(True) == 4 + 10
