"""Self-attention of any kind over packed rows: each kind by the way that costs what the kind promises."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from model.attention_kinds import AttentionKind, dense_mask
from model.block_attention import block_attention
from model.linear_attention import linear_attention


def self_attention(
    kind: AttentionKind,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Tensor,
    positions: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """`[batch, heads, sequence, width]` for projected queries, keys and values of that shape.

    `segments` and `positions` int `[batch, sequence]`: documents stand together, positions count within each.
    `mask` is `dense_mask` of kind `full`, where the caller has it already.
    """
    if segments.numel() == 0:
        return queries
    if kind.name == "linear":
        return linear_attention(kind, queries, keys, values, segments)
    if kind.name == "full":
        mask = dense_mask(kind, segments, positions) if mask is None else mask
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    return block_attention(kind, queries, keys, values, segments, positions)
