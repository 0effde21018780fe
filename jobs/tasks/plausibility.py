"""Plausibility: whether the tokens that a choice rests on are those in the passages that people name (ERASER).

DeYoung et al. 2020, section 4.1, with precision at as many tokens as the passages have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jobs.tasks.base import Measure

METHODS = {"gradients": ("attribution", "integrated gradients"), "rollout": ("rollout", "attention rollout")}


def within(pieces: Sequence[str], passages: Sequence[str]) -> np.ndarray:
    """Bool `[pieces]`: whether a piece shares a character with a passage, at the last place where that stands.

    Of sentences that stand several times in a story, the last is meant; a passage that shortening cut away has none.
    """
    text = "".join(pieces)
    ends = np.cumsum([len(piece) for piece in pieces])
    starts = ends - [len(piece) for piece in pieces]
    inside = np.zeros(len(pieces), dtype=bool)
    for passage in passages:
        place = text.rfind(passage)
        if passage and place >= 0:
            inside |= (starts < place + len(passage)) & (ends > place)
    return inside


def share_and_precision(weights: np.ndarray, inside: np.ndarray) -> tuple[float, float]:
    """Share of the positive mass that is inside, and share of the k strongest tokens that are, k of them being inside.

    Without positive mass the share is that of the tokens.
    """
    positive = np.clip(weights, 0.0, None)
    total, count = positive.sum(), int(inside.sum())
    strongest = np.argsort(-weights, kind="stable")[:count]
    share = positive[inside].sum() / total if total > 0 else inside.mean()
    return float(share), float(inside[strongest].mean())


def plausible_measures(answers: Sequence[dict[str, Any]], passages: Sequence[Sequence[str]]) -> list[Measure]:
    """Share of mass and precision at k of both methods; a random order is expected to have the share of the tokens.

    Rows whose passages were cut away, or are the whole source, do not count; without any other there is no measure.
    """
    marked = [within(answer["pieces"], wanted) for answer, wanted in zip(answers, passages, strict=True)]
    counts = np.array([inside.any() and not inside.all() for inside in marked], dtype=float)
    if not counts.any():
        return []
    beside = {"random order": np.array([inside.mean() if c else 0.0 for inside, c in zip(marked, counts, strict=True)])}
    found = []
    for method, (field, title) in METHODS.items():
        figures = np.array(
            [
                share_and_precision(np.asarray(answer[field]), inside) if c else (0.0, 0.0)
                for answer, inside, c in zip(answers, marked, counts, strict=True)
            ]
        )
        for column, name, label in ((1, "precision", "precision at k"), (0, "mass", "share of the mass")):
            found.append(
                Measure(f"{method}_{name}", f"{label}, {title}", "share", True, figures[:, column], counts, beside)
            )
    return found
