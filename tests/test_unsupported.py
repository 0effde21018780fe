"""Names and numbers without support, by hand, and the detector on rows that people labelled."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError
from configs.load import parse_config
from configs.schema import TaskSection
from data.held_out import HeldOut
from jobs.tasks.base import Row, TrainingFacts
from jobs.tasks.from_data import DataTask
from jobs.tasks.unsupported import (
    calibration_measure,
    flagged,
    names,
    numbers,
    unsupported_measures,
    unsupported_names,
    unsupported_numbers,
)
from tests.test_tasks import config
from tests.test_tasks_answers import NGRAMS

LABELLED = Path("/work/shared/datasets/halueval/qa_one-turn_data.jsonl.gz")
SOURCE = "Mary Smith, a nurse from Leeds, sold three of her 1,250 stamps in 1998. She kept 2.5% of the price."


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("In 1998 it rose 2.5% to 1,250,000.", ["1998", "2.5", "1250000"]),
        ("Subió un 3,5 % en 12 meses", ["3.5", "12"]),
        ("nothing", []),
        ("2-1 on 3/4", ["2", "1", "3", "4"]),
    ],
)
def test_numbers_of_a_text(text, found):
    assert numbers(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The nurse met John. Then she left.", ["John"]),
        ("Mary Smith's house", ["Mary", "Smith"]),
        ("Yesterday was fine. I think so.", []),
        ("Paris", ["Paris"]),
        ("NATO said \u201cyes\u201d. Nobody in O'Neill\u2019s house came.", ["NATO", "O'Neill"]),
        ("she met \u00c1ngel in M\u00e1laga", ["\u00c1ngel", "M\u00e1laga"]),
        ("", []),
    ],
)
def test_names_of_a_text(text, found):
    assert names(text) == found


def test_support_by_hand():
    assert unsupported_numbers(SOURCE, "3 of 1250 stamps, 2.5 and 4") == (1, 4)
    assert unsupported_names(SOURCE, "the nurse Mary met Smith's friend Tom in LEEDS") == (1, 4)
    assert not flagged(SOURCE, "Mary Smith sold 3 stamps.") and flagged(SOURCE, "sold in 1999")


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=80))
def test_a_text_supports_itself(text):
    assert not flagged(text, text) and unsupported_names("", text)[0] == len(names(text))


def test_measures_by_hand():
    sources, outputs = ["Ann has 3 cats", "Bob has 4 dogs"], ["yes Ann and Bob 3", "yes Bob"]
    found = {m.name: m for m in unsupported_measures(sources, outputs, ["so Ann", "so Tim"])}
    assert found["unsupported_names"].numerators.tolist() == [1, 0]
    assert found["unsupported_names"].denominators.tolist() == [2, 1]
    assert found["unsupported_names"].baselines["sources exchanged"].tolist() == [1, 1]
    assert found["unsupported_numbers"].numerators.tolist() == [0, 0]
    assert found["flagged"].numerators.tolist() == [1, 0]
    assert found["flagged"].baselines["references"].tolist() == [0, 1]
    assert unsupported_measures(sources, ["no", "none"], None) == [], "nothing was written that could be unsupported"


def test_a_task_as_data_gives_the_figures_and_judges_its_detector():
    tree = {"name": "t", "kind": "jsonl", "path": "/x", "request": "generate", "source": "{s}", "metric": "unsupported"}
    task = DataTask(TaskSection(**tree, faithful="{good}", unfaithful="{bad}"))
    fields = [{"good": "near Leeds", "bad": "near York"}, {"good": "in 1998", "bad": "soon"}]
    examples = task.examples([HeldOut(i, SOURCE, "", f) for i, f in enumerate(fields)], "", config())
    rows = [Row(0, ({"text": "she is from Leeds"},)), Row(1, ({"text": "she is from York"},))]
    found = {m.name: m for m in task.score(examples, rows, TrainingFacts(NGRAMS, {}), "t", config())}
    assert found["unsupported_names"].value == 0.5
    assert found["detector"].value == 0.5 and found["detector"].baselines[0].value == 0.0


def test_labelled_texts_come_in_pairs_and_only_with_this_metric():
    tree = {"name": "t", "kind": "jsonl", "path": "/x", "request": "generate", "source": "{s}", "metric": "unsupported"}
    other = {**tree, "metric": "squad", "target": "{s}", "unfaithful": "{b}", "faithful": "{a}"}
    for wrong in ({**tree, "faithful": "{a}"}, other):
        with pytest.raises(ConfigError, match="faithful, unfaithful: they judge the detector"):
            parse_config({"data": {"corpora": []}, "evaluate": {"definitions": [wrong]}}, "test")


@pytest.mark.skipif(not LABELLED.exists(), reason="the labelled answers are not on this machine")
def test_the_detector_on_labelled_answers():
    with gzip.open(LABELLED, "rt") as file:
        rows = [json.loads(line) for line in file]
    sources = [f"{row['knowledge']} {row['question']}" for row in rows]
    right, wrong = ([row[key] for row in rows] for key in ("right_answer", "hallucinated_answer"))
    found = calibration_measure(sources, right, wrong)
    assert len(rows) == 500
    assert found.numerators.mean() > 0.45, "half of the hallucinated answers state a new name or number"
    assert found.baselines["faithful texts"].mean() < 0.02, "and nearly no right one"
