"""Where data meets model: a micro-batch of arrays as a micro-batch of tensors."""

from __future__ import annotations

from data.batches import Batch
from model.batch import ModelBatch


def to_model(batch: Batch) -> ModelBatch:
    """A data batch as the model's batch; arrays `[batch, sequence]` become tensors that share their memory."""
    return ModelBatch.from_numpy(
        batch.index,
        (
            batch.source_tokens,
            batch.source_positions,
            batch.source_segments,
            batch.target_tokens,
            batch.target_positions,
            batch.target_segments,
        ),
        batch.labels,
        batch.loss_weight,
    )
