"""One optimizer step as all ranks see it: what it reports, what they agree on beforehand, when it is an error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from configs.errors import TelarError
from model.batch import ModelBatch
from model.mesh import ParallelContext


class TrainingError(TelarError):
    """Training cannot go on: the loss or the gradient is not finite, or there is nothing to learn from."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on all ranks.

    `loss` (label-smoothed) and `nll` in nats are means over the target tokens of the global batch, `grad_norm` is the
    L2 norm of the global gradient before clipping, `stop` says that some rank asked for a stop.
    """

    loss: float
    nll: float
    grad_norm: float
    target_tokens: int
    stop: bool


class Agreed(NamedTuple):
    """What all ranks know of a step before it: global loss weight and target tokens, whether any wants to stop."""

    weight: float
    tokens: int
    stop: bool


def agree(
    batches: Sequence[ModelBatch], step: int, stop: bool, context: ParallelContext, device: torch.device
) -> Agreed:
    """Add up the global batch by one all-reduce; raises TrainingError when it has no target token.

    `batches` are this replica's, the same on all its ranks and equally many for each replica.
    """
    counted = batches if context.speaks else ()
    weight = sum(float(batch.loss_weight.sum(dtype=torch.float64)) for batch in counted)
    tokens = sum(int((batch.loss_weight != 0).sum()) for batch in counted)
    count = len(batches)
    mine = torch.tensor([weight, tokens, float(stop), count, count**2], dtype=torch.float64, device=device)
    dist.all_reduce(mine)
    weight, tokens, stops, counts, squares = mine.tolist()
    assert squares * dist.get_world_size() == counts**2, "ranks were given different numbers of micro-batches"
    assert count > 0, "a step needs at least one micro-batch"
    if weight <= 0:
        raise TrainingError(f"step {step}: no target token in the global batch; look at the data that was prepared")
    return Agreed(weight, int(tokens), stops > 0)


def check_finite(value: float, name: str, step: int, learning_rate: float) -> None:
    """Raise TrainingError, with what may help, unless the step's loss or norm is a number."""
    if not math.isfinite(value):
        raise TrainingError(
            f"step {step}: {name} is {value}; the learning rate was {learning_rate:.3g}: lower "
            "optimizer.learning_rate, raise optimizer.warmup_steps or set optimizer.gradient_clipping"
        )
