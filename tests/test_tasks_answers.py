"""Sentiment, question answering and text generation: hand-computed cases, and models that know all or nothing."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import DataError
from data.held_out import HeldOut
from jobs.ngrams import count
from jobs.tasks.base import Choices, Row, TrainingFacts
from jobs.tasks.choosing import (
    calibration_columns,
    calibration_error,
    f1_columns,
    macro_f1,
    probabilities,
    scores,
    wins,
)
from jobs.tasks.question import QuestionAnswering, answer_measures
from jobs.tasks.sentiment import MOST_LABELS, Sentiment, label_metrics
from jobs.tasks.squad import exact, f1, normalise
from jobs.tasks.text_generation import TextGeneration, diversity_metrics
from tests.test_tasks import BOS, config

NGRAMS = count([np.array([2, 3, 0])] * 4, 5, BOS)
KNOWN = TrainingFacts(NGRAMS, {"c": ["pos", "pos", "neg"]})


def answered(nll, targets):
    return {"nll": list(nll), "tokens": [2] * len(nll), "bytes": [len(t.encode()) for t in targets]}


def judged(task, examples, choose, facts=KNOWN):
    """Metrics by name for the nats that `choose` gives to the candidates of an example."""
    rows = [Row(e.record.index, (answered(choose(e), e.requests[0].targets),)) for e in examples]
    return {metric.name: metric for metric in task.score(examples, rows, facts, "c", config(bootstrap_rounds=300))}


def reviews(number):
    return [HeldOut(i, f"review {i}", ("neg", "pos", "pos")[i % 3], {}) for i in range(number)]


def test_scores_by_hand():
    answer = {"nll": [2.0, 3.0], "tokens": [1, 3], "bytes": [4, 2]}
    assert scores(answer).tolist() == [-2.0, -3.0]
    assert scores(answer, "byte").tolist() == [-0.5, -1.5]
    assert scores(answer, "token").tolist() == [-2.0, -1.0]
    assert probabilities(np.log([0.2, 0.6])).tolist() == pytest.approx([0.25, 0.75])
    assert wins(np.array([-1.0, -1.0, -2.0])).tolist() == [0.5, 0.5, 0.0]


def slow_macro_f1(guesses, answers, labels):
    found = []
    for label in range(labels):
        hits = sum(g == a == label for g, a in zip(guesses, answers, strict=True))
        precision = hits / guesses.count(label) if guesses.count(label) else 0.0
        recall = hits / answers.count(label) if answers.count(label) else 0.0
        if label in guesses or label in answers:
            found.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return sum(found) / len(found)


pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20)


@settings(deadline=None, max_examples=80)
@given(pairs)
def test_macro_f1_is_that_of_precision_and_recall(found):
    guesses, answers = (list(part) for part in zip(*found, strict=True))
    columns = f1_columns([np.eye(4)[g] for g in guesses], answers, 4)
    assert macro_f1(columns.sum(axis=0)) == pytest.approx(slow_macro_f1(guesses, answers, 4))


def test_calibration_error_by_hand():
    # Confidences .6 and .65 share a bin of ten, one is right: |1.25 - 1|; .95 is alone and right: |.95 - 1|.
    found = [np.log([p, 1 - p]) for p in (0.61, 0.65, 0.95)]
    columns = calibration_columns(found, [0, 1, 0], bins=10)
    assert calibration_error(columns.sum(axis=0)) == pytest.approx((0.26 + 0.05) / 3)
    certain = [np.log([1.0, 1e-300])] * 2
    assert calibration_error(calibration_columns(certain, [0, 1]).sum(axis=0)) == pytest.approx(0.5)
    edges = [np.log([p, 1 - p]) for p in (0.6, 0.7)]
    assert np.flatnonzero(calibration_columns(edges, [1, 1], bins=10)[:, :10].any(axis=0)).tolist() == [5, 6]


def test_sentiment_offers_all_labels_and_refuses_texts():
    examples = Sentiment().examples(reviews(5), "sentiment", config())
    assert examples[0].requests == (Choices("review 0", ("neg", "pos")),)
    texts = [HeldOut(i, "x", f"text {i}", {}) for i in range(MOST_LABELS + 1)]
    with pytest.raises(DataError, match="task sentiment: the held-out records have 51 different targets"):
        Sentiment().examples(texts, "sentiment", config())


def test_a_perfect_model_of_sentiment_and_a_guessing_one():
    task = Sentiment()
    examples = task.examples(reviews(300), "sentiment", config())

    def perfect(example):
        return [0.0 if label == example.record.target else 99.0 for label in example.requests[0].targets]

    found = judged(task, examples, perfect)
    assert found["accuracy"].value == found["macro_f1"].value == 1.0
    assert found["calibration_error"].value == pytest.approx(0.0, abs=1e-12)
    beside = {base.name: base for base in found["accuracy"].baselines}
    assert beside["chance"].value == 0.5 and beside["chance"].difference_low > 0
    assert beside["most frequent label"].value == pytest.approx(2 / 3)
    f1_beside = {base.name: base.value for base in found["macro_f1"].baselines}
    # Always "pos": precision 2/3, recall 1 for it, nothing for the other.
    assert f1_beside["most frequent label"] == pytest.approx((0.8 + 0.0) / 2)

    wrong = Row(0, (answered([2.0, 1.0], ("neg", "pos")),))
    assert task.output(examples[0], wrong) == "pos" and examples[0].record.target == "neg"

    generator = np.random.default_rng(0)
    guessed = judged(task, examples, lambda example: generator.normal(size=2))
    chance = guessed["accuracy"].baselines[0]
    assert chance.difference_low <= 0.0 <= chance.difference_high
    same = judged(task, examples, lambda example: [1.0, 1.0])
    assert same["accuracy"].value == 0.5, "a model that cannot tell is at chance, whatever the order of labels"


def test_without_training_targets_there_is_no_majority():
    found = label_metrics([np.array([0.0, -1.0])] * 4, [0, 0, 1, 1], 2, None, config(bootstrap_rounds=100))
    assert [base.name for base in found[0].baselines] == ["chance"]
    assert found[0].value == 0.5


@pytest.mark.parametrize(
    ("output", "reference", "em", "score"),
    [
        ("The Panthers!", "panthers", 1.0, 1.0),
        ("el gato", "gato", 1.0, 1.0),
        ("¿Una casa roja?", "la casa", 0.0, 2 / 3),
        ("308 points in all", "308", 0.0, 0.4),
        ("", "x", 0.0, 0.0),
        ("the", "a", 1.0, 1.0),
        ("b b c", "b c c", 0.0, 2 / 3),
        ("Los Ángeles", "ÁNGELES", 1.0, 1.0),
        ("thermal", "rmal", 0.0, 0.0),
    ],
)
def test_squad_by_hand(output, reference, em, score):
    assert exact(output, [reference]) == em
    assert f1(output, [reference]) == pytest.approx(score)
    assert f1(output, ["unlike", reference]) == pytest.approx(score)


def official_normalise(text):
    """As in the official evaluation script of SQuAD 1.1, its steps in its order."""
    import re
    import string

    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet="aAnthe .,'-x1\n", max_size=30))
def test_english_normalisation_is_the_official_one(text):
    assert normalise(text, ("en",)) == official_normalise(text)


def questions(number):
    return [HeldOut(i, f"where is {i}", ("garden", "the hall", "kitchen")[i % 3], {}) for i in range(number)]


def test_perfect_and_constant_answers():
    task, held = QuestionAnswering(), questions(30)
    examples = task.examples(held, "qa", config())
    facts = TrainingFacts(NGRAMS, {"c": ["garden", "garden", "kitchen"]})
    right = [Row(e.record.index, ({"text": e.record.target},)) for e in examples]
    em, words = task.score(examples, right, facts, "c", config(bootstrap_rounds=100))
    assert em.value == words.value == 1.0
    assert {base.name: base.value for base in em.baselines} == {
        "most frequent answer": pytest.approx(1 / 3),
        "source copied": 0.0,
    }
    wrong = [Row(e.record.index, ({"text": "nowhere"},)) for e in examples]
    assert [metric.value for metric in task.score(examples, wrong, facts, "c", config(bootstrap_rounds=100))] == [0, 0]
    assert task.output(examples[0], wrong[0]) == "nowhere"
    assert answer_measures(["b"], [["a b", "b"]], {})[0].numerators.tolist() == [1.0]
    assert task.measure(examples, right).numerators.tolist() == [1.0] * 30


def test_diversity_by_hand():
    found = {m.name: m for m in diversity_metrics(["a b a b a b", "c d"], None, config(bootstrap_rounds=100))}
    assert found["distinct_1"].value == pytest.approx((2 + 2) / (6 + 2))
    assert found["distinct_2"].value == pytest.approx((2 + 1) / (5 + 1))
    # The 4-grams a b a b, b a b a, a b a b: one of three stood there before.
    assert found["repetition"].value == pytest.approx(1 / 3)
    assert found["different_outputs"].value == 1.0
    same = {m.name: m for m in diversity_metrics(["x y"] * 4, ["p q r s", "t u", "v w", "v w"], config())}
    assert same["different_outputs"].value == 0.25 and same["different_outputs"].baselines[0].value == 0.75
    assert "repetition" not in same, "no output has four words"
    empty = {m.name: m for m in diversity_metrics(["", ""], ["a b", "c d"], config())}
    assert list(empty) == ["different_outputs"] and math.isfinite(empty["different_outputs"].value)


def test_text_generation_beside_references():
    task = TextGeneration()
    held = [HeldOut(i, "once", f"upon a time {i} and then", {}) for i in range(6)]
    examples = task.examples(held, "text_generation", config())
    rows = [Row(i, ({"text": record.target},)) for i, record in enumerate(held)]
    for metric in task.score(examples, rows, KNOWN, "c", config(bootstrap_rounds=100)):
        assert metric.baselines[0].difference == 0.0
