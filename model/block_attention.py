"""Attention of the kinds `window` and `blocklog` that computes only the blocks of keys a block of queries may see."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention_kinds import AttentionKind
from model.blocks import BlockLayout, lay_out


def block_size(kind: AttentionKind) -> int:
    """Tokens in a block: for windows the window itself, so that two (causal) or three blocks hold all keys."""
    return kind.window_tokens if kind.name == "window" else kind.block_tokens


def key_blocks(kind: AttentionKind, layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """Blocks of keys that each block of queries computes, int64 `[blocks, m]`, and which of them count, bool.

    A block that does not count is there because all queries compute equally many; no block counts twice.
    """
    if kind.name == "window":
        distances = [0, 1] if kind.causal else [0, 1, -1]
    else:
        furthest = int((layout.last - layout.first).max())
        powers = [1 << i for i in range(furthest.bit_length()) if 1 << i <= furthest]
        distances = [0, *powers] if kind.causal else [0, *powers, *(-power for power in powers)]
    own = torch.arange(layout.blocks, device=layout.first.device)
    wanted = own.unsqueeze(1) - own.new_tensor(distances)
    counts = (wanted >= layout.first.unsqueeze(1)) & (wanted <= layout.last.unsqueeze(1))
    wanted = torch.where(counts, wanted, own.unsqueeze(1))
    if kind.name == "window" and kind.global_tokens:
        # The blocks that hold the document's global tokens, unless they are among the neighbours already.
        extra = torch.arange(-(-kind.global_tokens // layout.size), device=own.device)
        far = layout.first.unsqueeze(1) + extra
        near = ((far.unsqueeze(-1) == wanted.unsqueeze(1)) & counts.unsqueeze(1)).any(-1)
        new = (far <= layout.last.unsqueeze(1)) & ~near
        if kind.causal:
            new &= far <= own.unsqueeze(1)
        wanted = torch.cat((wanted, torch.where(new, far, own.unsqueeze(1))), 1)
        counts = torch.cat((counts, new), 1)
    return wanted, counts


def block_attention(
    kind: AttentionKind, queries: Tensor, keys: Tensor, values: Tensor, segments: Tensor, positions: Tensor
) -> Tensor:
    """Self-attention `[batch, heads, sequence, width]` over packed rows; equals `dense_attention` with the kind's mask.

    `segments` and `positions` int `[batch, sequence]`. Memory and work are `blocks * m * size^2` scores, m the blocks
    of keys per block of queries.
    """
    layout = lay_out(segments, block_size(kind))
    wanted, counts = key_blocks(kind, layout)
    size, number = layout.size, wanted.shape[1]
    query = layout.spread(queries)

    def chosen(x: Tensor) -> Tensor:
        heads, width = x.shape[1], x.shape[3]
        return layout.spread(x)[wanted].transpose(1, 2).reshape(layout.blocks, heads, number * size, width)

    index = layout.index()
    key_index = index[wanted].view(layout.blocks, 1, number * size)
    exists = (index[wanted] < layout.length.view(-1, 1, 1)) & counts.unsqueeze(-1)
    mask = kind.mask_mod(index.unsqueeze(-1), key_index) & exists.view(layout.blocks, 1, number * size)
    mixed = F.scaled_dot_product_attention(query, chosen(keys), chosen(values), attn_mask=mask.unsqueeze(1))
    out = layout.gather(mixed, queries.shape[0])
    if kind.name == "window" and kind.global_tokens and not kind.causal:
        out = _with_global_queries(kind, out, queries, keys, values, segments, positions)
    return out


def _with_global_queries(
    kind: AttentionKind,
    out: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Tensor,
    positions: Tensor,
) -> Tensor:
    """`out` with the rows of global tokens replaced: those see their whole document, and are few."""
    is_global = positions < kind.global_tokens
    most = int(is_global.sum(1).max())
    # Stable sorting brings each row's global tokens to the front, in order.
    where = is_global.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    real = is_global.gather(1, where)
    spots = where[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
    mask = (segments.gather(1, where).unsqueeze(-1) == segments.unsqueeze(-2)).unsqueeze(1)
    mixed = F.scaled_dot_product_attention(queries.gather(2, spots), keys, values, attn_mask=mask)
    kept = torch.where(real[:, None, :, None], mixed, out.gather(2, spots))
    return out.scatter(2, spots, kept)


def touched_blocks(kind: AttentionKind, tokens: int) -> int:
    """Blocks of scores (block_size^2 each) that one document of `tokens` costs, global queries apart."""
    layout = lay_out(torch.ones(1, tokens, dtype=torch.int64), block_size(kind))
    return key_blocks(kind, layout)[0].numel()
