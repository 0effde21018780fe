"""What the benchmark of evaluation compares computes the same; no speed is asserted."""

import importlib.util

import pytest

from cluster.storage import Storage
from jobs.harness_tasks import PACKAGES
from tests.bench import evaluation as bench

INSTALLED = all(importlib.util.find_spec(name) for name in PACKAGES)


@pytest.fixture
def made(tmp_path):
    return bench.prepared(tmp_path, number=9, d_model=32, layers=1, words=(8, 2), new_tokens=5)


def test_our_side_writes_what_the_model_writes_without_a_cache(made, tmp_path):
    config, model, tokenizer, _ = made
    telar = bench.Telar(config, model, tokenizer)
    score, written = telar.turn("generate", Storage(str(tmp_path / "answers")))
    # Rows 0 and 8 expect what was computed by whole forwards; the others expect "nothing".
    assert score == pytest.approx(2 / 9) and len(written) == 9
    score, likelihoods = telar.turn("choices", Storage(str(tmp_path / "answers")))
    assert 0 <= score <= 1 and {len(row) for row in likelihoods} == {bench.CHOICES}
    assert max(map(max, likelihoods)) < 0


def test_turns_alternate_and_the_first_does_not_count():
    order = []
    contest = {"one": lambda folder: order.append("one"), "other": lambda folder: order.append("other")}
    seconds = bench.measure(contest, repeats=2)
    assert order == ["one", "other", "other", "one", "one", "other"]
    assert {len(found) for found in seconds.values()} == {2}


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="lm_eval is not installed (pip install 'telar[lm-eval]')")
def test_both_sides_find_the_same(made, tmp_path):
    config, model, tokenizer, file = made
    sides = bench.Telar(config, model, tokenizer), bench.Harness(model, tokenizer, file, 4, 5)
    for kind in bench.KINDS:
        ours, theirs = (side.turn(kind, Storage(str(tmp_path / "answers"))) for side in sides)
        assert max(bench.differences(kind, ours, theirs).values()) < 1e-4
