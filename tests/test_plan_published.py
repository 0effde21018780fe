"""Predictions against published runs, and that few constants make them."""

import statistics

import pytest

from jobs.commands import planning
from jobs.plan.published import comparisons

FOUND = comparisons()


@pytest.mark.parametrize("one", FOUND, ids=lambda one: f"{one.name}, {one.layout.ranks} {one.device}, {one.tokens}")
def test_a_prediction_is_within_a_fifth_of_the_published_figure(one):
    assert abs(one.error) < 0.2
    assert one.parameters == pytest.approx(one.published_parameters, rel=0.03)


def test_errors_are_small_on_average_and_no_larger_for_runs_that_were_held_out():
    held_out, fitted = ([abs(one.error) for one in FOUND if one.held_out is kind] for kind in (True, False))
    assert len(held_out) >= len(fitted) >= 10
    assert statistics.mean(held_out) < 0.08 and statistics.mean(fitted) < 0.08
    # No bias either way.
    assert abs(statistics.mean(one.error for one in FOUND)) < 0.05


def test_parameter_counts_that_are_published_in_full_are_met():
    exact = [one for one in FOUND if one.source.startswith("llm-foundry")]
    assert len(exact) >= 10 and all(one.parameters == one.published_parameters for one in exact)


def test_predictions_order_runs_of_one_device_as_published():
    """Not only the level: faster and slower runs of the same series are told apart."""
    for device in ("h100", "a100"):
        series = [one for one in FOUND if one.device == device and one.source.startswith("llm-foundry")]
        predicted = [one.predicted for one in series]
        published = [one.published for one in series]
        assert statistics.correlation(predicted, published) > 0.5, device


def test_the_table_names_every_source(capsys):
    facts, _ = planning.published(None)
    assert len(facts["published"]) == len(FOUND)
    from jobs.plan.text import published_table

    text = published_table(FOUND, None)
    assert max(len(line) for line in text.splitlines()) <= 100
    for part in ("Narayanan et al. 2021, table 1", "Grattafiori et al. 2024, table 4", "llm-foundry", "held out"):
        assert part in text
