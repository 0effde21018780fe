"""The layers of the transformer, each a module from a tuple of tensors to a tuple of tensors.

The tuples (`[batch, source]` and `[batch, target]` ints, `hidden` and `memory` float `[batch, sequence, d_model]`):

    in of the embedding       source tokens, positions, segments, target tokens, positions, segments, dropout key
    between encoder layers    hidden, source segments, target tokens, positions, segments, dropout key
    between decoder layers    hidden, memory, source segments, target positions, target segments, dropout key
    out of the last decoder   hidden

The dropout key is an int64 tensor `[2]` on the CPU: optimizer step and micro-batch. Masks are built by each layer from
segments and positions (0.2 ms for 8 rows of 256, where the attention itself takes 18 ms).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import MultiHeadAttention, causal_segment_mask, segment_mask
from model.loss import LossSums, chunked_cross_entropy
from model.positions import sinusoidal_positions
from model.seeds import generator


class SeededDropout(nn.Module):
    """Dropout whose mask is a function of (run seed, step, micro-batch, layer), not of the process it runs in."""

    def __init__(self, probability: float, seed: int, name: str) -> None:
        super().__init__()
        self.probability, self.seed, self.name = probability, seed, name

    def mask(self, like: Tensor, key: Tensor) -> Tensor:
        """Zeros with probability p, else 1 / (1 - p), in the shape and dtype of `like`; `key` int64 `[2]`."""
        keep = 1.0 - self.probability
        random = generator(self.seed, *key.tolist(), self.name, device=like.device)
        return torch.empty_like(like).bernoulli_(keep, generator=random).div_(keep)

    def forward(self, x: Tensor, key: Tensor) -> Tensor:
        """`x` with elements dropped while training."""
        return x * self.mask(x, key) if self.training and self.probability else x

    def added(self, residual: Tensor, x: Tensor, key: Tensor) -> Tensor:
        """`residual + dropout(x)` in one pass over the elements."""
        if not (self.training and self.probability):
            return residual + x
        return torch.addcmul(residual, x, self.mask(x, key))


class SubLayer(nn.Module):
    """LayerNorm(x + Dropout(Sublayer(x))): sections 3.1 and 5.4."""

    def __init__(self, d_model: int, dropout: float, seed: int, name: str) -> None:
        super().__init__()
        self.dropout = SeededDropout(dropout, seed, name)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, residual: Tensor, x: Tensor, key: Tensor) -> Tensor:
        """All `[batch, sequence, d_model]`; `x` is the sub-layer's output."""
        return self.norm(self.dropout.added(residual, x, key))


class FeedForward(nn.Module):
    """max(0, x W1 + b1) W2 + b2: equation 2."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.inner = nn.Linear(d_model, d_ff)
        self.outer = nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, sequence, d_model]` -> the same shape."""
        return self.outer(F.relu(self.inner(x)))


class Embedding(nn.Module):
    """Token embedding times sqrt(d_model) plus sinusoidal positions, with dropout: sections 3.4, 3.5 and 5.4."""

    def __init__(self, weight: nn.Parameter, dropout: float, seed: int, name: str) -> None:
        super().__init__()
        self.weight = weight
        self.dropout = SeededDropout(dropout, seed, name)

    def embed(self, tokens: Tensor, positions: Tensor, key: Tensor) -> Tensor:
        """`[batch, sequence]` ints -> `[batch, sequence, d_model]`."""
        d_model = self.weight.shape[1]
        places = sinusoidal_positions(positions, d_model, self.weight.dtype)
        return self.dropout(F.embedding(tokens, self.weight).mul(math.sqrt(d_model)) + places, key)


class SourceEmbedding(Embedding):
    """First layer: embeds the source and hands on what the decoder needs."""

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """From the six int tensors of a batch and the dropout key."""
        source_tokens, source_positions, source_segments, *target, key = inputs
        return self.embed(source_tokens, source_positions, key), source_segments, *target, key


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each with residual and norm."""

    def __init__(self, d_model: int, heads: int, d_ff: int, dropout: float, seed: int, name: str) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(d_model, heads)
        self.attention_output = SubLayer(d_model, dropout, seed, f"{name}/attention")
        self.feed_forward = FeedForward(d_model, d_ff)
        self.feed_forward_output = SubLayer(d_model, dropout, seed, f"{name}/feed_forward")

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The tuple with `hidden` replaced."""
        hidden, source_segments, *rest, key = inputs
        mask = segment_mask(source_segments, source_segments)
        hidden = self.attention_output(hidden, self.attention(hidden, hidden, mask), key)
        hidden = self.feed_forward_output(hidden, self.feed_forward(hidden), key)
        return hidden, source_segments, *rest, key


class Bridge(Embedding):
    """Between encoder and decoder: the encoder's output becomes the memory, the target is embedded."""

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """From the encoder's tuple to the decoder's."""
        memory, source_segments, target_tokens, target_positions, target_segments, key = inputs
        hidden = self.embed(target_tokens, target_positions, key)
        return hidden, memory, source_segments, target_positions, target_segments, key


class DecoderLayer(nn.Module):
    """Causal self-attention, attention over the memory, feed-forward, each with residual and norm.

    The last one (`last=True`) hands on `hidden` alone: a pipeline stage must not receive a memory that it never uses.
    """

    def __init__(
        self, d_model: int, heads: int, d_ff: int, dropout: float, seed: int, name: str, last: bool = False
    ) -> None:
        super().__init__()
        self.last = last
        self.attention = MultiHeadAttention(d_model, heads)
        self.attention_output = SubLayer(d_model, dropout, seed, f"{name}/attention")
        self.cross_attention = MultiHeadAttention(d_model, heads)
        self.cross_attention_output = SubLayer(d_model, dropout, seed, f"{name}/cross_attention")
        self.feed_forward = FeedForward(d_model, d_ff)
        self.feed_forward_output = SubLayer(d_model, dropout, seed, f"{name}/feed_forward")

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The tuple with `hidden` replaced, or `hidden` alone."""
        hidden, memory, source_segments, target_positions, target_segments, key = inputs
        keys_values = self.attention.keys_values(hidden)
        own = causal_segment_mask(target_segments, target_positions)
        across = segment_mask(target_segments, source_segments)
        hidden = self.run(hidden, keys_values, own, self.cross_attention.keys_values(memory), across, key)
        return (hidden,) if self.last else (hidden, *inputs[1:])

    def run(
        self,
        hidden: Tensor,
        own_keys_values: tuple[Tensor, Tensor],
        own_mask: Tensor | None,
        memory_keys_values: tuple[Tensor, Tensor],
        memory_mask: Tensor | None,
        key: Tensor,
    ) -> Tensor:
        """The layer over projected keys and values, as training and cached decoding both have them."""
        attended = self.attention.attend(hidden, *own_keys_values, own_mask)
        hidden = self.attention_output(hidden, attended, key)
        attended = self.cross_attention.attend(hidden, *memory_keys_values, memory_mask)
        hidden = self.cross_attention_output(hidden, attended, key)
        return self.feed_forward_output(hidden, self.feed_forward(hidden), key)


class Head(nn.Module):
    """The output projection, tied to the embedding and without bias: section 3.4."""

    def __init__(self, weight: nn.Parameter, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.weight, self.label_smoothing = weight, label_smoothing

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., d_model]` -> float32 `[..., vocabulary]`."""
        return F.linear(hidden, self.weight).float()

    def forward(self, inputs: tuple[Tensor, ...], labels: Tensor, loss_weight: Tensor) -> LossSums:
        """Loss and nll summed over the positions `[batch, target]` that have weight."""
        return chunked_cross_entropy(inputs[0], self.weight, labels, loss_weight, self.label_smoothing)
