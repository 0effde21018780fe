"""Floating-point operations of training, by the convention in which utilisation is published.

Chowdhery et al. 2022 (PaLM), appendix B: 6 per token and weight of a matrix multiplication (2 forward, 4 backward) and
12 L d T for attention over T keys, recomputation not counted and causal masks not made use of. Weights that are only
looked up (embeddings that are not the output projection too, positions) do no multiplications. Narayanan et al. 2021,
equation 3 is the same count for d_ff = 4 d, with a fourth pass where activations are recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import ModelSection
from jobs.plan.parameters import Shape, Stack

LINEAR_CHUNK_TOKENS = 64


@dataclass(frozen=True)
class Flops:
    """Operations of forward and backward for one sample, and its tokens, source and target together."""

    matrices: int
    attention: int
    head: int
    tokens: int

    @property
    def sample(self) -> int:
        """All operations for one sample."""
        return self.matrices + self.attention + self.head

    @property
    def token(self) -> float:
        """Operations per token."""
        return self.sample / self.tokens


def training_flops(shape: Shape) -> Flops:
    """The count of the module's docstring for one sample of full length."""
    matrices = attention = 0
    for stack in shape.stacks:
        for matrix in stack.matrices:
            tokens = shape.source_tokens if matrix.over_source else shape.target_tokens
            matrices += stack.depth * 6 * matrix.elements * tokens
        attention += stack.depth * 12 * shape.model.d_model * stack.tokens * keys_seen(shape.model, stack)
        attention += stack.depth * 12 * shape.model.d_model * stack.tokens * stack.memory_tokens
    head = 6 * shape.model.d_model * shape.head_outputs * shape.scored_tokens
    return Flops(matrices, attention, head, shape.tokens)


def keys_seen(model: ModelSection, stack: Stack) -> int:
    """Keys that self-attention computes per query: all for `full`, those of its blocks for the sparse kinds.

    `linear` has no keys: its state of width^2 per head and its chunk cost as much as that many keys would.
    """
    kind, tokens, sides = model.attention, stack.tokens, 1 if stack.causal else 2
    if kind.kind == "full":
        return tokens
    if kind.kind == "window":
        blocks_of_globals = -(-kind.global_tokens // kind.window_tokens)
        seen = (1 + sides + blocks_of_globals) * kind.window_tokens
    elif kind.kind == "blocklog":
        blocks = -(-tokens // kind.block_tokens)
        seen = kind.block_tokens * (1 + sides * (blocks - 1).bit_length())
    else:
        seen = LINEAR_CHUNK_TOKENS + model.width_of_heads
    return min(tokens, seen)
