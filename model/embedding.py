"""First layers: token embeddings with positions, for each architecture, and the bridge from encoder to decoder."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import ModelSection
from model.dropout import SeededDropout
from model.mesh import ALONE, Axis
from model.parallel_linear import embedded
from model.positions import sinusoidal_positions
from model.rounding import Rounding, as_trained
from model.sliced import slice_of


class Embedding(nn.Module):
    """Token embedding times sqrt(d_model) plus positions, with dropout: sections 3.4, 3.5 and 5.4 of the paper.

    `weight` has the rows of this rank of `tensor`; `rounding` is for quantization-aware training.
    """

    rounding: Rounding | None = None

    def __init__(self, weight: nn.Parameter, model: ModelSection, seed: int, name: str, tensor: Axis = ALONE) -> None:
        super().__init__()
        self.weight, self.rows, self.tensor = weight, slice_of(weight), tensor
        self.scale = math.sqrt(model.d_model) if model.scale_embeddings else 1.0
        self.kind = model.positions
        if model.positions == "learned":
            self.positions = nn.Parameter(torch.empty(model.max_positions, model.d_model))
        self.dropout = SeededDropout(model.dropout, seed, name)

    def embed(self, tokens: Tensor, positions: Tensor, key: Tensor) -> Tensor:
        """`[batch, sequence]` ints -> `[batch, sequence, d_model]`."""
        hidden = embedded(tokens, as_trained(self.weight, self.rounding), self.rows, self.tensor)
        if self.scale != 1.0:
            hidden = hidden * self.scale
        if self.kind == "sinusoidal":
            hidden = hidden + sinusoidal_positions(positions, self.weight.shape[1], self.weight.dtype)
        elif self.kind == "learned":
            hidden = hidden + F.embedding(positions, self.positions)
        return self.dropout(hidden, key)


class SourceEmbedding(Embedding):
    """First layer of an encoder-decoder: embeds the source and hands on what the decoder needs."""

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """From the six int tensors of a batch and the dropout key."""
        source_tokens, source_positions, source_segments, *target, key = inputs
        return self.embed(source_tokens, source_positions, key), source_positions, source_segments, *target, key


class TargetEmbedding(Embedding):
    """First layer of a decoder without encoder: the source side of the batch is not used."""

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """From the six int tensors of a batch and the dropout key to hidden, positions, segments, key."""
        *_, tokens, positions, segments, key = inputs
        return self.embed(tokens, positions, key), positions, segments, key


class ClassifiedEmbedding(Embedding):
    """First layer of an encoder with a classifier: the source is embedded, target segments say what is classified."""

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """From the six int tensors of a batch and the dropout key."""
        tokens, positions, segments, _, _, target_segments, key = inputs
        return self.embed(tokens, positions, key), positions, segments, target_segments, key


class Bridge(Embedding):
    """Between encoder and decoder: the encoder's output becomes the memory, the target is embedded."""

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """From the encoder's tuple to the decoder's."""
        memory, _, source_segments, target_tokens, target_positions, target_segments, key = inputs
        hidden = self.embed(target_tokens, target_positions, key)
        return hidden, memory, source_segments, target_positions, target_segments, key
