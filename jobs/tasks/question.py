"""Answers to questions: SQuAD's exact match and F1, beside the most frequent answer and a copied source."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from configs.schema import RunConfig
from data.held_out import HeldOut
from jobs.tasks.base import Example, Generate, Measure, Metric, Row, TrainingFacts, metric_of
from jobs.tasks.squad import exact, f1
from jobs.tasks.summary import most_frequent


class QuestionAnswering:
    """One written answer per record, against the record's target."""

    name = "qa"
    headline = "exact_match"
    version = 1
    signature = "SQuAD 1.1 exact match and F1, English and Spanish articles left out; decoding as in the settings"

    def limit(self, config: RunConfig) -> int:
        """`evaluate.generate_records`."""
        return config.evaluate.generate_records

    def examples(self, records: Sequence[HeldOut], corpus_task: str, config: RunConfig) -> list[Example]:
        """One generation per record."""
        return [Example(record, (Generate(record.source),)) for record in records]

    def score(
        self,
        examples: Sequence[Example],
        rows: Sequence[Row],
        facts: TrainingFacts,
        corpus: str,
        config: RunConfig,
    ) -> list[Metric]:
        """Exact match and F1; the most frequent training target answers every question in one baseline."""
        outputs = [row.answers[0]["text"] for row in rows]
        references = [[example.record.target] for example in examples]
        trained = facts.targets.get(corpus)
        constant = {"most frequent answer": [most_frequent(trained)] * len(outputs)} if trained else {}
        copied = [example.record.source for example in examples]
        measures = answer_measures(outputs, references, {**constant, "source copied": copied})
        return [metric_of(measure, config) for measure in measures]

    def measure(self, examples: Sequence[Example], rows: Sequence[Row]) -> Measure:
        """Whether the answer matched."""
        outputs, references = [row.answers[0]["text"] for row in rows], [[e.record.target] for e in examples]
        return answer_measures(outputs, references, {})[0]

    def output(self, example: Example, row: Row) -> str | None:
        """The answer."""
        return row.answers[0]["text"]


def answer_measures(
    outputs: Sequence[str], references: Sequence[Sequence[str]], baselines: dict[str, Sequence[str]]
) -> list[Measure]:
    """Exact match and F1 of outputs with one or more references each; `baselines` are other outputs by name."""

    def values(judge: Callable[[str, Sequence[str]], float], texts: Sequence[str]) -> np.ndarray:
        return np.array([judge(text, wanted) for text, wanted in zip(texts, references, strict=True)])

    return [
        Measure(
            name,
            label,
            unit,
            True,
            values(judge, outputs),
            np.ones(len(outputs)),
            {title: values(judge, texts) for title, texts in baselines.items()},
        )
        for name, label, unit, judge in (
            ("exact_match", "exact match", "share", exact),
            ("answer_f1", "word F1 of answers", "F1", f1),
        )
    ]
