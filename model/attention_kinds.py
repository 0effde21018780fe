"""The kinds of attention, each defined by one function of two indices, and their dense form that tests compare with.

Indices count from 0 within a document, so packed documents are attended to as if each stood alone. All kinds see keys
of their own document only; with `causal` none after the query.

    full      every key: O(n^2)
    window    keys nearer than `window_tokens`, and the first `global_tokens` of the document, which see and are seen
              by all (Beltagy et al. 2020, Longformer): O(n w)
    blocklog  keys of the query's own block of `block_tokens` and of blocks at a distance of 1, 2, 4, ... blocks, after
              LogSparse (Li et al. 2019) in units of blocks: O(n log n)
    linear    every key, by phi(q) . phi(k) with phi = elu + 1 in place of the softmax (Katharopoulos et al. 2020): O(n)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

KindName = Literal["full", "window", "blocklog", "linear"]


@dataclass(frozen=True)
class AttentionKind:
    """Which keys a query looks at. Raises ValueError for sizes that make no sense."""

    name: KindName = "full"
    causal: bool = False
    window_tokens: int = 256
    global_tokens: int = 0
    block_tokens: int = 128

    def __post_init__(self) -> None:
        if self.name not in ("full", "window", "blocklog", "linear"):
            raise ValueError(f"attention kind {self.name!r} is unknown; choose full, window, blocklog or linear")
        if self.window_tokens < 1 or self.block_tokens < 1 or self.global_tokens < 0:
            raise ValueError("window_tokens and block_tokens must be 1 or more, global_tokens 0 or more")

    def mask_mod(self, query_index: Tensor, key_index: Tensor) -> Tensor:
        """True where a query looks at a key of its document; int tensors that broadcast against each other."""
        if self.name in ("full", "linear"):
            return query_index >= key_index if self.causal else (query_index >= 0) & (key_index >= 0)
        distance = query_index - key_index
        if self.name == "window":
            allowed = (distance.abs() < self.window_tokens) | (key_index < self.global_tokens)
            allowed = allowed | (query_index < self.global_tokens)
        else:
            blocks = query_index // self.block_tokens - key_index // self.block_tokens
            blocks = blocks.abs()
            # A power of two has one bit set; 0 is the query's own block.
            allowed = (blocks & (blocks - 1)) == 0
        return allowed & (distance >= 0) if self.causal else allowed


def dense_mask(kind: AttentionKind, segments: Tensor, positions: Tensor) -> Tensor:
    """Bool `[batch, 1, sequence, sequence]` of `mask_mod` over packed documents; see `segment_mask` for padding.

    `segments` and `positions` int `[batch, sequence]`; positions count within each segment.
    """
    same = segments.unsqueeze(-1) == segments.unsqueeze(-2)
    if kind.name in ("full", "linear") and not kind.causal:
        return same.unsqueeze(1)
    return (same & kind.mask_mod(positions.unsqueeze(-1), positions.unsqueeze(-2))).unsqueeze(1)


def feature_map(x: Tensor) -> Tensor:
    """phi(x) = elu(x) + 1, which is positive everywhere (Katharopoulos et al. 2020, equation 7)."""
    return F.elu(x) + 1.0


def dense_attention(kind: AttentionKind, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention by the full matrix of weights: the definition of every kind, for tests and single decoding steps.

    `queries [batch, heads, query, width]`, `keys` and `values [batch, heads, key, width]`, `mask` bool
    `[batch, 1, query, key]` or None for everywhere. A query that may look nowhere gets zeros.
    """
    if kind.name != "linear":
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    weights = feature_map(queries) @ feature_map(keys).transpose(-1, -2)
    if mask is not None:
        weights = weights * mask
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0) @ values
