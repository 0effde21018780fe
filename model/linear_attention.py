"""Attention of kind `linear` in O(n): sums of phi(k) v over blocks, carried along each document (chunk-wise form)."""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention_kinds import AttentionKind, feature_map
from model.blocks import lay_out

BLOCK_TOKENS = 64


def linear_attention(kind: AttentionKind, queries: Tensor, keys: Tensor, values: Tensor, segments: Tensor) -> Tensor:
    """Self-attention `[batch, heads, sequence, width]` over packed rows; `segments` int `[batch, sequence]`.

    phi(q_t) S_t / (phi(q_t) z_t), S_t the sum of phi(k_j) v_j and z_t of phi(k_j), over j <= t when causal and over
    the whole document otherwise (Katharopoulos et al. 2020, equations 5 and 9 to 12).
    """
    layout = lay_out(segments, BLOCK_TOKENS)
    query, key = layout.spread(feature_map(queries)), layout.spread(feature_map(keys))
    value = layout.spread(values)
    # Places without a token: phi(0) is 1, so they must not count as keys; as queries nobody reads them.
    exists = (layout.index() < layout.length.unsqueeze(1)).view(layout.blocks, 1, layout.size, 1)
    key = key * exists
    # A column of ones behind the values carries the normaliser along.
    value = torch.cat((value, torch.ones_like(value[..., :1])), -1)
    sums = (key.transpose(-1, -2) @ value).double()
    if kind.causal:
        # Running sums over all documents less the sum at the document's start; float64 keeps the difference exact
        # to float32.
        running = torch.cat((torch.zeros_like(sums[:1]), sums.cumsum(0)))
        own = torch.arange(layout.blocks, device=layout.first.device)
        before = (running[own] - running[layout.first]).to(query.dtype)
        scores = (query @ key.transpose(-1, -2)).tril()
        mixed = query @ before + scores @ value
    else:
        total = torch.zeros(layout.documents, *sums.shape[1:], dtype=sums.dtype, device=sums.device)
        total = total.index_add(0, layout.document, sums)
        mixed = query @ total.to(query.dtype)[layout.document]
    return layout.gather(mixed[..., :-1] / mixed[..., -1:].clamp(min=torch.finfo(mixed.dtype).tiny), queries.shape[0])
