"""Completions of function bodies: the share that compiles together with its signature. Nothing is executed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from configs.schema import RunConfig
from data.held_out import HeldOut
from jobs.tasks.base import Example, Generate, Metric, NoHeadline, Row, TrainingFacts, build_metric

LONGEST_SOURCE = 100_000


class Completion(NoHeadline):
    """Greedy bodies for held-out signatures."""

    name = "completion"
    version = 1
    signature = "compile(signature + body, mode exec) of greedy outputs, cut at evaluate.max_new_tokens"

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
        """Share that compiles beside the reference bodies and always `pass`; share of outputs that ended with eos."""
        signatures = [example.record.fields["signature"] for example in examples]
        bodies = [example.record.fields["body"] for example in examples]
        ones = np.ones(len(rows))

        def share(outputs: Sequence[str]) -> np.ndarray:
            return np.array([compiles(s, o) for s, o in zip(signatures, outputs, strict=True)], dtype=np.float64)

        outputs = [row.answers[0]["text"] for row in rows]
        return [
            build_metric(
                "compiles",
                "completions that compile",
                "share",
                True,
                share(outputs),
                ones,
                {"always pass": share(["    pass"] * len(rows)), "reference": share(bodies)},
                config.evaluate,
                config.run.seed,
            ),
            build_metric(
                "ended",
                "completions that end by themselves",
                "share",
                True,
                np.array([row.answers[0]["ended"] for row in rows], dtype=np.float64),
                ones,
                {},
                config.evaluate,
                config.run.seed,
            ),
        ]

    def output(self, example: Example, row: Row) -> str | None:
        """The greedy body."""
        return row.answers[0]["text"]


def compiles(signature: str, body: str) -> bool:
    """Whether signature and body together are valid Python; the code is compiled, never run.

    A body that the parser gives up on (nesting, numbers too long, no memory) does not compile.
    """
    source = program(signature, body)
    if len(source) > LONGEST_SOURCE:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(source, "<completion>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
            return False
    return True


def program(signature: str, body: str) -> str:
    """Signature and body as one piece of source, joined the way the records are cut (`data.python_source`)."""
    return f"{signature}\n{body}\n"
