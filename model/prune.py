"""Structured pruning: heads and feed-forward units that matter least are cut out, and the matrices shrink.

Importance is that of Michel et al. 2019, section 4.1: E |dL / dgate| of a gate of 1 on what the head gives to the
output projection, the expectation taken over batches; the same for units of the feed-forward layer. Ranking happens
inside each layer and every layer keeps equally many, because a model section (and the classes of transformers) has
one number of heads and one d_ff.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.schema import ModelSection
from model.attention import MultiHeadAttention
from model.batch import ModelBatch
from model.feed_forward import FeedForward
from model.transformer import Transformer

# Widths of feed-forward layers that remain are whole multiples, for the sake of matrix products.
UNIT_STEP = 8


@dataclass(frozen=True)
class Kept:
    """What stays: by name of an attention its head groups (int64, ascending), by name of a feed-forward its units.

    A group is a head of keys and values with the queries that share it; without sharing a head.
    """

    groups: Mapping[str, Tensor]
    units: Mapping[str, Tensor]


def parts(model: Transformer) -> tuple[dict[str, MultiHeadAttention], dict[str, FeedForward]]:
    """Attentions and feed-forward layers by name."""
    attentions = {name: m for name, m in model.named_modules() if isinstance(m, MultiHeadAttention)}
    return attentions, {name: m for name, m in model.named_modules() if isinstance(m, FeedForward)}


def importance(model: Transformer, batches: Iterable[ModelBatch]) -> dict[str, Tensor]:
    """Importance of the head groups of each attention and of the units of each feed-forward layer, by module name.

    The loss of a batch is the mean over its target tokens. The model is used in evaluation mode and left as it was.
    """
    attentions, feed_forwards = parts(model)
    gates: dict[str, Tensor] = {}
    hooks = []
    for name, attention in attentions.items():
        gates[name] = torch.ones(attention.key_value_heads, requires_grad=True)
        times = attention.output.in_features // attention.key_value_heads
        hooks.append(attention.output.register_forward_pre_hook(_gated(gates[name], times)))
    for name, layer in feed_forwards.items():
        gates[name] = torch.ones(layer.outer.in_features, requires_grad=True)
        hooks.append(layer.outer.register_forward_pre_hook(_gated(gates[name], 1)))
    found = {name: torch.zeros_like(gate) for name, gate in gates.items()}
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    training = model.training
    model.eval().requires_grad_(False)
    try:
        for batch in batches:
            weight = batch.loss_weight.sum()
            if weight == 0:
                continue
            loss = model(batch.inputs, None, batch.labels, batch.loss_weight).loss / weight
            for name, gradient in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
                found[name] += gradient.abs()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, requires in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(requires)
        model.train(training)
    return found


def _gated(gate: Tensor, times: int):
    return lambda _module, inputs: (inputs[0] * gate.repeat_interleave(times),)


def choose(model: Transformer, importances: Mapping[str, Tensor], amount: float) -> Kept:
    """The most important groups and units of each layer; about `amount` of them, in (0, 1), are left out.

    Of heads at least one group stays and the count is rounded; of units the nearest multiple of UNIT_STEP stays.
    """
    attentions, feed_forwards = parts(model)
    groups = model.section.heads_of_keys
    kept_groups = max(1, round(groups * (1 - amount)))
    units = model.section.d_ff
    kept_units = min(units, max(1, round(units * (1 - amount) / UNIT_STEP)) * UNIT_STEP)
    return Kept(
        {name: _most(importances[name], kept_groups) for name in attentions},
        {name: _most(importances[name], kept_units) for name in feed_forwards},
    )


def _most(values: Tensor, count: int) -> Tensor:
    return values.argsort(descending=True, stable=True)[:count].sort().values


def pruned_section(section: ModelSection, kept: Kept) -> ModelSection:
    """The model section with what remains: heads, heads of keys, their width as it was, d_ff."""
    groups, units = len(next(iter(kept.groups.values()))), len(next(iter(kept.units.values())))
    shared = section.heads // section.heads_of_keys
    return ModelSection(
        **{
            **section.model_dump(),
            "heads": groups * shared,
            "key_value_heads": None if section.key_value_heads is None else groups,
            "head_width": section.width_of_heads,
            "d_ff": units,
        }
    )


def cut(parameters: Mapping[str, Tensor], section: ModelSection, kept: Kept) -> dict[str, Tensor]:
    """Full tensors by parameter name (weights, or an optimizer's moments alike) with only what is kept."""
    width, shared = section.width_of_heads, section.heads // section.heads_of_keys
    result = dict(parameters)

    def take(name: str, axis: int, index: Tensor) -> None:
        if name in result:
            result[name] = result[name].index_select(axis, index)

    for name, groups in kept.groups.items():
        keys, queries = _spans(groups, width), _spans(groups, width * shared)
        for projection, index in (("query", queries), ("key", keys), ("value", keys)):
            take(f"{name}.{projection}.weight", 0, index)
            take(f"{name}.{projection}.bias", 0, index)
        take(f"{name}.output.weight", 1, queries)
    for name, units in kept.units.items():
        for projection in ("inner", "gate"):
            take(f"{name}.{projection}.weight", 0, units)
            take(f"{name}.{projection}.bias", 0, units)
        take(f"{name}.outer.weight", 1, units)
    return result


def _spans(groups: Tensor, width: int) -> Tensor:
    """Numbers of all elements of groups that are `width` wide."""
    return (groups.unsqueeze(1) * width + torch.arange(width)).flatten()
