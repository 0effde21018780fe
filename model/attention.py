"""Multi-head attention (Vaswani et al. 2017, section 3.2) and the masks that segments and positions stand for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def segment_mask(query_segments: Tensor, key_segments: Tensor) -> Tensor:
    """Bool `[batch, 1, query, key]`: a query sees the keys of its own segment.

    Segments are int `[batch, query]` and `[batch, key]`, 0 is padding. In self-attention padding sees padding, so no
    row is empty and nothing else sees it. In cross-attention a row may be empty (padding, or a pair without source).
    """
    return (query_segments.unsqueeze(-1) == key_segments.unsqueeze(-2)).unsqueeze(1)


def causal_segment_mask(segments: Tensor, positions: Tensor) -> Tensor:
    """Bool `[batch, 1, sequence, sequence]`: a query sees keys of its segment at its own position and before.

    `positions` int `[batch, sequence]` count within each segment.
    """
    same = segments.unsqueeze(-1) == segments.unsqueeze(-2)
    return (same & (positions.unsqueeze(-1) >= positions.unsqueeze(-2))).unsqueeze(1)


class MultiHeadAttention(nn.Module):
    """Equation 1 in `heads` subspaces of width d_model / heads, with separate projections and biases."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.output = nn.Linear(d_model, d_model)

    def split(self, x: Tensor) -> Tensor:
        """`[batch, sequence, d_model]` -> `[batch, heads, sequence, d_model / heads]`."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Projected keys and values of `x [batch, key, d_model]`, each `[batch, heads, key, d_model / heads]`."""
        return self.split(self.key(x)), self.split(self.value(x))

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of `x [batch, query, d_model]` over projected keys and values; `[batch, query, d_model]`.

        `mask` bool `[batch, 1, query, key]`, True where a query may look, or None for everywhere. A query that may
        look nowhere gets zeros before the output projection.
        """
        mixed = F.scaled_dot_product_attention(self.split(self.query(x)), keys, values, attn_mask=mask)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of `x [batch, query, d_model]` over `memory [batch, key, d_model]`."""
        return self.attend(x, *self.keys_values(memory), mask)


def attention_weights(attention: MultiHeadAttention, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
    """The probabilities `[batch, heads, query, key]` that `attention` mixes values with, for looking at them."""
    queries, (keys, _) = attention.split(attention.query(x)), attention.keys_values(memory)
    scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    if mask is None:
        return scores.softmax(-1)
    return torch.nan_to_num(scores.masked_fill(~mask, float("-inf")).softmax(-1))
