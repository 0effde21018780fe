"""Last layers: scores of the next token, and of the class of a text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import ModelSection
from model.loss import LossSums, chunked_cross_entropy
from model.mesh import ALONE, Axis
from model.packed import project
from model.parallel_linear import copied, gathered
from model.rounding import Rounding, as_trained
from model.sliced import mark, slice_of


class Head(nn.Module):
    """The output projection, without bias: the embedding matrix (section 3.4 of the paper) or one of its own.

    `weight` has the rows of this rank of `tensor`; `rounding` is for quantization-aware training.
    """

    rounding: Rounding | None = None

    def __init__(
        self,
        weight: nn.Parameter,
        tied: bool = True,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        tensor: Axis = ALONE,
    ) -> None:
        super().__init__()
        self.rows, self.tensor = slice_of(weight), tensor
        self.weight = weight
        if not tied:
            self.weight = nn.Parameter(torch.empty_like(weight))
            if self.rows is not None:
                mark(self.weight, self.rows)
        self.label_smoothing, self.z_loss = label_smoothing, z_loss

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., d_model]` -> float32 `[..., vocabulary]`."""
        own = project(copied(hidden, self.tensor), as_trained(self.weight, self.rounding)).float()
        return gathered(own, self.rows, self.tensor)

    def scores(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Float32 `[batch, target, vocabulary]` from what the layer before hands on."""
        return self.logits(inputs[0])

    def forward(self, inputs: tuple[Tensor, ...], labels: Tensor, loss_weight: Tensor) -> LossSums:
        """Loss and nll summed over the positions `[batch, target]` that have weight."""
        return chunked_cross_entropy(
            inputs[0],
            as_trained(self.weight, self.rounding),
            labels,
            loss_weight,
            self.label_smoothing,
            z_loss=self.z_loss,
            rows=self.rows,
            tensor=self.tensor,
        )


class ClassHead(nn.Module):
    """Classes of texts: the outputs of a segment are pooled, and projected to `classes` scores.

    A target position asks for the class of the source segment that has its number; labels are classes from 0.
    """

    def __init__(self, model: ModelSection, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.projection = nn.Linear(model.d_model, model.class_count)
        self.pooling, self.label_smoothing = model.pooling, label_smoothing

    def scores(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Float32 `[batch, target, classes]`; a segment without source tokens gets the projection's bias."""
        hidden, positions, segments, target_segments, _ = inputs
        chosen = target_segments.unsqueeze(-1) == segments.unsqueeze(-2)
        if self.pooling == "first":
            chosen = chosen & (positions == 0).unsqueeze(-2)
        weights = chosen.to(hidden.dtype)
        pooled = weights @ hidden / weights.sum(-1, keepdim=True).clamp(min=1.0)
        return self.projection(pooled).float()

    def forward(self, inputs: tuple[Tensor, ...], labels: Tensor, loss_weight: Tensor) -> LossSums:
        """Loss and nll summed over the positions `[batch, target]` that have weight."""
        scores = self.scores(inputs).flatten(0, 1)
        # Positions without weight may hold any label.
        labels = torch.where(loss_weight > 0, labels, 0).flatten().long()
        weight = loss_weight.flatten()
        smoothed = F.cross_entropy(scores, labels, reduction="none", label_smoothing=self.label_smoothing)
        nll = F.cross_entropy(scores.detach(), labels, reduction="none")
        return LossSums(smoothed @ weight, nll @ weight)
