"""Multi-head attention (Vaswani et al. 2017, section 3.2) and the masks that segments and positions stand for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention_kinds import AttentionKind, dense_attention, dense_mask
from model.dropout import SeededDropout
from model.mesh import ALONE, Axis
from model.parallel_linear import ColumnParallelLinear, RowParallelLinear, copied
from model.positions import rotate
from model.self_attention import self_attention


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
    return dense_mask(AttentionKind("full", causal=True), segments, positions)


class MultiHeadAttention(nn.Module):
    """Equation 1 in `heads` subspaces of `head_width` (default d_model / heads), with separate projections.

    `key_value_heads` heads of keys and values serve equal groups of queries each (Ainslie et al. 2023). `kind` is what
    `attend_self` looks at. With `rotary_base` queries and keys of self-attention are rotated by their positions. Ranks
    of `tensor` share the heads, those of keys and values too: `heads` and `key_value_heads` are this rank's, and so are
    the heads in the shapes below.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        key_value_heads: int | None = None,
        bias: bool = True,
        kind: AttentionKind | None = None,
        rotary_base: float | None = None,
        dropout: SeededDropout | None = None,
        head_width: int | None = None,
        tensor: Axis = ALONE,
    ) -> None:
        super().__init__()
        self.tensor, self.width = tensor, head_width or d_model // heads
        wide, narrow = self.width * heads, self.width * (key_value_heads or heads)
        self.heads, self.key_value_heads = heads // tensor.size, (key_value_heads or heads) // tensor.size
        assert tensor.size == 1 or (heads % tensor.size == 0 and (key_value_heads or heads) % tensor.size == 0)
        self.kind = kind or AttentionKind()
        self.rotary_base = rotary_base
        self.dropout = dropout
        self.query = ColumnParallelLinear(d_model, wide, bias, tensor)
        self.key = ColumnParallelLinear(d_model, narrow, bias, tensor)
        self.value = ColumnParallelLinear(d_model, narrow, bias, tensor)
        self.output = RowParallelLinear(wide, d_model, bias, tensor)

    def split(self, x: Tensor) -> Tensor:
        """`[batch, sequence, heads * width]` -> `[batch, heads, sequence, width]`."""
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)

    def queries(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Projected queries `[batch, heads, query, width]`; `positions` int `[batch, query]` where they are rotary."""
        return self._queries(copied(x, self.tensor), positions)

    def keys_values(self, x: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Projected keys and values of `x [batch, key, d_model]`, each `[batch, key_value_heads, key, width]`."""
        return self._keys_values(copied(x, self.tensor), positions)

    def attend_self(self, x: Tensor, segments: Tensor, positions: Tensor, key: Tensor) -> Tensor:
        """Self-attention of this kind; `x [batch, sequence, d_model]`, `segments`, `positions` int `[batch, sequence]`.

        `key` is the dropout key.
        """
        x = copied(x, self.tensor)
        queries = self._queries(x, positions)
        keys, values = self._shared(*self._keys_values(x, positions))
        if self.dropout is not None and self.dropout.active:
            mixed = self._dropped(queries, keys, values, dense_mask(self.kind, segments, positions), key)
        else:
            mixed = self_attention(self.kind, queries, keys, values, segments, positions)
        return self._joined(mixed)

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, key: Tensor | None = None) -> Tensor:
        """Attention of `x [batch, query, d_model]` over projected keys and values; `[batch, query, d_model]`.

        `mask` bool `[batch, 1, query, key]`, True where a query may look, or None for everywhere. A query that may
        look nowhere gets zeros before the output projection.
        """
        return self.mix(self.queries(x), keys, values, mask, key)

    def mix(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, key: Tensor | None = None
    ) -> Tensor:
        """`attend` for projected queries."""
        keys, values = self._shared(keys, values)
        if self.dropout is not None and self.dropout.active:
            return self._joined(self._dropped(queries, keys, values, mask, key))
        return self._joined(dense_attention(self.kind, queries, keys, values, mask))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of `x [batch, query, d_model]` over `memory [batch, key, d_model]`."""
        return self.attend(x, *self.keys_values(memory), mask)

    def placed_pair(self, queries: Tensor, keys: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is compared, `[batch, heads, sequence, width]`, of the outputs of projections `query` and `key`."""
        queries, keys = (self._placed(self.split(each), positions) for each in (queries, keys))
        return queries, self._shared(keys, keys)[0]

    def _queries(self, x: Tensor, positions: Tensor | None) -> Tensor:
        return self._placed(self.split(self.query(x)), positions)

    def _keys_values(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._placed(self.split(self.key(x)), positions), self.split(self.value(x))

    def _placed(self, x: Tensor, positions: Tensor | None) -> Tensor:
        if self.rotary_base is None:
            return x
        assert positions is not None, "rotary attention needs positions"
        return rotate(x, positions, self.rotary_base)

    def _shared(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with every head of queries having its own."""
        times = self.heads // self.key_value_heads
        if times == 1:
            return keys, values
        return keys.repeat_interleave(times, 1), values.repeat_interleave(times, 1)

    def _dropped(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, key: Tensor) -> Tensor:
        return self.dropout(softmax_weights(queries, keys, mask), key) @ values

    def _joined(self, mixed: Tensor) -> Tensor:
        return self.output(mixed.transpose(1, 2).flatten(2))


def softmax_weights(queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """`[batch, heads, query, key]`: equation 1's probabilities, zeros for a query that may look nowhere."""
    scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    if mask is None:
        return scores.softmax(-1)
    # Not -inf: a query without any key would get NaN, and NaN for its gradient.
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask


def attention_weights(attention: MultiHeadAttention, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
    """The probabilities `[batch, heads, query, key]` that softmax attention mixes values with, for looking at them."""
    keys, _ = attention._shared(*attention.keys_values(memory))
    return softmax_weights(attention.queries(x), keys, mask)
