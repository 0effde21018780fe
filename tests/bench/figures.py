"""Pure statistics over measurements: medians and spreads, ratios, ledgers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of some repeats."""

    middle: float
    low: float
    high: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(median(values), min(values), max(values), len(values))


def ratio(one: Sequence[float], other: Sequence[float]) -> Spread:
    """`one` / `other`, measured in pairs of the same repeat: the middle is that of the pairs' ratios."""
    return spread([a / b for a, b in zip(one, other, strict=True)])


def best_peer(values: dict[str, Sequence[float]], own: Sequence[str]) -> str | None:
    """The name with the greatest median that is not in `own`; None when there is none."""
    peers = {name: median(found) for name, found in values.items() if name not in own and found}
    return max(peers, key=peers.__getitem__) if peers else None


def ledger(ids: np.ndarray, first: int, samples: int) -> dict[str, int]:
    """How many of the samples [first, first + samples) are missing or seen again, and how many ids are none of them."""
    known = (ids >= first) & (ids < first + samples)
    counts = np.bincount(ids[known] - first, minlength=samples)
    return {
        "lost": int((counts == 0).sum()),
        "doubled": int(np.maximum(counts - 1, 0).sum()),
        "unknown": int((~known).sum()),
    }
