"""How likely the model holds held-out targets to be, beside n-gram models counted on what it was trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from configs.schema import RunConfig
from data.held_out import HeldOut
from jobs.tasks.base import Example, Generate, LogLikelihood, Measure, Metric, Row, TrainingFacts, build_metric


class Likelihood:
    """Negative log-likelihood and exact match of the next token, every label (eos included) given those before it."""

    name = "likelihood"
    headline = "bits_per_byte"
    version = 2
    signature = "mean over target tokens, eos included; n-grams: Witten-Bell, counted on the training targets"

    def limit(self, config: RunConfig) -> int:
        """`evaluate.likelihood_records`."""
        return config.evaluate.likelihood_records

    def examples(self, records: Sequence[HeldOut], corpus_task: str, config: RunConfig) -> list[Example]:
        """One likelihood per record; a corpus that no other task generates for also gets a few outputs to show."""
        count = min(config.evaluate.samples, len(records)) if corpus_task == "likelihood" else 0
        shown = {number * len(records) // count for number in range(count)}
        return [
            Example(
                record,
                (LogLikelihood(record.source, record.target), *([Generate(record.source)] if i in shown else [])),
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
        """Nats per token, bits per byte and the share of next tokens that were the most probable one."""
        return likelihood_metrics(rows, facts, config)

    def measure(self, examples: Sequence[Example], rows: Sequence[Row]) -> Measure:
        """Bits per byte of each record."""
        return bits_measure(rows)

    def output(self, example: Example, row: Row) -> str | None:
        """The greedy output, where one was asked for."""
        return row.answers[1]["text"] if len(row.answers) > 1 else None


def bits_measure(rows: Sequence[Row]) -> Measure:
    """Bits per byte of the texts of rows that begin with an answer to LogLikelihood; pictures count as nothing."""
    answers = [row.answers[0] for row in rows]
    text_bytes = np.array([answer["bytes"] for answer in answers], dtype=np.float64)
    bits = np.array([math.fsum(answer["nll"]) for answer in answers]) / math.log(2) * (text_bytes > 0)
    return Measure("bits_per_byte", "bits per byte", "bits/byte", False, bits, text_bytes)


def likelihood_metrics(
    rows: Sequence[Row], facts: TrainingFacts, config: RunConfig, strata: np.ndarray | None = None
) -> list[Metric]:
    """Token-weighted metrics over rows of one corpus, or of several when `strata` names each row's corpus."""
    ngrams, answers = facts.ngrams, [row.answers[0] for row in rows]
    # One list per record, of the pieces that long targets are cut into; every model starts a piece after bos.
    pieces = [_pieces(answer) for answer in answers]
    tokens = np.array([len(answer["labels"]) for answer in answers])
    seed = config.run.seed

    def sums(value: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        return np.array([sum(float(value(piece).sum()) for piece in record) for record in pieces])

    guess, guesses = ngrams.unigram_guess(), ngrams.bigram_guesses()

    def bigram_hits(piece: np.ndarray) -> np.ndarray:
        return piece == guesses[np.concatenate([[ngrams.bos_id], piece[:-1]])]

    model = np.array([math.fsum(answer["nll"]) for answer in answers])
    beside = {"unigram": sums(ngrams.unigram_nll), "bigram": sums(ngrams.bigram_nll)}
    right = np.array([sum(answer["correct"]) for answer in answers], dtype=np.float64)
    guessed = {"unigram": sums(lambda piece: piece == guess), "bigram": sums(bigram_hits)}
    in_bits = 1.0 / math.log(2)
    text_bytes = np.array([answer["bytes"] for answer in answers], dtype=np.float64)
    common = {"evaluate": config.evaluate, "seed": seed, "tokens": int(tokens.sum()), "strata": strata}
    metrics = [
        build_metric("nll", "negative log-likelihood", "nats/token", False, model, tokens, beside, **common),
        build_metric("next_token", "next token, exact match", "share", True, right, tokens, guessed, **common),
    ]
    if text_bytes.sum() > 0:
        # Bits of pictures would count as bits of the texts beside them.
        in_bits_of_text = in_bits * (text_bytes > 0)
        bits = {name: values * in_bits_of_text for name, values in beside.items()}
        per_byte = build_metric(
            "bits_per_byte", "bits per byte", "bits/byte", False, model * in_bits_of_text, text_bytes, bits, **common
        )
        metrics.insert(1, per_byte)
    return metrics


def _pieces(answer: dict[str, Any]) -> list[np.ndarray]:
    labels = np.asarray(answer["labels"], dtype=np.int64)
    return np.split(labels, np.cumsum(answer["pieces"])[:-1])
