"""Bootstrap confidence intervals over records: 95%, percentile method (Efron and Tibshirani 1993, section 13.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
CHUNK_COUNTS = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A figure over `n` records with the bounds of its 95% interval."""

    value: float
    low: float
    high: float
    n: int


def ratio_interval(
    numerators: np.ndarray,
    denominators: np.ndarray,
    rounds: int,
    seed: int,
    strata: np.ndarray | None = None,
) -> Interval:
    """sum(numerators) / sum(denominators) with the interval that resampling of records gives.

    Both arrays are `[records]`; records are drawn with replacement, within each stratum when `strata` (one label per
    record) is given. Two calls with one seed, one `rounds` and equal strata draw the same records. Raises ValueError
    when there is no record or the denominators sum to zero.
    """
    numerators = np.asarray(numerators, dtype=np.float64)
    denominators = np.asarray(denominators, dtype=np.float64)
    if numerators.size == 0 or denominators.sum() == 0:
        raise ValueError("no records to average over")
    groups = [np.arange(numerators.size)]
    if strata is not None:
        labels = np.asarray(strata)
        groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    generator = np.random.default_rng(seed)
    tops, bottoms = np.zeros(rounds), np.zeros(rounds)
    for group in groups:
        step = max(1, CHUNK_COUNTS // group.size)
        for start in range(0, rounds, step):
            size = min(step, rounds - start)
            drawn = generator.multinomial(group.size, np.full(group.size, 1.0 / group.size), size=size)
            tops[start : start + size] += drawn @ numerators[group]
            bottoms[start : start + size] += drawn @ denominators[group]
    ratios = tops[bottoms != 0] / bottoms[bottoms != 0]
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = numerators.sum() / denominators.sum()
    return Interval(float(value), float(low), float(high), int(numerators.size))


def statistic_interval(
    statistics: np.ndarray, figure: Callable[[np.ndarray], float], rounds: int, seed: int
) -> Interval:
    """`figure` of the column sums of `statistics` `[records, columns]`, with the interval of resampled records.

    Two calls with one seed, one `rounds` and equally many records draw the same records. Raises ValueError when there
    is no record.
    """
    records = len(statistics)
    if records == 0:
        raise ValueError("no records to average over")
    generator, figures = np.random.default_rng(seed), []
    for _ in range(rounds):
        drawn = generator.multinomial(records, np.full(records, 1.0 / records))
        figures.append(figure(drawn @ statistics))
    low, high = np.quantile(figures, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(figure(statistics.sum(axis=0))), float(low), float(high), records)


def mean_interval(values: np.ndarray, rounds: int, seed: int) -> Interval:
    """The mean of one value per record with its interval; raises ValueError when there is no record."""
    values = np.asarray(values, dtype=np.float64)
    return ratio_interval(values, np.ones(values.size), rounds, seed)


def difference_interval(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], paired: bool, rounds: int, seed: int
) -> Interval:
    """Ratio of sums of `first` minus that of `second`; each is (numerators, denominators), `[records]`.

    With `paired`, record i of both is the same one and both are drawn together; else each side is resampled by itself
    and `n` is the smaller number of records. Raises ValueError when a side has no record or nothing to divide by.
    """
    sides = [np.stack([np.asarray(part, dtype=np.float64) for part in side], axis=1) for side in (first, second)]
    if any(len(side) == 0 or side[:, 1].sum() == 0 for side in sides):
        raise ValueError("no records to average over")
    values = [side[:, 0].sum() / side[:, 1].sum() for side in sides]
    generator, differences = np.random.default_rng(seed), []
    step = max(1, CHUNK_COUNTS // max(map(len, sides)))
    for start in range(0, rounds, step):
        size = min(step, rounds - start)
        drawn = [
            generator.multinomial(len(side), np.full(len(side), 1.0 / len(side)), size=size)
            for side in (sides[:1] if paired else sides)
        ]
        first_sums, second_sums = drawn[0] @ sides[0], drawn[-1] @ sides[1]
        defined = (first_sums[:, 1] != 0) & (second_sums[:, 1] != 0)
        ratios = [sums[defined, 0] / sums[defined, 1] for sums in (first_sums, second_sums)]
        differences.extend(ratios[0] - ratios[1])
    low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values[0] - values[1]), float(low), float(high), min(map(len, sides)))
