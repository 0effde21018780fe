"""One micro-batch as tensors, the way the engine takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class ModelBatch:
    """A micro-batch; `index` is its number within the global batch and seeds its dropout.

    `inputs`: int tensors source_tokens, source_positions, source_segments `[batch, source]` and target_tokens,
    target_positions, target_segments `[batch, target]`. Segment 0 is padding; source and target of one pair share
    a number > 0. `labels` int `[batch, target]`, `loss_weight` float32 `[batch, target]`, 0 where nothing is learned.
    """

    index: int
    inputs: Inputs
    labels: Tensor
    loss_weight: Tensor

    @classmethod
    def from_numpy(
        cls, index: int, inputs: Sequence[np.ndarray], labels: np.ndarray, loss_weight: np.ndarray
    ) -> ModelBatch:
        """Tensors that share the arrays' memory; an array that may not be written to is copied."""
        return cls(index, tuple(_tensor(array) for array in inputs), _tensor(labels), _tensor(loss_weight))

    def to(self, device: torch.device) -> ModelBatch:
        """The same batch on `device`."""
        inputs = tuple(tensor.to(device, non_blocking=True) for tensor in self.inputs)
        return ModelBatch(self.index, inputs, self.labels.to(device), self.loss_weight.to(device))

    def trimmed(self) -> ModelBatch:
        """Without the columns that are padding in every row; without any loss weight, one position of one row.

        Neither changes the loss or a gradient: padding is attended to by padding only.
        """
        if not bool((self.loss_weight != 0).any()):
            inputs = tuple(tensor[:1, :1] for tensor in self.inputs)
            return ModelBatch(self.index, inputs, self.labels[:1, :1], self.loss_weight[:1, :1])
        source, target = _used_columns(self.inputs[2]), _used_columns(self.inputs[5])
        widths = (source, source, source, target, target, target)
        inputs = tuple(tensor[:, :width] for tensor, width in zip(self.inputs, widths, strict=True))
        return ModelBatch(self.index, inputs, self.labels[:, :target], self.loss_weight[:, :target])


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _used_columns(segments: Tensor) -> int:
    """How many columns `[batch, sequence]` has up to the last one that is not padding everywhere; at least 1."""
    used = (segments > 0).any(0).nonzero()
    return int(used[-1]) + 1 if len(used) else 1
