"""How likely the model holds held-out targets to be, beside n-gram models counted on what it was trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from configs.schema import RunConfig
from data.held_out import HeldOut
from jobs.tasks.base import Example, Generate, LogLikelihood, Metric, Row, TrainingFacts, build_metric


class Likelihood:
    """Negative log-likelihood and exact match of the next token, every label (eos included) given those before it."""

    name = "likelihood"
    version = 1
    signature = "mean over target tokens, eos included; n-grams: Witten-Bell, counted on the training targets"

    def limit(self, config: RunConfig) -> int:
        """`evaluate.likelihood_records`."""
        return config.evaluate.likelihood_records

    def examples(self, records: Sequence[HeldOut], corpus_task: str, config: RunConfig) -> list[Example]:
        """One likelihood per record; a corpus that no other task generates for also gets a few outputs to show."""
        shown = config.evaluate.samples if corpus_task == "likelihood" else 0
        return [
            Example(
                record,
                (LogLikelihood(record.source, record.target), *([Generate(record.source)] if i < shown else [])),
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

    def output(self, row: Row) -> str | None:
        """The greedy output, where one was asked for."""
        return row.answers[1]["text"] if len(row.answers) > 1 else None


def likelihood_metrics(
    rows: Sequence[Row], facts: TrainingFacts, config: RunConfig, strata: np.ndarray | None = None
) -> list[Metric]:
    """Token-weighted metrics over rows of one corpus, or of several when `strata` names each row's corpus."""
    ngrams, answers = facts.ngrams, [row.answers[0] for row in rows]
    labels = [np.asarray(answer["labels"], dtype=np.int64) for answer in answers]
    tokens = np.array([label.size for label in labels])
    seed = config.run.seed

    def sums(values: list[np.ndarray]) -> np.ndarray:
        return np.array([np.sum(value) for value in values], dtype=np.float64)

    model = sums([np.asarray(answer["nll"], dtype=np.float64) for answer in answers])
    beside = {
        "unigram": sums([ngrams.unigram_nll(label) for label in labels]),
        "bigram": sums([ngrams.bigram_nll(label) for label in labels]),
    }
    right = sums([np.asarray(answer["correct"], dtype=np.float64) for answer in answers])
    guess, guesses = ngrams.unigram_guess(), ngrams.bigram_guesses()
    histories = [np.concatenate([[ngrams.bos_id], label[:-1]]).astype(np.int64) for label in labels]
    guessed = {
        "unigram": sums([label == guess for label in labels]),
        "bigram": sums([label == guesses[history] for label, history in zip(labels, histories, strict=True)]),
    }
    in_bits = 1.0 / math.log(2)
    text_bytes = np.array([answer["bytes"] for answer in answers], dtype=np.float64)
    common = {"evaluate": config.evaluate, "seed": seed, "tokens": int(tokens.sum()), "strata": strata}
    metrics = [
        build_metric("nll", "negative log-likelihood", "nats/token", False, model, tokens, beside, **common),
        build_metric("next_token", "next token, exact match", "share", True, right, tokens, guessed, **common),
    ]
    if text_bytes.sum() > 0:
        bits = {name: values * in_bits for name, values in beside.items()}
        per_byte = build_metric(
            "bits_per_byte", "bits per byte", "bits/byte", False, model * in_bits, text_bytes, bits, **common
        )
        metrics.insert(1, per_byte)
    return metrics
