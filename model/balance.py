"""Which layers go to which pipeline stage: a modelled cost per layer, and the cut with the cheapest dearest stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise

from configs.schema import ModelSection, RunConfig
from model.transformer import EMBEDDING, HEAD, build_layers, parameter_shapes

LOOKUPS = (".positions", "embedding.weight")


def stage_names(config: RunConfig, vocabulary_size: int) -> list[list[str]]:
    """Names of the layers of each stage of `parallelism.pipeline`, in order."""
    data, stages = config.data, config.parallelism.pipeline
    costs = layer_costs(config.model, vocabulary_size, data.source_tokens, data.target_tokens)
    names = list(costs)
    bounds = balanced(list(costs.values()), [is_block(name) for name in names], stages)
    return [names[start:stop] for start, stop in pairwise(bounds)]


def is_block(name: str) -> bool:
    """Whether a layer is one of the encoder's or decoder's; every stage has at least one of these."""
    return name.rpartition("_")[2].isdecimal()


def layer_costs(model: ModelSection, vocabulary_size: int, source_tokens: int, target_tokens: int) -> dict[str, float]:
    """Floating-point operations of a forward pass over one full row, by layer in the order of the model.

    Two per element of a matrix and token, four per dimension of the width and pair of query and key. Backward passes
    take twice as many of each, so the proportions hold for training. Looking up embeddings, norms and residual sums
    count one per element.
    """
    shapes = parameter_shapes(model, vocabulary_size)
    costs = {}
    for spec in build_layers(model, 0):
        name = spec.name
        encodes = name.startswith("encoder") or (name == EMBEDDING and model.architecture != "decoder")
        tokens = source_tokens if encodes else target_tokens
        cost = float(tokens * model.d_model)
        for parameter, shape in shapes.items():
            if parameter.startswith(f"{name}.") and len(shape) == 2 and not parameter.endswith(LOOKUPS):
                over_source = ".cross_attention.key." in parameter or ".cross_attention.value." in parameter
                cost += 2.0 * math.prod(shape) * (source_tokens if over_source else tokens)
        if name == HEAD and model.architecture != "encoder" and "head.weight" not in shapes:
            cost += 2.0 * vocabulary_size * model.d_model * tokens
        if is_block(name):
            keys = _keys(model, tokens, causal=name.startswith("decoder"))
            cost += 4.0 * model.d_model * tokens * keys
            if name.startswith("decoder") and model.architecture == "encoder_decoder":
                cost += 4.0 * model.d_model * tokens * source_tokens
        costs[name] = cost
    return costs


def _keys(model: ModelSection, tokens: int, causal: bool) -> float:
    """Keys that a query is compared with, on average."""
    attention = model.attention
    if attention.kind == "linear":
        return float(model.width_of_heads)
    if attention.kind == "window":
        return float(min(tokens, (1 if causal else 2) * attention.window_tokens + attention.global_tokens))
    if attention.kind == "blocklog":
        block = attention.block_tokens
        return float(min(tokens, block * (1 + math.log2(max(2, tokens / block)))))
    # Full attention computes the upper triangle too.
    return float(tokens)


def balanced(costs: Sequence[float], anchors: Sequence[bool], stages: int) -> list[int]:
    """Bounds `[0, ..., len(costs)]` of `stages` runs of layers, each with at least one that is an anchor.

    The dearest run is as cheap as can be; among such cuts, the sum of squared costs is smallest, then earlier stages
    are longest. Raises ValueError with fewer anchors than stages.
    """
    if sum(anchors) < stages:
        raise ValueError(f"{stages} stages of {sum(anchors)} layers")
    count = len(costs)
    totals = [0.0, *accumulate(costs)]

    @cache
    def best(start: int, left: int) -> tuple[float, float, int] | None:
        """Dearest run, sum of squares and end of the first run of layers `start ..` in `left` runs, if that can be."""
        found = None
        for stop in range(count, start, -1) if left > 1 else (count,):
            if not any(anchors[start:stop]):
                break
            cost = totals[stop] - totals[start]
            if found is not None and cost > found[0]:
                continue
            rest = best(stop, left - 1) if left > 1 else (0.0, 0.0, count)
            if rest is None:
                continue
            price = (max(cost, rest[0]), cost**2 + rest[1])
            if found is None or price < found[:2]:
                found = (*price, stop)
        return found

    bounds = [0]
    for left in range(stages, 0, -1):
        chosen = best(bounds[-1], left)
        assert chosen is not None
        bounds.append(chosen[2])
    return bounds
