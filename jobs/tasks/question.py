"""Answers to questions: SQuAD's exact match and F1, beside the most frequent answer and a copied source."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from configs.schema import RunConfig
from data.held_out import HeldOut
from jobs.tasks.base import Example, Generate, Metric, Row, TrainingFacts, build_metric
from jobs.tasks.squad import exact, f1
from jobs.tasks.summary import most_frequent

Measure = Callable[[str, Sequence[str]], float]


class QuestionAnswering:
    """One written answer per record, against the record's target."""

    name = "qa"
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
        return answer_metrics(outputs, references, {**constant, "source copied": copied}, config)

    def output(self, row: Row) -> str | None:
        """The answer."""
        return row.answers[0]["text"]


def answer_metrics(
    outputs: Sequence[str], references: Sequence[Sequence[str]], baselines: dict[str, Sequence[str]], config: RunConfig
) -> list[Metric]:
    """Exact match and F1 of outputs with one or more references each; `baselines` are other outputs by name."""

    def values(measure: Measure, texts: Sequence[str]) -> np.ndarray:
        return np.array([measure(text, wanted) for text, wanted in zip(texts, references, strict=True)])

    ones = np.ones(len(outputs))
    return [
        build_metric(
            name,
            label,
            unit,
            True,
            values(measure, outputs),
            ones,
            {title: values(measure, texts) for title, texts in baselines.items()},
            config.evaluate,
            config.run.seed,
        )
        for name, label, unit, measure in (
            ("exact_match", "exact match", "share", exact),
            ("answer_f1", "word F1 of answers", "F1", f1),
        )
    ]
