"""Sentiment: which of a corpus's labels the model holds to be the most likely target of a text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from configs.errors import DataError
from configs.schema import RunConfig
from data.held_out import HeldOut
from jobs.tasks.base import Choices, Example, Measure, Metric, Row, TrainingFacts, build_metric, statistic_metric
from jobs.tasks.choosing import calibration_columns, calibration_error, f1_columns, macro_f1, scores, wins

MOST_LABELS = 50


class Sentiment:
    """The labels are the different targets of the held-out records that are judged; each is scored given the source."""

    name = "sentiment"
    headline = "accuracy"
    version = 1
    signature = "label with the highest log-likelihood, eos included, ties shared; F1 macro; calibration in 15 bins"

    def limit(self, config: RunConfig) -> int:
        """`evaluate.likelihood_records`: nothing is generated."""
        return config.evaluate.likelihood_records

    def examples(self, records: Sequence[HeldOut], corpus_task: str, config: RunConfig) -> list[Example]:
        """One `Choices` per record with all labels; raises DataError when targets are too many to be labels."""
        labels = labels_of([record.target for record in records])
        return [Example(record, (Choices(record.source, labels),)) for record in records]

    def score(
        self,
        examples: Sequence[Example],
        rows: Sequence[Row],
        facts: TrainingFacts,
        corpus: str,
        config: RunConfig,
    ) -> list[Metric]:
        """Accuracy, macro-F1 and calibration error, beside chance and the most frequent label trained on."""
        labels = examples[0].requests[0].targets
        answers = [labels.index(example.record.target) for example in examples]
        found = [scores(row.answers[0]) for row in rows]
        trained = Counter(target for target in facts.targets.get(corpus, ()) if target in labels)
        majority = labels.index(max(sorted(trained), key=trained.__getitem__)) if trained else None
        return label_metrics(found, answers, len(labels), majority, config)

    def measure(self, examples: Sequence[Example], rows: Sequence[Row]) -> Measure:
        """Whether the right label was chosen."""
        labels = examples[0].requests[0].targets
        found = [wins(scores(row.answers[0])) for row in rows]
        right = [each[labels.index(e.record.target)] for each, e in zip(found, examples, strict=True)]
        return Measure("accuracy", "accuracy", "share", True, np.array(right), np.ones(len(right)))

    def output(self, example: Example, row: Row) -> str | None:
        """The label that was chosen."""
        return example.requests[0].targets[int(np.argmax(scores(row.answers[0])))]


def labels_of(targets: Sequence[str]) -> tuple[str, ...]:
    """The different targets, sorted; raises DataError when there are more than MOST_LABELS."""
    labels = tuple(sorted(set(targets)))
    if len(labels) > MOST_LABELS:
        raise DataError(
            f"task sentiment: the held-out records have {len(labels)} different targets ({labels[0]!r}, "
            f"{labels[1]!r}...), more than the {MOST_LABELS} that can be labels; let the corpus's target template name "
            "the column of labels, or set task: likelihood"
        )
    return labels


def label_metrics(
    found: Sequence[np.ndarray], answers: Sequence[int], labels: int, majority: int | None, config: RunConfig
) -> list[Metric]:
    """Metrics of a choice among the same `labels` candidates for each record.

    `found` holds scores `[labels]` per record, `answers` the right label; `majority` is the label that a baseline
    always answers, None for no such baseline.
    """
    evaluate, seed = config.evaluate, config.run.seed
    won = [wins(each) for each in found]
    right = np.array([each[answer] for each, answer in zip(won, answers, strict=True)])
    ones = np.ones(len(right))
    constant = {} if majority is None else {"most frequent label": [np.eye(labels)[majority]] * len(right)}
    # Guessing at random gives each label its equal share.
    guessed = {"chance": [np.full(labels, 1.0 / labels)] * len(right), **constant}
    accuracy = build_metric(
        "accuracy",
        "accuracy",
        "share",
        True,
        right,
        ones,
        {name: np.array([g[a] for g, a in zip(each, answers, strict=True)]) for name, each in guessed.items()},
        evaluate,
        seed,
    )
    f1 = statistic_metric(
        "macro_f1",
        "macro-F1",
        "F1",
        True,
        f1_columns(won, answers, labels),
        macro_f1,
        {name: f1_columns(each, answers, labels) for name, each in guessed.items()},
        evaluate,
        seed,
    )
    # A model that is always certain is wrong by its whole error rate.
    certain = np.stack([1.0 - right, ones], axis=1)
    calibration = statistic_metric(
        "calibration_error",
        "expected calibration error",
        "share",
        False,
        calibration_columns(found, answers),
        calibration_error,
        {"always certain": certain},
        evaluate,
        seed,
    )
    return [accuracy, f1, calibration]
