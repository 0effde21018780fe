"""Summaries of functions: ROUGE-L beside outputs that read nothing, and whether the model uses the encoder at all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from configs.schema import RunConfig
from data.held_out import HeldOut
from jobs.tasks.base import Example, Generate, LogLikelihood, Metric, NoHeadline, Row, TrainingFacts, build_metric

CANDIDATES = 60
JUDGED_ON = 150
WORDS = 20
LONGEST_CONSTANT = 8


class Summary(NoHeadline):
    """Greedy summaries against the docstring's first line, and the reference's likelihood given the wrong source."""

    name = "summary"
    version = 1
    signature = "rouge-score 0.1.2, rougeL F1, Porter stemmer; greedy decoding"

    def limit(self, config: RunConfig) -> int:
        """`evaluate.generate_records`."""
        return config.evaluate.generate_records

    def examples(self, records: Sequence[HeldOut], corpus_task: str, config: RunConfig) -> list[Example]:
        """Per record its summary, its reference's likelihood given its own source and given another record's."""
        others = derangement(len(records), config.run.seed)
        return [
            Example(
                record,
                (
                    Generate(record.source),
                    LogLikelihood(record.source, record.target),
                    *([LogLikelihood(records[others[i]].source, record.target)] if len(records) > 1 else []),
                ),
            )
            for i, record in enumerate(records)
        ]

    def score(
        self,
        examples: Sequence[Example],
        rows: Sequence[Row],
        facts: TrainingFacts,
        corpus: str,
        config: RunConfig,
    ) -> list[Metric]:
        """ROUGE-L with three baselines, and nats per token of the reference beside those given shuffled sources."""
        references = [example.record.target for example in examples]
        targets = facts.targets.get(corpus, [])
        baselines = {"function name": [name_words(example.record.fields.get("name", "")) for example in examples]}
        if targets:
            baselines["best constant"] = [best_constant(targets, config.run.seed)] * len(references)
            baselines["most frequent docstring"] = [most_frequent(targets)] * len(references)
        ones = np.ones(len(references))
        metrics = [
            build_metric(
                "rouge_l",
                "ROUGE-L of summaries",
                "F1",
                True,
                rouge_l(references, [row.answers[0]["text"] for row in rows]),
                ones,
                {name: rouge_l(references, outputs) for name, outputs in baselines.items()},
                config.evaluate,
                config.run.seed,
            )
        ]
        if all(len(row.answers) == 3 for row in rows):
            tokens = np.array([len(row.answers[1]["nll"]) for row in rows])
            own, shuffled = (np.array([sum(row.answers[k]["nll"]) for row in rows]) for k in (1, 2))
            metrics.append(
                build_metric(
                    "reference_nll",
                    "reference given its own source",
                    "nats/token",
                    False,
                    own,
                    tokens,
                    {"shuffled sources": shuffled},
                    config.evaluate,
                    config.run.seed,
                    tokens=int(tokens.sum()),
                )
            )
        return metrics

    def output(self, example: Example, row: Row) -> str | None:
        """The greedy summary."""
        return row.answers[0]["text"]


def derangement(size: int, seed: int) -> list[int]:
    """A random cyclic permutation without fixed point (Sattolo 1986); [0] for one record."""
    order = list(range(size))
    generator = np.random.default_rng(seed)
    for i in range(size - 1, 0, -1):
        j = int(generator.integers(0, i))
        order[i], order[j] = order[j], order[i]
    return order


def rouge_l(references: Sequence[str], outputs: Sequence[str]) -> np.ndarray:
    """ROUGE-L F1 of each output, `[records]`, 0 to 1."""
    return np.array([_rouge_l(reference, output) for reference, output in zip(references, outputs, strict=True)])


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


def _rouge_l(reference: str, output: str) -> float:
    return _scorer().score(reference, output)["rougeL"].fmeasure


def name_words(name: str) -> str:
    """The words of an identifier: `_get_HTTPCode2` -> `get HTTP code 2`, in lower case."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    return " ".join(part.lower() for part in parts)


def most_frequent(targets: Sequence[str]) -> str:
    """The text that stands most often among training targets; the first in order among equals."""
    counts = Counter(targets)
    return min(counts, key=lambda text: (-counts[text], text))


def best_constant(targets: Sequence[str], seed: int) -> str:
    """The constant output with the highest mean ROUGE-L found on a sample of training targets.

    Candidates are the most frequent targets, a random choice of them, and word sequences grown greedily from the most
    frequent words. Held-out records are not looked at.
    """
    generator = np.random.default_rng(seed)
    sample = [targets[i] for i in generator.permutation(len(targets))[:JUDGED_ON]]
    frequent = [text for text, _ in Counter(targets).most_common(CANDIDATES // 2)]
    drawn = [targets[i] for i in generator.permutation(len(targets))[: CANDIDATES // 2]]
    candidates = sorted({*frequent, *drawn, _grown(targets, sample)})
    return max(candidates, key=lambda text: float(np.mean(rouge_l(sample, [text] * len(sample)))))


def _grown(targets: Sequence[str], sample: Sequence[str]) -> str:
    counts = Counter(word for text in targets for word in re.findall(r"[a-z0-9]+", text.lower()))
    words = [word for word, _ in counts.most_common(WORDS)]
    text, best = "", 0.0
    for _ in range(LONGEST_CONSTANT):
        scored = [
            (float(np.mean(rouge_l(sample, [extended] * len(sample)))), extended)
            for word in words
            if (extended := f"{text} {word}".strip())
        ]
        score, extended = max(scored, default=(0.0, ""))
        if score <= best:
            break
        text, best = extended, score
    return text
