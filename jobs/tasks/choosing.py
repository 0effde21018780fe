"""From the log-likelihoods of candidate targets to choices: scores by normalisation, probabilities, calibration.

Candidates may differ in number from record to record. All functions are pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

Normalisation = Literal["sum", "byte", "token"]
# As in Guo et al. 2017 (On Calibration of Modern Neural Networks), section 4.
BINS = 15


def scores(answer: dict[str, Any], normalisation: Normalisation = "sum") -> np.ndarray:
    """Log-likelihood of each candidate in nats `[candidates]`: the sum, or per UTF-8 byte or token of the candidate."""
    nll = np.asarray(answer["nll"], dtype=np.float64)
    if normalisation == "byte":
        return -nll / np.maximum(np.asarray(answer["bytes"]), 1)
    return -nll / np.asarray(answer["tokens"]) if normalisation == "token" else -nll


def probabilities(found: np.ndarray) -> np.ndarray:
    """Softmax of scores `[candidates]`."""
    powers = np.exp(found - found.max())
    return powers / powers.sum()


def wins(found: np.ndarray) -> np.ndarray:
    """1 for the candidate with the highest score, `[candidates]`; equal ones share it, so order decides nothing."""
    best = found == found.max()
    return best / best.sum()


def f1_columns(won: Sequence[np.ndarray], answers: Sequence[int], labels: int) -> np.ndarray:
    """What F1 sums over records, `[records, 3 * labels]`: of each label the hits, the guesses and the occurrences."""
    guesses = np.stack(won) if len(won) else np.zeros((0, labels))
    occurrences = np.eye(labels)[np.asarray(answers, dtype=np.int64)]
    return np.hstack([guesses * occurrences, guesses, occurrences])


def macro_f1(sums: np.ndarray) -> float:
    """Unweighted mean over labels of F1 = 2 hits / (guesses + occurrences), from summed `f1_columns`.

    A label that is neither guessed nor occurs is left out, as scikit-learn does for labels that it does not meet.
    """
    hits, guesses, occurrences = np.split(sums, 3)
    met = guesses + occurrences > 0
    return float(np.mean(2 * hits[met] / (guesses + occurrences)[met]))


def calibration_columns(found: Sequence[np.ndarray], answers: Sequence[int], bins: int = BINS) -> np.ndarray:
    """What the calibration error sums, `[records, bins + 1]`: confidence minus hit in its bin, and a one to count.

    The confidence is the highest probability; bins are equally wide and closed above.
    """
    columns = np.zeros((len(found), bins + 1))
    columns[:, bins] = 1.0
    for row, (each, answer) in enumerate(zip(found, answers, strict=True)):
        confidence = float(probabilities(each).max())
        place = min(max(int(np.ceil(confidence * bins)) - 1, 0), bins - 1)
        columns[row, place] = confidence - wins(each)[answer]
    return columns


def calibration_error(sums: np.ndarray) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3) from summed `calibration_columns`, 0 to 1."""
    return float(np.abs(sums[:-1]).sum() / sums[-1])
