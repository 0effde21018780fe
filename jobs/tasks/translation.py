"""Translations: corpus BLEU as sacreBLEU computes it (Post 2018), cased and lower-cased, beside copying the source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import sacrebleu
from sacrebleu.metrics import BLEU

from configs.schema import RunConfig
from data.held_out import HeldOut
from jobs.intervals import Interval, statistic_interval
from jobs.tasks.base import Baseline, Example, Generate, Metric, NoHeadline, Row, TrainingFacts

SIGNATURE = f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
ORDERS = 4
COLUMNS = 2 * ORDERS + 2


class Translation(NoHeadline):
    """One output per record, by `evaluate.beams`, against the record's target."""

    name = "translation"
    version = 1
    signature = f"sacreBLEU {SIGNATURE}; lower-cased: case:lc"

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
        """BLEU from 0 to 100, cased and lower-cased; each bootstrap round resamples records, not sentences' scores."""
        references = [example.record.target for example in examples]
        copied = [example.record.source for example in examples]
        outputs = [row.answers[0]["text"] for row in rows]
        rounds, seed = config.evaluate.bootstrap_rounds, config.run.seed
        metrics = []
        for name, label, lowercase in (("bleu", "sacreBLEU", False), ("bleu_lc", "sacreBLEU, lower-cased", True)):
            own, other = (statistics(texts, references, lowercase) for texts in (outputs, copied))
            found, base = (statistic_interval(each, bleu, rounds, seed) for each in (own, other))
            difference = statistic_interval(np.hstack([own, other]), gain, rounds, seed)
            baselines = (Baseline("source copied", *_bounds(base), *_bounds(difference)),)
            metrics.append(Metric(name, label, *_bounds(found), found.n, "BLEU", True, None, baselines))
        return metrics

    def output(self, example: Example, row: Row) -> str | None:
        """The translation."""
        return row.answers[0]["text"]


def statistics(outputs: Sequence[str], references: Sequence[str], lowercase: bool = False) -> np.ndarray:
    """What BLEU sums over records, `[records, 10]`: matches and counts of 1- to 4-grams, lengths of output, reference.

    N-grams are of tokens by sacreBLEU's 13a rules.
    """
    # Counts do not depend on effective_order; sacreBLEU warns when sentences are scored without it.
    metric = BLEU(lowercase=lowercase, effective_order=True)
    found = [metric.sentence_score(out, [ref]) for out, ref in zip(outputs, references, strict=True)]
    return np.array([[*each.counts, *each.totals, each.sys_len, each.ref_len] for each in found], dtype=np.float64)


def bleu(sums: np.ndarray) -> float:
    """BLEU of summed statistics `[10]`, from 0 to 100 (Papineni et al. 2002), with sacreBLEU's smoothing of zeros."""
    whole = [round(value) for value in sums.tolist()]
    matches, counts, (output, reference) = whole[:ORDERS], whole[ORDERS : 2 * ORDERS], whole[2 * ORDERS :]
    return BLEU.compute_bleu(matches, counts, output, reference, smooth_method="exp").score


def gain(sums: np.ndarray) -> float:
    """BLEU of the first ten columns minus that of the other ten."""
    return bleu(sums[:COLUMNS]) - bleu(sums[COLUMNS:])


def _bounds(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high
