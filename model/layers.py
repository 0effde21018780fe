"""The layers of the transformer, each a module from a tuple of tensors to a tuple of tensors.

The tuples (`positions` and `segments` int `[batch, sequence]`, `hidden` and `memory` float
`[batch, sequence, d_model]`):

    in of the embedding          source tokens, positions, segments, target tokens, positions, segments, dropout key
    between encoder layers       hidden, source positions, segments, target tokens, positions, segments, dropout key
    between decoder layers       hidden, memory, source segments, target positions, target segments, dropout key
    between layers of a decoder  hidden, positions, segments, dropout key (no encoder)
    out of the last decoder      hidden

The dropout key is an int64 tensor `[2]` on the CPU: optimizer step and micro-batch. Masks are built by each layer from
segments and positions (0.2 ms for 8 rows of 256, where the attention itself takes 18 ms).
"""

from __future__ import annotations

from torch import Tensor, nn

from configs.schema import ModelSection
from model.attention import MultiHeadAttention, segment_mask
from model.attention_kinds import AttentionKind
from model.dropout import SeededDropout
from model.feed_forward import FeedForward
from model.mesh import ALONE, Axis
from model.residual import SubLayer, make_norm


def make_attention(
    model: ModelSection, seed: int, name: str, causal: bool = False, across: bool = False, tensor: Axis = ALONE
) -> MultiHeadAttention:
    """Self-attention of the model's kind, or attention across to the encoder's memory, which sees all of it."""
    section = model.attention
    kind = AttentionKind(section.kind, causal, section.window_tokens, section.global_tokens, section.block_tokens)
    probability = model.attention_dropout
    dropout = SeededDropout(probability, seed, f"{name}/weights", tensor) if probability else None
    rotary = model.rotary_base if model.positions == "rotary" and not across else None
    return MultiHeadAttention(
        model.d_model,
        model.heads,
        model.key_value_heads,
        model.bias,
        AttentionKind() if across else kind,
        rotary,
        dropout,
        model.head_width,
        tensor,
    )


class SelfAttentionLayer(nn.Module):
    """Self-attention and feed-forward, each with residual and norm: the layer of encoders, and (causal) of decoders
    without an encoder.
    """

    def __init__(
        self,
        model: ModelSection,
        seed: int,
        name: str,
        causal: bool = False,
        last: bool = False,
        tensor: Axis = ALONE,
    ) -> None:
        super().__init__()
        self.last = last
        self.attention = make_attention(model, seed, f"{name}/attention", causal, tensor=tensor)
        self.attention_output = SubLayer(model, seed, f"{name}/attention")
        self.feed_forward = FeedForward(model.d_model, model.d_ff, model.feed_forward, model.bias, tensor)
        self.feed_forward_output = SubLayer(model, seed, f"{name}/feed_forward")

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The tuple with `hidden` replaced, or `hidden` alone."""
        hidden, positions, segments, *_, key = inputs
        entered = self.attention_output.enter(hidden)
        attended = self.attention.attend_self(entered, segments, positions, key)
        hidden = self.finish(hidden, attended, key)
        return (hidden,) if self.last else (hidden, *inputs[1:])

    def finish(self, hidden: Tensor, attended: Tensor, key: Tensor) -> Tensor:
        """The layer from the output of its attention on."""
        hidden = self.attention_output.leave(hidden, attended, key)
        entered = self.feed_forward_output.enter(hidden)
        return self.feed_forward_output.leave(hidden, self.feed_forward(entered), key)


class DecoderLayer(nn.Module):
    """Causal self-attention, attention over the memory, feed-forward, each with residual and norm.

    The last one (`last=True`) hands on `hidden` alone: a pipeline stage must not receive a memory that it never uses.
    """

    def __init__(self, model: ModelSection, seed: int, name: str, last: bool = False, tensor: Axis = ALONE) -> None:
        super().__init__()
        self.last = last
        self.attention = make_attention(model, seed, f"{name}/attention", causal=True, tensor=tensor)
        self.attention_output = SubLayer(model, seed, f"{name}/attention")
        self.cross_attention = make_attention(model, seed, f"{name}/cross_attention", across=True, tensor=tensor)
        self.cross_attention_output = SubLayer(model, seed, f"{name}/cross_attention")
        self.feed_forward = FeedForward(model.d_model, model.d_ff, model.feed_forward, model.bias, tensor)
        self.feed_forward_output = SubLayer(model, seed, f"{name}/feed_forward")

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The tuple with `hidden` replaced, or `hidden` alone."""
        hidden, memory, source_segments, target_positions, target_segments, key = inputs
        entered = self.attention_output.enter(hidden)
        attended = self.attention.attend_self(entered, target_segments, target_positions, key)
        across = segment_mask(target_segments, source_segments)
        hidden = self.finish(hidden, attended, self.cross_attention.keys_values(memory), across, key)
        return (hidden,) if self.last else (hidden, *inputs[1:])

    def finish(
        self,
        hidden: Tensor,
        attended: Tensor,
        memory_keys_values: tuple[Tensor, Tensor],
        memory_mask: Tensor | None,
        key: Tensor,
    ) -> Tensor:
        """The layer from the output of its self-attention on."""
        hidden = self.attention_output.leave(hidden, attended, key)
        entered = self.cross_attention_output.enter(hidden)
        attended = self.cross_attention.attend(entered, *memory_keys_values, memory_mask, key)
        hidden = self.cross_attention_output.leave(hidden, attended, key)
        entered = self.feed_forward_output.enter(hidden)
        return self.feed_forward_output.leave(hidden, self.feed_forward(entered), key)


class FinalNorm(nn.Module):
    """The norm that ends a stack of pre-norm layers; everything else in the tuple passes."""

    def __init__(self, model: ModelSection) -> None:
        super().__init__()
        self.norm = make_norm(model)

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The tuple with its first tensor normalised."""
        return self.norm(inputs[0]), *inputs[1:]
