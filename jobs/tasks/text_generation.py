"""Written continuations: how varied they are, and how much they repeat themselves, beside the records' own texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from configs.schema import RunConfig
from data.held_out import HeldOut
from jobs.tasks.base import Example, Generate, Metric, NoHeadline, Row, TrainingFacts, build_metric, statistic_metric

REPEATED = 4


class TextGeneration(NoHeadline):
    """One output per record, judged by its words alone; what is likely is the task `likelihood`'s matter."""

    name = "text_generation"
    version = 1
    signature = "words at white space, lower-cased; n-grams compared within each output, sums over outputs"

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
        """Distinct-1, distinct-2 and repetition, beside those of the references."""
        references = [example.record.target for example in examples]
        return diversity_metrics([row.answers[0]["text"] for row in rows], references, config)

    def output(self, example: Example, row: Row) -> str | None:
        """The continuation."""
        return row.answers[0]["text"]


def diversity_metrics(outputs: Sequence[str], references: Sequence[str] | None, config: RunConfig) -> list[Metric]:
    """Distinct-1 and -2 within outputs (Li et al. 2016, 5.2), repeated 4-grams, and how many outputs are different.

    References are shortened to as many words as the output beside them has, since longer texts repeat more.
    """
    words = [output.lower().split() for output in outputs]
    beside = {}
    if references is not None:
        beside["reference"] = [r.lower().split()[: len(own)] for r, own in zip(references, words, strict=True)]
    metrics = []
    for name, label, order, higher in (
        ("distinct_1", "distinct-1", 1, True),
        ("distinct_2", "distinct-2", 2, True),
        ("repetition", f"repeated {REPEATED}-grams", REPEATED, False),
    ):
        own = ngram_columns(words, order)
        if own[:, 1].sum() == 0:
            continue
        theirs = {title: ngram_columns(texts, order) for title, texts in beside.items()}
        metrics.append(
            statistic_metric(
                name,
                label,
                "share",
                higher,
                own,
                distinct if higher else repeated,
                {title: values for title, values in theirs.items() if values[:, 1].sum() > 0},
                config.evaluate,
                config.run.seed,
            )
        )
    different = build_metric(
        "different_outputs",
        "outputs that differ",
        "share",
        True,
        unlike(words),
        np.ones(len(words)),
        {title: unlike(texts) for title, texts in beside.items()},
        config.evaluate,
        config.run.seed,
    )
    return [*metrics, different]


def ngram_columns(texts: Sequence[Sequence[str]], order: int) -> np.ndarray:
    """Of each text the number of different n-grams and of all, `[texts, 2]`."""
    rows = []
    for words in texts:
        found = [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]
        rows.append((len(set(found)), len(found)))
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def distinct(sums: np.ndarray) -> float:
    """Different n-grams over all, from summed `ngram_columns`; 1 where there is none."""
    return float(sums[0] / sums[1]) if sums[1] else 1.0


def repeated(sums: np.ndarray) -> float:
    """The share of n-grams that stood in the same text before."""
    return 1.0 - distinct(sums)


def unlike(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """1 over the number of equal texts, `[texts]`; the mean is the share of texts that remain without repeats."""
    keys = [" ".join(words) for words in texts]
    counts = Counter(keys)
    return np.array([1.0 / counts[key] for key in keys])
