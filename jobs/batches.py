"""Where data meets model: a micro-batch of arrays as a micro-batch of tensors."""

from __future__ import annotations

import numpy as np

from data.batches import Batch
from model.batch import ModelBatch


def to_model(batch: Batch) -> ModelBatch:
    """A data batch as the model's batch; arrays `[batch, sequence]` become tensors that share their memory.

    So they are valid as long as the batch is, and nothing may write to them.
    """
    inputs = (
        batch.source_tokens,
        batch.source_positions,
        batch.source_segments,
        batch.target_tokens,
        batch.target_positions,
        batch.target_segments,
    )
    return ModelBatch.from_numpy(
        batch.index, [_writable(array) for array in inputs], _writable(batch.labels), _writable(batch.loss_weight)
    )


def _writable(array: np.ndarray) -> np.ndarray:
    """The array, marked as one that may be written to: PyTorch knows no other tensors, and others are copied."""
    if array.flags.writeable:
        return array
    view = array.view()
    view.flags.writeable = True
    return view
