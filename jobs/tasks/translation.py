"""Translations: corpus BLEU and chrF++ as sacreBLEU computes them (Post 2018), beside copying the source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
import sacrebleu
from sacrebleu.metrics import BLEU

from configs.schema import RunConfig
from data.held_out import HeldOut
from jobs.tasks.base import Example, Generate, Metric, NoHeadline, Row, TrainingFacts, statistic_metric

# chrF++ has character 6-grams and word bigrams, beta 2 (Popovic 2017).
CHRF = "nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|version:" + sacrebleu.__version__
SIGNATURE = f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
ORDERS = 4


class Translation(NoHeadline):
    """One output per record, by `evaluate.beams`, against the record's target."""

    name = "translation"
    version = 2
    signature = f"sacreBLEU {SIGNATURE}; lower-cased: case:lc; chrF++ {CHRF}"

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
        """BLEU, cased and lower-cased, and chrF++, from 0 to 100; rounds resample records, not sentences' scores."""
        references = [example.record.target for example in examples]
        copied = [example.record.source for example in examples]
        outputs = [row.answers[0]["text"] for row in rows]
        metrics = []
        for name, label, unit, sums_of, figure in FIGURES:
            own, other = (sums_of(texts, references) for texts in (outputs, copied))
            beside = {"source copied": other}
            metrics.append(
                statistic_metric(name, label, unit, True, own, figure, beside, config.evaluate, config.run.seed)
            )
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


def chrf_statistics(outputs: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """What chrF++ sums over records, `[records, 24]`: of each order the n-grams of output, reference, and both."""
    metric = _chrf()
    # The library's own bootstrap works on these; its public functions give scores alone.
    found = [metric._extract_corpus_statistics([out], [[ref]])[0] for out, ref in zip(outputs, references, strict=True)]
    return np.array(found, dtype=np.float64)


def chrf(sums: np.ndarray) -> float:
    """chrF++ of summed statistics `[24]`, from 0 to 100 (Popovic 2017): the F-scores of all orders, averaged."""
    return float(_chrf()._compute_f_score([round(value) for value in sums.tolist()]))


@lru_cache(maxsize=1)
def _chrf() -> sacrebleu.metrics.CHRF:
    return sacrebleu.metrics.CHRF(word_order=2)


FIGURES: tuple[tuple[str, str, str, Callable[..., np.ndarray], Callable[[np.ndarray], float]], ...] = (
    ("bleu", "sacreBLEU", "BLEU", statistics, bleu),
    ("bleu_lc", "sacreBLEU, lower-cased", "BLEU", partial(statistics, lowercase=True), bleu),
    ("chrf_pp", "chrF++", "chrF++", chrf_statistics, chrf),
)
