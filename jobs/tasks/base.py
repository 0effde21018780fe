"""What a task is: examples made of held-out records, requests to the model, and a score over the answered rows.

A task never sees the model: it states requests, the evaluators answer them, and `score` turns answers into metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from configs.schema import EvaluateSection, RunConfig
from data.held_out import HeldOut
from jobs.intervals import Interval, ratio_interval, statistic_interval
from jobs.ngrams import NGrams


@dataclass(frozen=True)
class Generate:
    """Ask for the greedy output given a source text. Answer: {"text": str, "tokens": int, "ended": bool}."""

    source: str


@dataclass(frozen=True)
class Attempts:
    """Ask for several outputs that are drawn, given a source text.

    Answer: {"texts": one for each attempt, "tokens": of all together}. What is drawn depends on `seed` and the source.
    """

    source: str
    number: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Draw:
    """Ask for the picture of a caption: the most probable image code at each place.

    Answer: {"codes": row by row, "side": pixels, "pixels": uint8 [side, side, 3] in base64, "tokens": codes written}.
    """

    source: str


@dataclass(frozen=True)
class LogLikelihood:
    """Ask how likely a target text is given a source text.

    Answer: {"labels": token ids with eos, "pieces": how many labels each decoder input holds (long targets are cut,
    each piece starts after bos), "nll": nats of each label, "correct": whether it was the most probable token,
    "bytes": UTF-8 bytes of the text that the labels stand for, 0 for a picture}.
    """

    source: str
    target: str


@dataclass(frozen=True)
class Choices:
    """Ask how likely each of several candidate targets is given one source text.

    Answer: {"nll": nats of each whole candidate with eos, "tokens": labels scored of each, "bytes": UTF-8 bytes of the
    text that they stand for}, lists in the order of `targets`.
    """

    source: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Explain:
    """Ask which tokens of the source the likeliest of several candidates rests on.

    Answer: {"chosen": number of the candidate, "pieces": texts of the source's tokens, "attribution": one number each,
    "gap": what their sum misses, "rollout": share of each token by attention rollout, "written": texts of the tokens
    that the decoder reads, "maps": heat maps by name as lists of rows, none where the tokens are more than
    `jobs.looking.MAP_TOKENS`, and the figures of `jobs.attributions.faithfulness`}.
    """

    source: str
    targets: tuple[str, ...]


Request = Generate | Attempts | Draw | LogLikelihood | Choices | Explain


@dataclass(frozen=True)
class Example:
    """One held-out record with its requests, in the order in which `score` finds the answers."""

    record: HeldOut
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Row:
    """The answers to one example, one per request, or the error that kept it from being answered."""

    index: int
    answers: tuple[dict[str, Any], ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Baseline:
    """A figure to hold a metric against; `difference` is metric minus baseline, paired over the same records."""

    name: str
    value: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float


@dataclass(frozen=True)
class Metric:
    """One figure of a cell with its 95% interval over `n` records, and baselines on the same records.

    `higher_is_better` is None for a figure that should be neither above nor below its baseline (a bias).
    """

    name: str
    label: str
    value: float
    low: float
    high: float
    n: int
    unit: str
    higher_is_better: bool | None
    tokens: int | None = None
    baselines: tuple[Baseline, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON object of the metric."""
        return asdict(self)


@dataclass(frozen=True)
class TrainingFacts:
    """What baselines may know: n-gram counts of the tokens trained on, and training targets as text.

    `targets` gives for a corpus some of its training targets (a sample, repeats included).
    """

    ngrams: NGrams
    targets: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Measure:
    """A figure that is a ratio of sums over records, before intervals; all arrays are `[records]`.

    `higher_is_better` as in `Metric`.
    """

    name: str
    label: str
    unit: str
    higher_is_better: bool | None
    numerators: np.ndarray
    denominators: np.ndarray
    baselines: dict[str, np.ndarray] = field(default_factory=dict)

    def of(self, chosen: np.ndarray) -> Measure:
        """The same over the records whose numbers are `chosen`."""
        beside = {name: np.asarray(values)[chosen] for name, values in self.baselines.items()}
        return replace(
            self,
            numerators=np.asarray(self.numerators)[chosen],
            denominators=np.asarray(self.denominators)[chosen],
            baselines=beside,
        )


class Task(Protocol):
    """One way to judge records: the held-out ones of a corpus, or rows of a task of its own.

    `headline` names the figure that other domains are compared by, None where there is none that is a ratio of sums.
    """

    name: str
    version: int
    signature: str
    headline: str | None

    def limit(self, config: RunConfig) -> int:
        """The most records of one corpus that are judged."""

    def examples(self, records: Sequence[HeldOut], corpus_task: str, config: RunConfig) -> list[Example]:
        """Examples of a cell, one per record and in the records' order."""

    def score(
        self, examples: Sequence[Example], rows: Sequence[Row], facts: TrainingFacts, corpus: str, config: RunConfig
    ) -> list[Metric]:
        """Metrics over answered rows; `examples` and `rows` are aligned, rows with an error are left out before."""

    def measure(self, examples: Sequence[Example], rows: Sequence[Row]) -> Measure:
        """The headline's values, one per record; asked for only where there is a headline."""

    def output(self, example: Example, row: Row) -> str | None:
        """The text that the model wrote or chose for an example, or None where it did neither."""


class NoHeadline:
    """What a task has whose figures are no ratios of sums that other domains could be compared by."""

    headline: str | None = None

    def measure(self, examples: Sequence[Example], rows: Sequence[Row]) -> Measure:
        """Never asked for."""
        raise NotImplementedError("a task without a headline has no values to compare")


def build_metric(
    name: str,
    label: str,
    unit: str,
    higher_is_better: bool | None,
    numerators: np.ndarray,
    denominators: np.ndarray,
    baselines: dict[str, np.ndarray],
    evaluate: EvaluateSection,
    seed: int,
    tokens: int | None = None,
    strata: np.ndarray | None = None,
) -> Metric:
    """A metric that is a ratio of sums over records, with baselines that share its denominators.

    `numerators`, `denominators` and each baseline are `[records]`. All intervals resample the same records, so a
    difference is paired.
    """

    def interval(values: np.ndarray) -> Interval:
        return ratio_interval(values, denominators, evaluate.bootstrap_rounds, seed, strata)

    own = interval(numerators)
    entries = []
    for title, values in baselines.items():
        theirs, difference = interval(values), interval(np.asarray(numerators) - np.asarray(values))
        entries.append(
            Baseline(title, *_bounds(theirs), difference.value, difference.low, difference.high),
        )
    return Metric(name, label, *_bounds(own), own.n, unit, higher_is_better, tokens, tuple(entries))


def metric_of(measure: Measure, config: RunConfig) -> Metric:
    """A measure with its intervals."""
    return build_metric(
        measure.name,
        measure.label,
        measure.unit,
        measure.higher_is_better,
        measure.numerators,
        measure.denominators,
        measure.baselines,
        config.evaluate,
        config.run.seed,
    )


def statistic_metric(
    name: str,
    label: str,
    unit: str,
    higher_is_better: bool | None,
    statistics: np.ndarray,
    figure: Callable[[np.ndarray], float],
    baselines: dict[str, np.ndarray],
    evaluate: EvaluateSection,
    seed: int,
) -> Metric:
    """A metric that `figure` makes of column sums over records, with baselines on the same records.

    `statistics` and each baseline are `[records, columns]`, of any number of columns that `figure` takes. All intervals
    resample the same records, so a difference is paired.
    """
    rounds, width = evaluate.bootstrap_rounds, statistics.shape[1]

    def gain(sums: np.ndarray) -> float:
        return figure(sums[:width]) - figure(sums[width:])

    own = statistic_interval(statistics, figure, rounds, seed)
    entries = []
    for title, values in baselines.items():
        theirs = statistic_interval(values, figure, rounds, seed)
        difference = statistic_interval(np.hstack([statistics, values]), gain, rounds, seed)
        entries.append(Baseline(title, *_bounds(theirs), *_bounds(difference)))
    return Metric(name, label, *_bounds(own), own.n, unit, higher_is_better, None, tuple(entries))


def _bounds(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high
