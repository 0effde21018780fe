"""What each attention sub-layer looks at, read beside an ordinary forward pass, and attention rollout over the layers.

Rollout: Abnar & Zuidema 2020, section 3: `A = 0.5 W + 0.5 I` with `W` the mean over heads, multiplied over layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from model.attention import MultiHeadAttention, segment_mask, softmax_weights
from model.attention_kinds import dense_mask, feature_map
from model.batch import Inputs
from model.layers import DecoderLayer, SelfAttentionLayer
from model.transformer import Transformer


@dataclass
class AttentionMaps:
    """Probabilities per layer, in order: `encoder` `[batch, heads, source, source]`, `decoder` `[.., target, target]`,
    `cross` `[.., target, source]`; a model without such a sub-layer has none.
    """

    encoder: list[Tensor] = field(default_factory=list)
    decoder: list[Tensor] = field(default_factory=list)
    cross: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def attention_maps(model: Transformer, inputs: Inputs) -> AttentionMaps:
    """The maps of one forward pass over the six int tensors of a batch.

    The pass is the ordinary one: hooks keep what the projections of queries and keys give, and the weights are computed
    again from that afterwards, so training has no path for it. A whole model on one rank only.
    """
    kept: dict[nn.Module, Tensor] = {}
    entered: dict[nn.Module, tuple[Tensor, ...]] = {}
    layers = [layer for layer in model.layers() if isinstance(layer, SelfAttentionLayer | DecoderLayer)]

    def keep_output(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        kept[module] = output

    def keep_input(module: nn.Module, arguments: tuple[tuple[Tensor, ...], ...]) -> None:
        entered[module] = arguments[0]

    hooks = []
    for layer in layers:
        hooks.append(layer.register_forward_pre_hook(keep_input))
        for attention in _attentions(layer):
            hooks += [part.register_forward_hook(keep_output) for part in (attention.query, attention.key)]
    try:
        model.hidden(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    maps = AttentionMaps()
    for layer in layers:
        own = layer.attention
        if isinstance(layer, DecoderLayer):
            _, _, source_segments, positions, segments, _ = entered[layer]
            across = segment_mask(segments, source_segments)
            maps.cross.append(_map(layer.cross_attention, kept, across, None))
        else:
            _, positions, segments, *_ = entered[layer]
        found = _map(own, kept, dense_mask(own.kind, segments, positions), positions)
        (maps.decoder if own.kind.causal else maps.encoder).append(found)
    return maps


def _attentions(layer: SelfAttentionLayer | DecoderLayer) -> list[MultiHeadAttention]:
    return [layer.attention, *([layer.cross_attention] if isinstance(layer, DecoderLayer) else [])]


def _map(
    attention: MultiHeadAttention, kept: dict[nn.Module, Tensor], mask: Tensor, positions: Tensor | None
) -> Tensor:
    queries, keys = attention.placed_pair(kept[attention.query], kept[attention.key], positions)
    if attention.kind.name != "linear":
        return softmax_weights(queries, keys, mask)
    weights = feature_map(queries) @ feature_map(keys).transpose(-1, -2) * mask
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)


def rollout(layers: list[Tensor]) -> Tensor:
    """What the last layer's places hold of the first one's inputs, `[sequence, sequence]`, rows of sum 1.

    `layers` are the first row's maps `[heads, sequence, sequence]` of self-attention, at least one.
    """
    held = torch.eye(layers[0].shape[-1], dtype=layers[0].dtype)
    for weights in layers:
        held = _half_residual(weights) @ held
    return held


def source_rollout(encoder: list[Tensor], decoder: list[Tensor], cross: list[Tensor]) -> Tensor:
    """What the target's places hold of the source's inputs, `[target, source]`; the rest of each row is target's.

    Rollout over both stacks: a residual connection around cross-attention too keeps half of what a place held, the
    other half is what the encoder's outputs that it looks at hold. Maps are `[heads, query, key]` of one row.
    """
    memory = rollout(encoder)
    held = torch.zeros(cross[0].shape[-2:], dtype=memory.dtype)
    for own, across in zip(decoder, cross, strict=True):
        held = 0.5 * (_half_residual(own) @ held) + 0.5 * across.mean(0) @ memory
    return held


def _half_residual(weights: Tensor) -> Tensor:
    """`[heads, sequence, sequence]` -> `[sequence, sequence]`: heads' mean, and as much of the place itself."""
    return 0.5 * weights.mean(0) + 0.5 * torch.eye(weights.shape[-1], dtype=weights.dtype)
