"""Which source tokens a choice rests on, and whether it does: integrated gradients with comprehensiveness, sufficiency.

Integrated gradients: Sundararajan et al. 2017, equation 1; faithfulness: DeYoung et al. 2020 (ERASER), section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

from model.batch import ModelBatch
from model.transformer import Transformer

# Points of the path, in the middle of equal parts.
STEPS = 20
# Shares of the source that are taken away or kept; figures are means over them.
SHARES = (0.1, 0.2, 0.5)
RANDOM_ORDERS = 3

Probability = Callable[[Sequence[np.ndarray]], np.ndarray]


def integrated_gradients(
    model: Transformer, batch: ModelBatch, place: slice, pad_id: int, chosen: int
) -> tuple[np.ndarray, float]:
    """Attributions of the source's tokens `[source]`, and by how much their sum misses what it should be.

    Rows of `batch` are one source with each candidate; the source stands at `place` of what the first layer reads. What
    is explained is the log-probability of candidate `chosen` among all; the baseline is the same source of padding
    tokens, and the sum should be the difference of both.
    """
    first, *between = model.layers()[:-1]
    inputs = tuple(batch.inputs)
    # An encoder reads the first tensor, a decoder without one the fourth.
    reads = 0 if inputs[0].shape[1] else 3
    key = torch.zeros(2, dtype=torch.int64)
    blank = inputs[reads].clone()
    blank[:, place] = pad_id
    with torch.no_grad():
        own, *rest = first((*inputs, key))
        base = first((*inputs[:reads], blank, *inputs[reads + 1 :], key))[0]

    def value(embedded: Tensor) -> Tensor:
        state = (embedded, *rest)
        for layer in between:
            state = layer(state)
        found = model.head.scores(state).log_softmax(-1)
        labels = batch.labels.long().clamp(min=0).unsqueeze(-1)
        of_label = found.gather(-1, labels).squeeze(-1)
        return torch.where(batch.loss_weight > 0, of_label, 0.0).sum(-1).log_softmax(0)[chosen]

    total = torch.zeros_like(own)
    for step in range(STEPS):
        point = (base + (step + 0.5) / STEPS * (own - base)).requires_grad_()
        (gradient,) = torch.autograd.grad(value(point), point)
        total += gradient / STEPS
    attributions = ((own - base) * total).sum((0, 2))[place]
    with torch.no_grad():
        gap = float(attributions.sum() - (value(own) - value(base)))
    return attributions.double().numpy(), gap


def faithfulness(source: np.ndarray, attributions: np.ndarray, probability: Probability) -> dict[str, float]:
    """How the chosen candidate's probability falls when tokens go, by attribution and in random order.

    `probability` gives it for several sources. Comprehensiveness: without the tokens of highest attribution (higher is
    more faithful); sufficiency: with them alone (lower is). Each is the mean over SHARES.
    """
    generator = np.random.default_rng(xxhash.xxh3_64_intdigest(np.ascontiguousarray(source).tobytes()))
    orders = [np.argsort(-attributions, kind="stable")]
    orders += [generator.permutation(len(source)) for _ in range(RANDOM_ORDERS)]
    changed = [source]
    for order in orders:
        for share in SHARES:
            top = np.zeros(len(source), dtype=bool)
            top[order[: math.ceil(share * len(source))]] = True
            changed += [source[~top], source[top]]
    found = np.asarray(probability(changed), dtype=np.float64)
    # [order, share, without or with alone]
    falls = (found[0] - found[1:]).reshape(len(orders), len(SHARES), 2).mean(axis=1)
    return {
        "probability": float(found[0]),
        "comprehensiveness": float(falls[0, 0]),
        "sufficiency": float(falls[0, 1]),
        "random_comprehensiveness": float(falls[1:, 0].mean()),
        "random_sufficiency": float(falls[1:, 1].mean()),
    }
